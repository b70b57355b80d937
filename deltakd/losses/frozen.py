"""The frozen side of the chunked loss: from what frozen models sent to the frozen part of both points, chunk by chunk.

Hidden states meet their heads here. Models that share one head (fine-tuning that left it alone) are summed as hidden
states first and share one product. Float32 products are summed in place, one buffer per point.

Shapes: N supervised tokens, n tokens of a chunk, H_m hidden size of model m, V shared vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltakd.losses.objectives import Frozen, Objective
from deltakd.losses.points import STUDENT, Sampled, TopK, mix
from deltakd.losses.refusals import lowest
from deltakd.losses.settings import Weights

# What a frozen model says of N tokens: logits [N, >= V], or hidden states [N, H_m] and its head [>= V, H_m];
# of the whole target also an estimate.
Reference = Tensor | tuple[Tensor, Tensor] | TopK | Sampled
Term = tuple[float, Tensor]  # a weight and hidden states
TARGET = "target"  # the name under which references hold the whole point P


class FrozenChunks:
    """The frozen logits of one loss, a chunk at a time."""

    def __init__(
        self,
        references: Mapping[str, Reference],
        objective: Objective,
        vocab_size: int,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        """Sum hidden states that share a head, and allocate the products' buffers; dtype is that of the sums."""
        of_p, of_q = objective.weights if objective.needs and references else ({}, {})
        self._given = references.get(TARGET)
        if self._given is not None:
            of_p = {} if isinstance(self._given, TopK | Sampled) else {TARGET: 1.0}
        self._target = _PointChunks(of_p, references, vocab_size, chunk_tokens, dtype)
        self._beside = _PointChunks(of_q, references, vocab_size, chunk_tokens, dtype)

    def multiply(self, rows: slice) -> None:
        """Take the matrix products of one chunk's tokens."""
        self._target.multiply(rows)
        self._beside.multiply(rows)

    def rows(self, few: slice) -> Frozen:
        """Return both points' frozen parts for some tokens of the chunk."""
        (target, walled), (beside, beside_walled) = self._target.rows(few), self._beside.rows(few)
        estimate = self._given[few] if isinstance(self._given, TopK | Sampled) else None
        return Frozen(target if estimate is None else estimate, beside, walled or beside_walled)


class _PointChunks:
    """The frozen part of one point: products of hidden states and heads, and logits as they came."""

    def __init__(
        self,
        weights: Weights,
        references: Mapping[str, Reference],
        vocab_size: int,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        frozen = {name: weight for name, weight in weights.items() if weight != 0 and name != STUDENT}
        given = {name: references[name] for name in frozen}
        self._logits = {name: part[:, :vocab_size] for name, part in given.items() if isinstance(part, Tensor)}
        pairs = {name: part for name, part in given.items() if isinstance(part, tuple)}
        self._products = [
            (terms, head[:vocab_size])
            for terms, head in _by_head([(frozen[name], *part) for name, part in pairs.items()])
        ]
        self._weights = {name: frozen[name] for name in self._logits}
        # Float32 products are summed where they are made; 16-bit ones each keep their own, and are summed wide.
        summed = all(head.dtype == dtype for _, head in self._products)
        self._buffers = [
            torch.empty(chunk_tokens, vocab_size, dtype=head.dtype, device=head.device)
            for _, head in (self._products[:1] if summed else self._products)
        ]
        self._start = 0

    def multiply(self, rows: slice) -> None:
        self._start = rows.start
        num = rows.stop - rows.start
        for index, (terms, head) in enumerate(self._products):
            hidden = _sum_hidden(terms, rows, head.dtype)
            if index < len(self._buffers):
                torch.mm(hidden, head.T, out=self._buffers[index][:num])
            else:
                self._buffers[0][:num].addmm_(hidden, head.T)

    def rows(self, few: slice) -> tuple[Tensor | None, bool]:
        """Return the weighted sum for some tokens of the chunk, and whether a logit is -inf."""
        terms = {name: logits[few] for name, logits in self._logits.items()}
        has_walls = any(lowest(name, values) == -torch.inf for name, values in terms.items())
        here = slice(few.start - self._start, few.stop - self._start)
        products = {f"product {index}": buffer[here] for index, buffer in enumerate(self._buffers)}
        return mix(self._weights | dict.fromkeys(products, 1.0), terms | products), has_walls


def _by_head(pairs: list[tuple[float, Tensor, Tensor]]) -> list[tuple[list[Term], Tensor]]:
    """Group (weight, hidden states, head) by head."""
    groups: dict[tuple[Any, ...], tuple[list[Term], Tensor]] = {}
    for weight, hidden, head in pairs:
        same = (head.data_ptr(), head.shape, head.stride(), head.dtype)
        groups.setdefault(same, ([], head))[0].append((weight, hidden))
    return list(groups.values())


def _sum_hidden(terms: list[Term], rows: slice, dtype: torch.dtype) -> Tensor:
    """Return the weighted hidden states of a chunk [n, H_m] in the head's precision, summed in float32 or wider."""
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1][rows].to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    total = terms[0][0] * terms[0][1][rows].to(wide)
    for weight, hidden in terms[1:]:
        total.add_(hidden[rows].to(wide), alpha=weight)
    return total.to(dtype)
