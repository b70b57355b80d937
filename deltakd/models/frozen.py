"""A frozen model that answers for supervised positions: what a teacher rank serves and an in-process reference calls.

An answer is a function of its request alone: requests are never merged into a bigger forward, so the numbers do not
depend on how many teachers there are or which of them answered.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from deltakd.models.forward import Batch, Layout, head_weight, supervised_hidden

PayloadKind = Literal["hidden", "logits"]


@dataclass(frozen=True)
class PayloadSpec:
    """What a frozen model sends for each supervised token."""

    kind: PayloadKind
    dtype: str
    layout: Layout
    vocab_size: int

    def width(self, hidden_size: int) -> int:
        """Numbers per token."""
        return hidden_size if self.kind == "hidden" else self.vocab_size

    def bytes_per_token(self, hidden_size: int) -> int:
        """Bytes per supervised token."""
        return self.width(hidden_size) * getattr(torch, self.dtype).itemsize


@torch.inference_mode()
def payload(model: nn.Module, batch: Batch, spec: PayloadSpec) -> Tensor:
    """Return a frozen model's answer [N, width] in the payload's dtype.

    hidden: the last hidden states, from which the student's side recomputes the logits. logits: over the shared
    vocabulary. A value that the payload's dtype cannot hold becomes inf here; `count_bad` finds it.
    """
    hidden_NH = supervised_hidden(model, batch, spec.layout)
    if spec.kind == "logits":
        hidden_NH = hidden_NH @ head_weight(model)[: spec.vocab_size].T
    return hidden_NH.to(getattr(torch, spec.dtype))


def count_bad(values: Tensor) -> int:
    """Count the numbers that are NaN or infinite."""
    return int(values.numel() - torch.isfinite(values).sum())
