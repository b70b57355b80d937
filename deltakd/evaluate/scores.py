"""Scores of answers and what can be concluded from them.

ROUGE is rouge-score's, F1 with its stemmer. Intervals are paired bootstraps over prompts: two models answer the same
prompts, so the interval is on the mean difference per prompt and not on two means that share their noise.
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
