"""Points: distributions that are log-linear in the models, P(w) = softmax(sum_m w_m z_m / tau).

Softmax ignores additive constants, so no model's own normaliser is computed: a point costs one weighted sum of logits
and one log-softmax, however many models it mixes. Everything is in log space; ratios of probabilities raised to a power
overflow where this does not.

A token that a frozen model rules out (a logit of -inf) has no mass in a point that mixes the model, whatever the sign
of its weight: the ratio of two distributions is only used where both are defined.

Shapes: n tokens of a chunk, V shared vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltakd.losses.divergences import LOG_ZERO

STUDENT = "student"


@dataclass(frozen=True)
class TopK:
    """The k most probable tokens of the target P at N tokens, as `references["target"]`.

    ids [N, k] without repeats; log_probs [N, k] of P at the objective's temperature; log_tail [N] is the log of the
    mass of all other tokens, or None: then P is what it is on the k tokens, renormalised.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor | None = None

    def __getitem__(self, rows: slice) -> "TopK":
        return TopK(self.ids[rows], self.log_probs[rows], None if self.log_tail is None else self.log_tail[rows])


@dataclass(frozen=True)
class Sampled:
    """Draws from the target P at N tokens, as `references["target"]`.

    ids [N, m], repeats allowed; weights [N, m] are each draw's share (counts divided by the number of draws), None for
    1/m each. They estimate cross-entropy without bias, and nothing else.
    """

    ids: Tensor
    weights: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Sampled":
        return Sampled(self.ids[rows], None if self.weights is None else self.weights[rows])


def mix(weights: Mapping[str, float], logits: Mapping[str, Tensor]) -> Tensor | None:
    """Sum the logits [n, V] of the frozen models by weight, in float32 or wider; None if there is none.

    A weight of 0 leaves a model out: 0 * -inf is not 0.
    """
    total: Tensor | None = None
    for name, weight in weights.items():
        if name == STUDENT or weight == 0:
            continue
        term = widen(logits[name])
        if weight != 1:
            term = weight * term
        if weight < 0:
            term = term.masked_fill_(term == torch.inf, -torch.inf)
        total = term if total is None else total + term
    return total


def log_probabilities(frozen: Tensor | None, student: Tensor, student_weight: float, temperature: float) -> Tensor:
    """Return log P [n, V] of frozen + student_weight * student, with -inf where it has no mass."""
    total = None if frozen is None else frozen.to(student.dtype)
    if student_weight:
        own = student if student_weight == 1 else student_weight * student
        total = own if total is None else total + own
    assert total is not None  # a point mixes at least one model
    return torch.log_softmax(total if temperature == 1 else total / temperature, dim=-1)


def restrict(log_p: Tensor, kept: Tensor) -> Tensor:
    """Return log P [n, V] on the outcomes that are kept, renormalised; LOG_ZERO elsewhere."""
    inside = log_p.masked_fill(~kept, -torch.inf)
    return (inside - inside.logsumexp(-1, keepdim=True)).masked_fill(~kept, LOG_ZERO)


def widen(values: Tensor) -> Tensor:
    """Return values in float32, or as they are if they are wider."""
    return values if values.dtype == torch.float64 else values.float()
