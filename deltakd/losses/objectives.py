"""Objectives: L = sft_weight * CE(labels, student) + (1 - sft_weight) * tau_factor * D(P, Q), per token.

P is the frozen point, Q the point that holds the student; cross-entropy is always at temperature 1. `evaluate` gives
value and dL/dz_student in closed form; `per_token` wraps the same lines for autograd. No ranks, no recipe, no sockets.

Shapes: n tokens, V shared vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltakd.base.errors import LossError
from deltakd.losses.block import read_block
from deltakd.losses.divergences import DIVERGENCES, LOG_ZERO, Points, dot, nucleus
from deltakd.losses.points import STUDENT, Sampled, TopK, log_probabilities, mix, restrict, widen
from deltakd.losses.policy import Draws, policy_loss
from deltakd.losses.policy_settings import PolicyGradient
from deltakd.losses.refusals import lowest, refuse_labels, refuse_missing
from deltakd.losses.settings import (
    LOG_OF_TARGET,
    ObjectiveSettings,
    Weights,
    needed_references,
    point_weights,
    start_alpha,
)

# Per-token numbers beside the gradient, in the order of LinearLoss.statistics.
STATISTICS = (
    "loss",
    "cross_entropy",
    "policy",
    "divergence",
    "kl_to_target",
    "student_entropy",
    "target_entropy",
    "student_top_k",
    "target_top_k",
)


@dataclass(frozen=True)
class Frozen:
    """What the frozen models say of n tokens, summed by point: logits [n, V], or an estimate of the target."""

    target: Tensor | TopK | Sampled | None = None  # of P; None where P is the student alone
    beside: Tensor | None = None  # of Q, beside the student
    has_walls: bool = False  # some logit is -inf


@dataclass(frozen=True)
class TokenLoss:
    """What an objective says of n tokens: those STATISTICS [n] that it has, and dL/dz_student [n, V]."""

    statistics: Mapping[str, Tensor]
    grad_student: Tensor


@dataclass(frozen=True)
class Objective:
    """One loss on tokens: a divergence from the target to the student, and a share of plain cross-entropy."""

    settings: ObjectiveSettings
    alpha: float  # the target's moving number at this step

    def at(self, alpha: float) -> "Objective":
        """Return the objective with its target at another alpha (of TAID: at another t).

        Targets that hold no such number stay as they are; `needs` speaks of the settings' alphas.
        """
        return self if alpha == self.alpha else replace(self, alpha=alpha)

    @cached_property
    def weights(self) -> tuple[Weights, Weights]:
        """The models' weights in P and in Q; the student in P is held fixed."""
        return point_weights(self.settings.target, self.alpha)

    @property
    def needs(self) -> frozenset[str]:
        """The frozen models whose logits it uses, at any alpha of its schedule and at its own."""
        needed = needed_references(self.settings)
        now = {name for weights in self.weights for name, weight in weights.items() if weight and name != STUDENT}
        return needed | now if needed else needed

    def reads_frozen(self, drawn: bool) -> bool:
        """Tell whether the loss of tokens is taken from frozen models; that of drawn ones may be from advantages."""
        policy = self.settings.policy_gradient
        return bool(self.needs) and not (drawn and policy is not None and not policy.divergence_weight)

    @property
    def chunk_tokens(self) -> int:
        """For how many tokens logits exist at a time."""
        return self.settings.chunk_tokens

    def evaluate(self, student: Tensor, labels: Tensor, frozen: Frozen, draws: Draws | None = None) -> TokenLoss:
        """Return the loss of n tokens and its gradient for the student's logits [n, V], float32 or float64.

        With `draws` the labels are tokens that the student drew, which learn by `policy_gradient` where that is set.
        """
        if draws is not None and self.settings.policy_gradient is not None:
            return self._of_policy(student, labels, frozen, draws, self.settings.policy_gradient)
        sft_weight = self.settings.sft_weight
        log_student = torch.log_softmax(student, dim=-1)
        rows = torch.arange(len(labels), device=labels.device)
        cross_entropy = -log_student[rows, labels]
        probabilities = log_student.exp()
        parts = {"cross_entropy": cross_entropy}
        grad: Tensor | None = None
        if sft_weight < 1:
            parts_of_divergence, grad = self._divergence(student, log_student, probabilities, frozen)
            parts |= parts_of_divergence
        parts["student_entropy"] = -dot(probabilities, log_student)
        divergence = parts.setdefault("divergence", torch.zeros_like(cross_entropy))
        parts["loss"] = sft_weight * cross_entropy + (1 - sft_weight) * self._factor * divergence
        if sft_weight > 0:
            probabilities[rows, labels] -= 1
            grad = sft_weight * probabilities if grad is None else grad.add_(probabilities, alpha=sft_weight)
        assert grad is not None  # sft_weight is 1 or a divergence was taken
        return TokenLoss(parts, grad)

    def _of_policy(
        self, student: Tensor, labels: Tensor, frozen: Frozen, draws: Draws, settings: PolicyGradient
    ) -> TokenLoss:
        """Return the policy loss of drawn tokens, with `divergence_weight` of the divergence."""
        log_student = torch.log_softmax(student, dim=-1)
        rows = torch.arange(len(labels), device=labels.device)
        log_q = log_student[rows, labels]
        loss, slope = policy_loss(log_q, draws, settings)
        probabilities = log_student.exp()
        parts = {"cross_entropy": -log_q, "student_entropy": -dot(probabilities, log_student), "policy": loss}
        grad = probabilities * -slope.unsqueeze(-1)
        grad[rows, labels] += slope
        if settings.divergence_weight:
            more, of_divergence = self._divergence(student, log_student, probabilities, frozen)
            parts |= more
            loss = loss + settings.divergence_weight * self._factor * parts["divergence"]  # sft_weight is 0
            grad.add_(of_divergence, alpha=settings.divergence_weight)
        return TokenLoss(parts | {"loss": loss}, grad)

    def _divergence(
        self, student: Tensor, log_student: Tensor, probabilities: Tensor, frozen: Frozen
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return D and its kin [n], and the divergence's share of dL/dz_student, all factors in it."""
        temperature = self.settings.temperature
        of_p, of_q = (weights.get(STUDENT, 0.0) for weights in self.weights)
        plain = temperature == 1 and of_q == 1 and frozen.beside is None
        log_q = log_student if plain else log_probabilities(frozen.beside, student, of_q, temperature)
        q = probabilities if plain else log_q.exp()
        if isinstance(frozen.target, Sampled):
            parts, grad = _of_draws(frozen.target, log_q, q)
        elif isinstance(frozen.target, TopK):
            parts, grad = self._of_buckets(frozen.target, log_q, q, frozen.has_walls)
        else:
            log_p = log_probabilities(frozen.target, student, of_p, temperature)
            parts, grad = self._of_points(log_p, log_q, q, frozen.has_walls)
        scale = (1 - self.settings.sft_weight) * self._factor * of_q / temperature
        return parts, grad if scale == 1 else grad.mul_(scale)

    def _of_points(self, log_p: Tensor, log_q: Tensor, q: Tensor, has_walls: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Return D, KL and P's entropy [n], and dD/dz_Q over the same outcomes; q is exp(log_q)."""
        settings, given = self.settings, log_q
        if has_walls:
            log_p, log_q = self._inside_walls(log_p, log_q)
        if settings.support is not None and settings.support.top_p < 1:
            kept = nucleus(log_p.exp(), settings.support.top_p)
            log_p, log_q = restrict(log_p, kept), restrict(log_q, kept)
        points = Points(log_p, log_q, q if log_q is given else log_q.exp(), settings.log_ratio_clip)
        parameters = settings.divergence.model_dump(exclude={"name"})
        value, grad = DIVERGENCES[settings.divergence.name](points, **parameters)
        # A divergence is never negative; where the points are equal to the last bits, rounding may say otherwise.
        parts = {"divergence": value.clamp_min(0), "kl_to_target": points.kl.clamp_min(0)}
        return parts | {"target_entropy": -dot(points.p, log_p)}, grad

    def _inside_walls(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Write LOG_ZERO for -inf, and leave out what would make the divergence infinite.

        A token without mass in Q leaves P; one without mass in P leaves Q only where reverse KL asks for log q/p.
        """
        some_p, some_q = log_p > -torch.inf, log_q > -torch.inf
        kept = some_p & some_q
        if not kept.any(-1).all():
            bad = int((~kept.any(-1)).sum())
            raise LossError(
                f"references: at {bad:,} tokens frozen models rule out everything between them. Look at them."
            )
        if not some_q.all():
            log_p = restrict(log_p, kept)
        if self.settings.divergence.name in LOG_OF_TARGET and not some_p.all():
            log_q = restrict(log_q, kept)
        return log_p.clamp_min(LOG_ZERO), log_q.clamp_min(LOG_ZERO)

    def _of_buckets(self, target: TopK, log_q: Tensor, q: Tensor, has_walls: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Take the divergence over k + 1 outcomes, the last being all other tokens, and spread its gradient."""
        log_p = torch.log_softmax(torch.cat([widen(target.log_probs), _tail(target)], dim=-1).to(log_q.dtype), dim=-1)
        log_rest = log_q.scatter(-1, target.ids, -torch.inf).logsumexp(-1, keepdim=True)
        buckets = torch.cat([log_q.gather(-1, target.ids), log_rest], dim=-1)
        walls = has_walls or bool(torch.isneginf(log_p).any()) or target.ids.shape[-1] == log_q.shape[-1]
        parts, grad = self._of_points(log_p, buckets, buckets.exp(), walls)
        # Inside a bucket the student's own proportions are kept: each token takes q_token / q_bucket of its gradient.
        rest = log_rest.exp()
        share = torch.where(rest > 0, grad[:, -1:] / rest.clamp_min(torch.finfo(rest.dtype).tiny), 0)
        whole = (q * share).scatter_(-1, target.ids, grad[:, :-1])
        parts["student_top_k"], parts["target_top_k"] = 1 - rest[:, 0], 1 - log_p[:, -1].exp()
        return parts, whole

    @property
    def _factor(self) -> float:
        return self.settings.temperature**2 if self.settings.temperature_squared else 1.0

    def per_token(
        self, logits: Mapping[str, Tensor], labels: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        """Return the loss of each token [n], differentiable in `logits["student"]`.

        logits [n, V] by model name, `student` among them; float64 if the student's are, else float32. Raises LossError
        if a model that the objective needs, or labels while sft_weight is above 0, are missing or do not fit.
        """
        student = logits.get(STUDENT)
        if student is None or student.dim() != 2 or not student.is_floating_point():
            raise LossError(f"student: logits [n, V] are missing or not of that form; given: {', '.join(logits)}.")
        if labels is None:
            if draws is not None:
                raise LossError("labels: missing. Pass the tokens that were drawn [n].")
            if self.settings.sft_weight > 0:
                raise LossError(f"labels: missing, but sft_weight is {self.settings.sft_weight:g}. Pass labels [n].")
            labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
        refuse_labels(labels, *student.shape)
        refuse_missing(self.needs, logits)
        used = {name: logits[name] for name in sorted(self.needs)}
        for name, values in used.items():
            if values.shape != student.shape:
                raise LossError(
                    f"{name}: logits {list(values.shape)}, student {list(student.shape)}. Cut both to one V."
                )
        target, beside = (mix(weights, used) for weights in self.weights)
        has_walls = any(lowest(name, values) == -torch.inf for name, values in used.items())
        result: Tensor = _PerToken.apply(student, self, labels, Frozen(target, beside, has_walls), draws)
        return result


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, objective: Objective, labels: Tensor, frozen: Frozen, draws: Draws | None
    ) -> Tensor:
        result = objective.evaluate(widen(student), labels, frozen, draws)
        ctx.save_for_backward(result.grad_student)
        ctx.dtype = student.dtype
        return result.statistics["loss"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_student,) = ctx.saved_tensors
        return (grads[0].unsqueeze(-1) * grad_student).to(ctx.dtype), *(None,) * 4


def _of_draws(target: Sampled, log_q: Tensor, q: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the cross-entropy to draws from P, whose gradient estimates that of KL(P, Q) without bias."""
    weights = target.weights
    if weights is None:
        weights = torch.full_like(target.ids, 1 / target.ids.shape[-1], dtype=log_q.dtype)
    weights = weights.to(log_q.dtype)
    value = -dot(weights, log_q.gather(-1, target.ids))
    grad = (q * weights.sum(-1, keepdim=True)).scatter_add_(-1, target.ids, -weights)
    return {"divergence": value}, grad


def _tail(target: TopK) -> Tensor:
    if target.log_tail is None:
        return torch.full_like(widen(target.log_probs[:, :1]), -torch.inf)
    return widen(target.log_tail).unsqueeze(-1)


def objective(settings: Mapping[str, Any] | ObjectiveSettings) -> Objective:
    """Build an objective from a recipe's `objective:` block.

    Raises RecipeError with one line per key that cannot hold.
    """
    if not isinstance(settings, ObjectiveSettings):
        settings = read_block(settings)
    return Objective(settings, start_alpha(settings.target))
