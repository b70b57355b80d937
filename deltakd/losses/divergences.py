"""Divergences D(P, Q) between a frozen point P and a point Q that holds the student, with their gradients.

A divergence is one function of two points that returns its value [n] and dD/dz_Q [n, V], z_Q being the logits of Q
after the temperature. That gradient is all the backward pass there is: with d = dD/dq it is q (d - sum q d). Formulas,
bounds and sources: docs/objectives.md.

Shapes: n tokens, V outcomes: the shared vocabulary, or k tokens and one bucket for the rest.
"""

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

# Stands for log 0: finite, so that 0 * log 0 is 0, and so low that its exponential is 0 in float64.
LOG_ZERO = -1e30
# A nucleus is looked for among so many tokens first: a sort of 150,000 takes longer than all else together.
_NUCLEUS = 1024


class Points:
    """The two distributions at n tokens; what several divergences and the statistics use is computed once."""

    def __init__(self, log_p: Tensor, log_q: Tensor, q: Tensor, log_ratio_clip: float | None = None) -> None:
        """log_p and log_q = log(q) [n, V] are normalised; LOG_ZERO stands for an outcome without mass."""
        self.log_p, self.log_q, self.q = log_p, log_q, q
        self._clip = log_ratio_clip

    @cached_property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @cached_property
    def log_ratio(self) -> Tensor:
        """Return log q/p."""
        return self.log_q - self.log_p

    @cached_property
    def kl(self) -> Tensor:
        """Return KL(P, Q) [n]."""
        return -dot(self.p, self.log_ratio)

    def clipped(self, log_ratio: Tensor) -> Tensor:
        return log_ratio if self._clip is None else log_ratio.clamp(-self._clip, self._clip)


def dot(weights: Tensor, values: Tensor) -> Tensor:
    """Return sum over outcomes of weights * values [n]."""
    if weights.device.type == "cpu" and 0 < len(weights) <= 4:  # one pass each, where vecdot writes the products first
        return torch.stack([torch.dot(*pair) for pair in zip(weights, values, strict=True)])
    return torch.linalg.vecdot(weights, values)


def _through_softmax(q: Tensor, derivative: Tensor) -> Tensor:
    """Return dD/dz = q (d - sum q d) for d = dD/dq."""
    return q * (derivative - dot(q, derivative).unsqueeze(-1))


def forward_kl(points: Points) -> tuple[Tensor, Tensor]:
    """KL(P, Q), the true one, zero at equality; gradient q - p, bounded. Source: 1503.02531."""
    return points.kl, points.q - points.p


def reverse_kl(points: Points) -> tuple[Tensor, Tensor]:
    """KL(Q, P); gradient q (log q/p - KL(Q, P)), unbounded where P has little mass. Source: 2306.08543."""
    value = dot(points.q, points.log_ratio)
    return value, _through_softmax(points.q, points.clipped(points.log_ratio))


def reverse_cross_entropy(points: Points) -> tuple[Tensor, Tensor]:
    """-sum q log p = KL(Q, P) + H(Q): the reward E_q[log p], with the sign of a loss; least where P is largest.

    No divergence in the strict sense: it is not 0 at equality. Source: OPD^2, 2607.15161.
    """
    return -dot(points.q, points.log_p), _through_softmax(points.q, -points.log_p)


def jsd(points: Points, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(P, M) + (1 - beta) KL(Q, M), M = beta P + (1 - beta) Q. Source: GKD, 2306.13649."""
    log_m = _log_mix(points.log_p, points.log_q, beta)
    to_m = points.log_q - log_m
    value = beta * dot(points.p, points.log_p - log_m) + (1 - beta) * dot(points.q, to_m)
    return value, (1 - beta) * _through_softmax(points.q, to_m)


def skew_kl(points: Points, lam: float) -> tuple[Tensor, Tensor]:
    """KL(P, lam P + (1 - lam) Q). Source: DistiLLM, 2402.03898."""
    from_m = points.log_p - _log_mix(points.log_p, points.log_q, lam)  # at most log 1/lam
    return dot(points.p, from_m), _through_softmax(points.q, (lam - 1) * from_m.exp())


def skew_reverse_kl(points: Points, lam: float) -> tuple[Tensor, Tensor]:
    """KL(Q, lam Q + (1 - lam) P). Source: DistiLLM, 2402.03898."""
    from_m = points.log_q - _log_mix(points.log_q, points.log_p, lam)  # at most log 1/lam
    return dot(points.q, from_m), _through_softmax(points.q, from_m - lam * from_m.exp())


def symmetric_kl(points: Points, weight: float) -> tuple[Tensor, Tensor]:
    """weight KL(P, Q) + (1 - weight) KL(Q, P)."""
    return _both(points, torch.full_like(points.kl, weight))


def tvd(points: Points) -> tuple[Tensor, Tensor]:
    """Half of sum |p - q|; where p = q it has a corner, and 0 is taken as its slope."""
    gap = points.q - points.p
    return gap.abs().sum(-1) / 2, _through_softmax(points.q, gap.sign() / 2)


def adaptive_kl(points: Points, mu: float) -> tuple[Tensor, Tensor]:
    """Forward and reverse KL by the gaps |p - q| on P's head and tail, detached. Source: AKL, 2404.02657."""
    gap = (points.p - points.q).abs()
    head = torch.where(nucleus(points.p, mu), gap, 0).sum(-1)
    whole = gap.sum(-1)
    return _both(points, torch.where(whole == 0, 0.5, head / whole.clamp_min(torch.finfo(whole.dtype).tiny)))


def _both(points: Points, forward: Tensor) -> tuple[Tensor, Tensor]:
    """Return forward * KL(P, Q) + (1 - forward) * KL(Q, P), forward [n] held fixed."""
    (there, grad_there), (back, grad_back) = forward_kl(points), reverse_kl(points)
    share = forward.unsqueeze(-1)
    return forward * there + (1 - forward) * back, share * grad_there + (1 - share) * grad_back


def _log_mix(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """Return log(weight a + (1 - weight) b)."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def nucleus(p: Tensor, mass: float) -> Tensor:
    """Mark the smallest set of most probable outcomes that holds `mass` of p [n, V]; the first is always in."""
    num = min(_NUCLEUS, p.shape[-1])
    values, order = p.topk(num, dim=-1)
    kept = values.double().cumsum(-1) - values < mass
    if num < p.shape[-1] and bool(kept[:, -1].any()):
        values, order = p.sort(dim=-1, descending=True)
        kept = values.double().cumsum(-1) - values < mass
    return torch.zeros_like(p, dtype=torch.bool).scatter_(-1, order, kept)


DIVERGENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "reverse_cross_entropy": reverse_cross_entropy,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "symmetric_kl": symmetric_kl,
    "tvd": tvd,
    "adaptive_kl": adaptive_kl,
}
