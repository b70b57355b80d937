"""Scores of answers and what can be concluded from them.

ROUGE is rouge-score's, F1 with its stemmer. Intervals are bootstraps over prompts. Differences are paired: two models
answer the same prompts, so the interval is on the mean difference per prompt and not on two means that share their
noise, and their p-value is that of a sign-flip permutation test. Where a method was trained from several seeds, these
are resampled beside the prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltakd.base.errors import DataError

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge_rows(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, list[float]]:
    """Return ROUGE-1/2/L F1 of every row, between 0 and 1; of several references, the best of each.

    Raises DataError if the lists do not match.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if len(predictions) != len(references) or not references:
        raise DataError(
            f"evaluation: {len(predictions)} predictions for {len(references)} references. "
            "Every prompt needs one of each, and there must be a prompt."
        )
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        several = [reference] if isinstance(reference, str) else reference
        rows.append([scorer.score(one, prediction) for one in several])
    return {name: [max(one[name].fmeasure for one in several) for several in rows] for name in ROUGE}


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Difference(Interval):
    """A mean difference, its 95% interval, and how probable so large a one is where there is none."""

    p: float  # two-sided


def mean_interval(values: Sequence[float], num_resamples: int, seed: int) -> Interval:
    """Return the mean over rows with its 95% bootstrap interval. Raises DataError if there are no rows."""
    if not values:
        raise DataError("evaluation: no rows to take a mean of. Evaluate at least one prompt.")
    rows: NDArray[np.float64] = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = [rows[rng.integers(0, len(rows), size=(few, len(rows)))].mean(1) for few in _few(num_resamples, rows)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(rows.mean()), float(low), float(high))


def paired_difference(values: Sequence[float], baseline: Sequence[float], num_resamples: int, seed: int) -> Difference:
    """Return the mean of values - baseline over rows with its 95% bootstrap interval and its two-sided p-value.

    The p-value is that of a sign-flip permutation test: if neither model were better, each row's difference could as
    well have had the other sign. Of `num_resamples` draws of signs, and the one that was seen, it is the share whose
    mean lies as far from 0: never below 1 / (num_resamples + 1). Raises DataError if the rows do not match.
    """
    if len(values) != len(baseline) or not values:
        raise DataError(f"evaluation: {len(values)} rows against {len(baseline)}. Compare models on the same prompts.")
    differences: NDArray[np.float64] = np.asarray(values, np.float64) - np.asarray(baseline, np.float64)
    interval = mean_interval(differences.tolist(), num_resamples, seed)
    rng = np.random.default_rng([seed, 1])  # signs that do not follow the resamples
    least = abs(differences.sum()) * (1 - 1e-9)  # sums in another order differ by their last bits
    as_far = 1
    for few in _few(num_resamples, differences):
        signs = rng.integers(0, 2, size=(few, len(differences)), dtype=np.int8) * 2.0 - 1.0
        as_far += int((np.abs(signs @ differences) >= least).sum())
    return Difference(interval.mean, interval.low, interval.high, as_far / (num_resamples + 1))


def _few(num_resamples: int, rows: NDArray[np.float64]) -> Iterator[int]:
    """Cut resamples into parts of at most 64 MiB."""
    most = max(1, 2**23 // len(rows))
    while num_resamples > 0:
        yield min(most, num_resamples)
        num_resamples -= most


def two_level_difference(
    values: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]], num_resamples: int, seed: int
) -> Interval:
    """Return the mean of values - baseline over seeds and rows with its 95% bootstrap interval over both.

    `values[s][r]` is row r of the model that was trained from the s-th seed, likewise `baseline`: pairs share seed and
    row. A resample draws seeds and, apart from them, rows, with replacement; every drawn seed meets every drawn row
    (Owen 2007, 0712.1111, the pigeonhole bootstrap). Its variance of S seeds is (S - 1)/S of the unbiased one, so where
    seeds matter more than rows and there are three of them, 95% cover about 72 of 100 worlds; from one seed the
    interval speaks of rows alone. Raises DataError if the rows do not match.
    """
    differences = _differences(values, baseline)
    rng, (num_seeds, num_rows) = np.random.default_rng(seed), differences.shape
    seeds, rows = (rng.multinomial(n, np.full(n, 1 / n), size=num_resamples) / n for n in (num_seeds, num_rows))
    low, high = np.quantile(((seeds @ differences) * rows).sum(axis=1), [0.025, 0.975])
    return Interval(float(differences.mean()), float(low), float(high))


def _differences(values: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    shapes = [[len(rows) for rows in side] for side in (values, baseline)]
    if shapes[0] != shapes[1] or len(set(shapes[0])) != 1 or not shapes[0][0]:
        raise DataError(
            f"evaluation: rows {shapes[0]} against {shapes[1]}, by seed. Compare models of the same seeds and prompts."
        )
    differences: NDArray[np.float64] = np.asarray(values, np.float64) - np.asarray(baseline, np.float64)
    return differences
