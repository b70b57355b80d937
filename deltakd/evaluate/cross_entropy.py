"""Cross-entropy of a model on the supervised tokens of given rows: far less noisy than ROUGE, and it costs one forward.

Memory: logits exist for one chunk of tokens at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch

from deltakd.data.packing import PackedBatch
from deltakd.losses.linear import linear_loss
from deltakd.losses.objectives import objective
from deltakd.models.forward import head_weight, supervised_hidden

CHUNK_TOKENS = 512


@torch.inference_mode()
def cross_entropy_rows(model: Any, batches: Sequence[PackedBatch], vocab_size: int) -> list[float]:
    """Return every document's cross-entropy in nats per supervised token, in the batches' order."""
    sft = objective({"sft_weight": 1.0})
    head_VH = head_weight(model)[:vocab_size]
    rows: list[float] = []
    for batch in batches:
        moved = batch.to(str(head_VH.device))
        hidden_NH = supervised_hidden(model, moved, "packed")
        losses = linear_loss(hidden_NH, head_VH, {}, moved.labels, sft, CHUNK_TOKENS).token("cross_entropy")
        document = torch.searchsorted(moved.starts, moved.supervised, right=True) - 1
        sums = torch.zeros(len(moved.starts) - 1, dtype=torch.float64, device=head_VH.device)
        sums.index_add_(0, document, losses.double())
        counts = torch.bincount(document, minlength=len(sums))
        rows += (sums / counts).tolist()
    return rows
