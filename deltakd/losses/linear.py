"""The chunked loss: from hidden states and a head to a loss sum and both gradients, never holding [N, V].

It walks over chunks of tokens: form the student's logits and the frozen ones, take value and dL/dz in closed form, and
fold dL/dz at once into the gradients of hidden states and head. Matrix products take whole chunks, for their speed;
everything element-wise takes a few rows at a time, so that it stays in the processor's cache, and dL/dz overwrites the
student's logits. Beyond inputs and their gradients that is at most three [chunk_tokens, V] buffers in float32, whatever
N is. The gradients are computed in the forward pass and handed out in the backward pass.

Shapes: N supervised tokens, n tokens of a chunk, H hidden size of the student, V shared vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltakd.base.errors import LossError
from deltakd.losses.fit import refuse_broken_heads, refuse_unfit
from deltakd.losses.frozen import FrozenChunks, Reference
from deltakd.losses.objectives import STATISTICS, Objective
from deltakd.losses.policy import Draws

__all__ = ["LinearLoss", "Reference", "linear_loss"]

# Elements of one element-wise block: 2 MiB in float32, a processor core's share of cache.
_BLOCK_ELEMENTS = 2**19
# Rows of a head whose gradient is taken at a time in 16 bit, before it is added to the wide sum.
_HEAD_ROWS = 2**14


@cache
def _keep_freed_memory() -> None:
    """Have the C library keep freed blocks for the next ones: a time's matter, a third of the element-wise part.

    glibc gives memory above twice the largest mapping that was freed back to the kernel, which then has to map and zero
    every block anew (mallopt(3), M_MMAP_THRESHOLD: dynamic, up to 32 MiB). Freeing 31 MiB once makes that 62 MiB.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


@dataclass(frozen=True)
class LinearLoss:
    """The sum over tokens, a float64 scalar with gradients, and what every token's loss is made of.

    `statistics` [len(STATISTICS), N] holds per token, in the order of `losses.objectives.STATISTICS`: loss,
    cross-entropy, policy loss, divergence, KL to the target, the student's and the target's entropy, and the mass of
    both on the target's top k. NaN where an objective has no such number.
    """

    total: Tensor
    statistics: Tensor = field(repr=False)

    def token(self, name: str) -> Tensor:
        """Return one statistic of every token [N]; raises LossError for a name that is none of STATISTICS."""
        if name not in STATISTICS:
            raise LossError(f"statistics: {name} is not known. Write one of {', '.join(STATISTICS)}.")
        return self.statistics[STATISTICS.index(name)]

    def sum(self, name: str) -> float:
        """Return the sum of one statistic over tokens, taken in float64."""
        return float(self.token(name).sum(dtype=torch.float64))


