"""Divergences D(P, Q) between a frozen point P and a point Q that holds the student, with their gradients.

A divergence is one function of two log-distributions [n, V] that returns its value [n] and dD/dz_Q [n, V], z_Q being
the logits of Q after the temperature. That gradient is all the backward pass there is. Rows of the table in
docs/objectives.md give formula, bound and source.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(P, Q), the true one, zero at equality; gradient q - p, bounded. Source: Hinton et al., 1503.02531."""
    p = log_p.exp()
    return _expectation(p, log_p - log_q), log_q.exp() - p


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(Q, P); gradient q (log q/p - KL(Q, P)), unbounded where P has no mass. Source: MiniLLM, 2306.08543."""
    q = log_q.exp()
    ratio = log_q - log_p
    value = _expectation(q, ratio)
    return value, torch.where(q == 0, 0.0, q * (ratio - value.unsqueeze(-1)))


def _expectation(weights: Tensor, values: Tensor) -> Tensor:
    # 0 * inf is 0 here: a token without mass adds nothing, whatever the other side thinks of it.
    return torch.where(weights == 0, 0.0, weights * values).sum(-1)


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}
