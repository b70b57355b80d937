"""Curves of any length as few points, so that a page of many runs stays small; spikes and both ends are kept.

A curve is cut into buckets of as many steps each; of a bucket its lowest and its highest point are kept, which at the
width of a chart looks like the whole curve. Points between equal neighbours go as well: a constant is two points.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A measured value over steps, and its running mean; both thinned."""

    x: Floats
    y: Floats
    mean_x: Floats
    mean_y: Floats


def curve(x: Floats, y: Floats, most: int) -> Curve | None:
    """Return `y` over `x` in at most `most` points, a third of that for the mean; None if there is no number in it."""
    known = np.isfinite(y)
    if not known.any():
        return None
    x, y = x[known], y[known]
    kept = thin(y, most)
    mean_x, mean_y = bucket_means(x, y, max(2, most // 3))
    return Curve(x[kept], y[kept], mean_x, mean_y)


def thin(y: Floats, most: int) -> NDArray[np.int64]:
    """Return the indexes of at most `most` points of a curve without NaN: first, last, and what stands out between."""
    num = len(y)
    kept = np.arange(num)
    if num > most:
        buckets = max(1, (most - 2) // 2)
        edges = np.linspace(0, num, buckets + 1).astype(np.int64)
        widest = np.arange(-(-num // buckets) + 1)
        inner = np.minimum(widest[None, :] + edges[:-1, None], edges[1:, None] - 1)
        values = y[inner]
        rows = np.arange(buckets)
        picked = (inner[rows, values.argmin(axis=1)], inner[rows, values.argmax(axis=1)])
        kept = np.unique(np.concatenate([[0], *picked, [num - 1]]))
    if len(kept) > 2:
        values = y[kept]
        same = (values[1:-1] == values[:-2]) & (values[1:-1] == values[2:])
        kept = kept[np.concatenate([[True], ~same, [True]])]
    return kept


def bucket_means(x: Floats, y: Floats, most: int) -> tuple[Floats, Floats]:
    """Return means of `x` and `y` over at most `most` buckets, each of four points or more; the ends keep their x."""
    buckets = max(1, min(most, len(y) // 4))
    if buckets < 2:
        return x, y
    edges = np.linspace(0, len(y), buckets + 1).astype(np.int64)
    sizes = np.diff(edges)
    mean_x, mean_y = (np.add.reduceat(values, edges[:-1]) / sizes for values in (x, y))
    mean_x[0], mean_x[-1] = x[0], x[-1]
    kept = np.ones(buckets, bool)
    kept[1:-1] = ~((mean_y[1:-1] == mean_y[:-2]) & (mean_y[1:-1] == mean_y[2:]))
    return mean_x[kept], mean_y[kept]