def linear_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    references: Mapping[str, Reference],
    labels_N: Tensor | None,
    objective: Objective,
    chunk_tokens: int | None = None,
    draws: Draws | None = None,
) -> LinearLoss:
    """Return the objective's sum over N tokens, with gradients for the student's hidden states and head.

    `references` says, by model name, what each frozen model that the objective needs says of the N tokens: logits
    [N, >= V] or (hidden states [N, H_m], head [>= V, H_m]). `target` stands for the whole target: its summed logits,
    TopK or Sampled. The shared vocabulary is the number of rows of `head_VH`; wider references are cut to it before
    anything is normalised (docs/objectives.md: vocabulary). N may be 0: the total and the gradients are then 0,
    whatever the references. `chunk_tokens` (default: the objective's own) changes memory, not results.
    `draws` [N]: the labels are tokens that the student drew.

    Raises LossError for references or labels that are missing, do not fit or are not numbers.
    """
    refuse_unfit(hidden_NH, head_VH, references, labels_N, objective, draws is not None)
    chunk_tokens = objective.chunk_tokens if chunk_tokens is None else chunk_tokens
    if type(chunk_tokens) is not int or chunk_tokens < 1:
        raise LossError(f"chunk_tokens: {chunk_tokens!r}. Write a whole number above 0.")
    if labels_N is None:
        labels_N = torch.zeros(len(hidden_NH), dtype=torch.int64, device=hidden_NH.device)
    if draws is not None and {len(draws.log_probs), len(draws.weights), len(draws.advantages)} != {len(labels_N)}:
        raise LossError(
            f"draws: of {len(draws.log_probs):,} tokens, labels of {len(labels_N):,}. Pass the same tokens."
        )
    parts = (hidden_NH, head_VH, dict(references), labels_N, objective, chunk_tokens, draws)
    total, statistics = _LinearLoss.apply(*parts)
    if not torch.isfinite(total):
        refuse_broken_heads(references)
    return LinearLoss(total, statistics)


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
        draws: Draws | None,
    ) -> tuple[Tensor, Tensor]:
        num_tokens, vocab_size = len(hidden_NH), len(head_VH)
        wide = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head_VH, dtype=wide) if ctx.needs_input_grad[1] else None
        statistics = torch.full((len(STATISTICS), num_tokens), torch.nan, dtype=wide, device=hidden_NH.device)
        chunk_tokens = min(chunk_tokens, max(num_tokens, 1))
        block = chunk_tokens
        if hidden_NH.device.type == "cpu":
            _keep_freed_memory()
            block = max(1, min(_BLOCK_ELEMENTS // vocab_size, chunk_tokens // 16))
        if num_tokens:  # a rank without supervised tokens asks nobody, and has no references
            reads = objective.reads_frozen(draws is not None)
            frozen = FrozenChunks(references if reads else {}, objective, vocab_size, chunk_tokens, wide)
        logits = torch.empty(chunk_tokens, vocab_size, dtype=head_VH.dtype, device=head_VH.device)
        for start in range(0, num_tokens, chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, num_tokens))
            chunk = torch.mm(hidden_NH[rows], head_VH.T, out=logits[: rows.stop - start])
            frozen.multiply(rows)
            for first in range(start, rows.stop, block):
                few = slice(first, min(first + block, rows.stop))
                own = chunk[first - start : few.stop - start]
                token = objective.evaluate(
                    own.to(wide), labels_N[few], frozen.rows(few), None if draws is None else draws[few]
                )
                for name, values in token.statistics.items():
                    statistics[STATISTICS.index(name), few] = values
                own.copy_(token.grad_student)
            if grad_hidden is not None:
                torch.mm(chunk, head_VH, out=grad_hidden[rows])
            if grad_head is not None:
                _add_product(grad_head, chunk, hidden_NH[rows])
        ctx.grads, ctx.head_dtype = (grad_hidden, grad_head), head_VH.dtype
        ctx.mark_non_differentiable(statistics)
        return statistics[STATISTICS.index("loss")].sum(dtype=torch.float64), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise LossError("linear_loss: its gradients were handed out before. Call backward with retain_graph=True.")
        # Scaled in place and let go, unless another backward pass was announced: a copy of the head would be gigabytes.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = [_scale(grad, grads[0], in_place=not kept) for grad in ctx.grads]
        if not kept:
            ctx.grads = None
        grad_hidden, grad_head = scaled
        return grad_hidden, None if grad_head is None else grad_head.to(ctx.head_dtype), *(None,) * 5


def _scale(grad: Tensor | None, factor: Tensor, in_place: bool) -> Tensor | None:
    if grad is None or not in_place:
        return None if grad is None else grad * factor.to(grad.dtype)
    if factor.device.type == "cpu" and factor == 1:  # a pass over the head's gradient that changes nothing
        return grad
    return grad.mul_(factor.to(grad.dtype))


def _add_product(total_VH: Tensor, grad_nV: Tensor, hidden_nH: Tensor) -> None:
    if total_VH.dtype == hidden_nH.dtype:
        total_VH.addmm_(grad_nV.T, hidden_nH)
        return
    # 16-bit inputs: each product is 16 bit, their sum over chunks is not. Slices bound the 16-bit product's memory.
    for rows in (slice(start, start + _HEAD_ROWS) for start in range(0, len(total_VH), _HEAD_ROWS)):
        total_VH[rows].add_(grad_nV[:, rows].T @ hidden_nH)
