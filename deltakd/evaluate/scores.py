"""Scores of answers and what can be concluded from them.

ROUGE is rouge-score's, F1 with its stemmer. Intervals are paired bootstraps over prompts: two models answer the same
prompts, so the interval is on the mean difference per prompt and not on two means that share their noise. Where a
method was trained from several seeds, these are resampled beside the prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltakd.base.errors import DataError

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge_rows(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Return ROUGE-1/2/L F1 of every row, between 0 and 1. Raises DataError if the lists do not match."""
    from rouge_score.rouge_scorer import RougeScorer

    if len(predictions) != len(references) or not references:
        raise DataError(
            f"evaluation: {len(predictions)} predictions for {len(references)} references. "
            "Every prompt needs one of each, and there must be a prompt."
        )
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    rows = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references, strict=True)]
    return {name: [row[name].fmeasure for row in rows] for name in ROUGE}


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


def paired_difference(values: Sequence[float], baseline: Sequence[float], num_resamples: int, seed: int) -> Interval:
    """Return the mean of values - baseline over rows with its 95% bootstrap interval.

    Raises DataError if the rows do not match.
    """
    if len(values) != len(baseline) or not values:
        raise DataError(f"evaluation: {len(values)} rows against {len(baseline)}. Compare models on the same prompts.")
    differences: NDArray[np.float64] = np.asarray(values, np.float64) - np.asarray(baseline, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(differences), size=(num_resamples, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), [0.025, 0.975])
    return Interval(float(differences.mean()), float(low), float(high))


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
