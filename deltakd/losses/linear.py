"""The chunked loss: from hidden states and a head to a loss sum and both gradients, never holding [N, V].

It walks over chunks of tokens: form the student's logits and the frozen ones, take value and dL/dz in closed form, and
fold dL/dz at once into the gradients of hidden states and head. Peak memory beyond inputs and their gradients is
O(chunk_tokens x V). The gradients are computed in the forward pass and handed out in the backward pass.

Shapes: N supervised tokens, n tokens of a chunk, H hidden size of the student, V shared vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltakd.losses.objectives import Objective
from deltakd.losses.points import STUDENT, widen

# What a frozen model says of N tokens: logits [N, >= V], or hidden states [N, H_m] and its head [>= V, H_m].
Reference = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LinearLoss:
    """Sums over tokens, float64 scalars: `total` carries the gradients, the parts are for the record."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def linear_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    references: Mapping[str, Reference],
    labels_N: Tensor,
    objective: Objective,
    chunk_tokens: int | None = None,
) -> LinearLoss:
    """Return the objective's sum over N tokens, with gradients for the student's hidden states and head.

    The shared vocabulary is the number of rows of `head_VH`; a reference with more columns or rows is cut to it before
    anything is normalised (mathematics: vocabulary). N may be 0: the total is then 0 and so are the gradients.
    `chunk_tokens` (default: the objective's own) changes memory, not results.
    """
    total, cross_entropy, divergence = _LinearLoss.apply(
        hidden_NH, head_VH, dict(references), labels_N, objective, chunk_tokens or objective.chunk_tokens
    )
    return LinearLoss(total, cross_entropy, divergence)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        references: dict[str, Reference],
        labels_N: Tensor,
        objective: Objective,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head_VH, dtype=wide) if ctx.needs_input_grad[1] else None
        # Sums in float64: the reported loss does not depend on the chunk size beyond the tokens' own rounding.
        sums = torch.zeros(3, dtype=torch.float64, device=hidden_NH.device)
        for start in range(0, len(hidden_NH), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = {name: _frozen_logits(reference, rows, len(head_VH)) for name, reference in references.items()}
            logits[STUDENT] = hidden_NH[rows] @ head_VH.T
            chunk = objective.evaluate(logits, labels_N[rows])
            sums += torch.stack(
                [part.sum(dtype=torch.float64) for part in (chunk.loss, chunk.cross_entropy, chunk.divergence)]
            )
            grad_logits = chunk.grad_student.to(head_VH.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, head_VH, out=grad_hidden[rows])
            if grad_head is not None:
                _add_product(grad_head, grad_logits, hidden_NH[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head_VH.dtype
        total, cross_entropy, divergence = sums.unbind()
        outputs = total.clone(), cross_entropy.clone(), divergence.clone()
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_head is None else (grad_head * scale.to(grad_head.dtype)).to(ctx.head_dtype),
            *(None,) * 4,
        )


def _frozen_logits(reference: Reference, rows: slice, vocab_size: int) -> Tensor:
    if isinstance(reference, Tensor):
        return widen(reference[rows, :vocab_size])
    hidden, head = reference
    return widen(hidden[rows].to(head.dtype) @ head[:vocab_size].T)


def _add_product(total_VH: Tensor, grad_nV: Tensor, hidden_nH: Tensor) -> None:
    if total_VH.dtype == hidden_nH.dtype:
        total_VH.addmm_(grad_nV.T, hidden_nH)
    else:  # 16-bit inputs: each product is 16 bit, their sum over chunks is not
        total_VH.add_(grad_nV.T @ hidden_nH)
