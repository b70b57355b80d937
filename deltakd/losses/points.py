"""Points: distributions that are log-linear in the models, P(w) = softmax(sum_m w_m z_m / tau).

Softmax ignores additive constants, so no model's own normaliser is computed: a point costs one weighted sum of logits
and one log-softmax, however many models it mixes. Everything is in log space; ratios of probabilities raised to a power
overflow where this does not.

Shapes: n tokens of a chunk, V shared vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

STUDENT = "student"


@dataclass(frozen=True)
class Point:
    """Weights by model name. Zero weights are left out: 0 * -inf is not 0, and such a model is not needed."""

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", {name: weight for name, weight in self.weights.items() if weight != 0})

    @property
    def models(self) -> frozenset[str]:
        """The models it mixes."""
        return frozenset(self.weights)

    @property
    def student_weight(self) -> float:
        """The weight of the model in training; 0 for a frozen point."""
        return self.weights.get(STUDENT, 0.0)

    def logits(self, logits: Mapping[str, Tensor]) -> Tensor:
        """Sum the models' logits [n, V] by weight, in float32 or wider."""
        terms = [
            widen(logits[name]) if weight == 1 else weight * widen(logits[name])
            for name, weight in self.weights.items()
        ]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def log_probabilities(self, logits: Mapping[str, Tensor], temperature: float) -> Tensor:
        """Return log P [n, V]."""
        total = self.logits(logits)
        return torch.log_softmax(total if temperature == 1 else total / temperature, dim=-1)


def widen(values: Tensor) -> Tensor:
    """Return values in float32, or as they are if they are wider."""
    return values if values.dtype == torch.float64 else values.float()


def teacher_point() -> Point:
    """The fine-tuned teacher."""
    return Point({"teacher": 1.0})


def delta_point(alpha: float, anchor: str) -> Point:
    """The shift of the teacher's fine-tuning, brought to the student's starting point.

    anchor `teacher`: teacher * (student_raw / teacher_raw)^alpha. Source: Delta-KD, arXiv:2509.14526, Eq. 8.
    anchor `student`: student_raw * (teacher / teacher_raw)^alpha. They agree at alpha = 1.
    """
    if anchor == "teacher":
        return Point({"teacher": 1.0, "student_raw": alpha, "teacher_raw": -alpha})
    return Point({"student_raw": 1.0, "teacher": alpha, "teacher_raw": -alpha})
