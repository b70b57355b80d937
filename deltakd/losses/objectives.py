"""Objectives: L = sft_weight * CE(labels, student) + (1 - sft_weight) * tau_factor * D(P, Q), per token.

P is the frozen point, Q the point that holds the student; cross-entropy is always at temperature 1. `evaluate` gives
value and dL/dz_student in closed form; `per_token` wraps the same lines for autograd. No ranks, no recipe, no sockets.

Shapes: n tokens, V shared vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltakd.base.errors import RecipeError
from deltakd.losses.divergences import DIVERGENCES
from deltakd.losses.points import STUDENT, Point, delta_point, teacher_point, widen
from deltakd.losses.settings import DeltaTarget, ObjectiveSettings


@dataclass(frozen=True)
class TokenLoss:
    """What an objective says of n tokens; every tensor is [n] but `grad_student`, dL/dz_student [n, V]."""

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    grad_student: Tensor


@dataclass(frozen=True)
class Objective:
    """One loss on tokens: a divergence from the target to the student, and a share of plain cross-entropy."""

    target: Point
    student: Point
    divergence: str
    sft_weight: float
    temperature: float
    temperature_squared: bool
    chunk_tokens: int

    @property
    def needs(self) -> frozenset[str]:
        """The frozen models whose logits it uses."""
        if self.sft_weight == 1:
            return frozenset()
        return (self.target.models | self.student.models) - {STUDENT}

    def evaluate(self, logits: Mapping[str, Tensor], labels: Tensor) -> TokenLoss:
        """Return the loss of n tokens and its gradient for the student's logits.

        logits [n, V] by model name, `student` among them; labels [n]. float32, or float64 for float64 logits.
        """
        log_student = torch.log_softmax(widen(logits[STUDENT]), dim=-1)
        rows = torch.arange(len(labels), device=labels.device)
        cross_entropy = -log_student[rows, labels]
        divergence, grad = self._divergence(logits, log_student)
        if self.sft_weight > 0:
            grad_sft = log_student.exp()
            grad_sft[rows, labels] -= 1
            grad = self.sft_weight * grad_sft if grad is None else torch.add(grad, grad_sft, alpha=self.sft_weight)
        assert grad is not None  # sft_weight is 1 or a divergence was taken
        loss = self.sft_weight * cross_entropy + (1 - self.sft_weight) * self._factor * divergence
        return TokenLoss(loss, cross_entropy, divergence, grad)

    def _divergence(self, logits: Mapping[str, Tensor], log_student: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return D [n] and its share of dL/dz_student: the factor (1 - sft_weight) tau_factor is already in it."""
        if self.sft_weight == 1:
            return torch.zeros_like(log_student[:, 0]), None
        plain = self.temperature == 1 and self.student.weights == {STUDENT: 1}
        log_q = log_student if plain else self.student.log_probabilities(logits, self.temperature)
        value, grad = DIVERGENCES[self.divergence](self.target.log_probabilities(logits, self.temperature), log_q)
        scale = (1 - self.sft_weight) * self._factor * self.student.student_weight / self.temperature
        return value, grad if scale == 1 else grad * scale

    @property
    def _factor(self) -> float:
        return self.temperature**2 if self.temperature_squared else 1.0

    def per_token(self, logits: Mapping[str, Tensor], labels: Tensor | None = None) -> Tensor:
        """Return the loss of each token [n], differentiable in `logits["student"]`.

        Raises ValueError if labels are missing while sft_weight is above 0.
        """
        if labels is None:
            if self.sft_weight > 0:
                raise ValueError(f"labels are missing, but sft_weight is {self.sft_weight}; pass labels [n]")
            labels = torch.zeros(len(logits[STUDENT]), dtype=torch.int64, device=logits[STUDENT].device)
        frozen = {name: values for name, values in logits.items() if name != STUDENT}
        result: Tensor = _PerToken.apply(logits[STUDENT], self, frozen, labels)
        return result


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, objective: Objective, frozen: Mapping[str, Tensor], labels: Tensor
    ) -> Tensor:
        result = objective.evaluate({**frozen, STUDENT: student}, labels)
        ctx.save_for_backward(result.grad_student)
        return result.loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_student,) = ctx.saved_tensors
        return grads[0].unsqueeze(-1) * grad_student, None, None, None


def objective(settings: Mapping[str, Any] | ObjectiveSettings) -> Objective:
    """Build an objective from a recipe's `objective:` block.

    Raises RecipeError with one line per key that cannot hold.
    """
    if not isinstance(settings, ObjectiveSettings):
        settings = _validated(settings)
    target = settings.target
    point = delta_point(target.alpha, target.anchor) if isinstance(target, DeltaTarget) else teacher_point()
    return Objective(
        target=point,
        student=Point({STUDENT: 1.0}),
        divergence=settings.divergence.name,
        sft_weight=settings.sft_weight,
        temperature=settings.temperature,
        temperature_squared=settings.temperature_squared,
        chunk_tokens=settings.chunk_tokens,
    )


def _validated(settings: Mapping[str, Any]) -> ObjectiveSettings:
    from pydantic import ValidationError

    try:
        return ObjectiveSettings.model_validate(dict(settings))
    except ValidationError as error:
        lines = [f"objective.{'.'.join(map(str, e['loc']))}: {e['msg']}, {e['input']!r}." for e in error.errors()]
        raise RecipeError("\n".join(lines)) from error
