"""Cross-entropy of a model, and its KL divergence from a teacher or a target, on the supervised tokens of given rows.

Far less noisy than ROUGE, and each costs one forward of the models it speaks of. Memory: logits exist for one chunk of
tokens at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltakd.data.packing import PackedBatch
from deltakd.losses.linear import linear_loss
from deltakd.losses.objectives import Objective, objective
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
        losses_N = linear_loss(hidden_NH, head_VH, {}, moved.labels, sft, CHUNK_TOKENS).token("cross_entropy")
        rows += _document_means(losses_N, moved)
    return rows


@torch.inference_mode()
def kl_rows(model: Any, teacher: Any, batches: Sequence[PackedBatch], vocab_size: int) -> list[float]:
    """Return every document's KL(teacher, model) at temperature 1 in nats per supervised token, in the batches' order.

    It is what forward_kl to the target `teacher` trains on, over the first `vocab_size` tokens. Both models lie on one
    device. Raises LossError if the teacher's head has fewer rows, or says of a token what is no number.
    """
    forward_kl = objective({"target": {"name": "teacher"}, "divergence": {"name": "forward_kl"}})
    return _rows(model, {"teacher": teacher}, forward_kl, "divergence", batches, vocab_size)


@torch.inference_mode()
def target_rows(
    model: Any, frozen: Mapping[str, Any], of: Objective, batches: Sequence[PackedBatch], vocab_size: int
) -> list[float]:
    """Return every document's KL from an objective's target to its student point, as `kl_to_target` in steps.jsonl.

    `frozen` holds the models that the objective needs; else as `kl_rows`.
    """
    return _rows(model, frozen, of, "kl_to_target", batches, vocab_size)


def _rows(
    model: Any, frozen: Mapping[str, Any], of: Objective, name: str, batches: Sequence[PackedBatch], vocab_size: int
) -> list[float]:
    head_VH = head_weight(model)[:vocab_size]
    rows: list[float] = []
    for batch in batches:
        moved = batch.to(str(head_VH.device))
        hidden_NH = supervised_hidden(model, moved, "packed")
        said = {role: (supervised_hidden(one, moved, "packed"), head_weight(one)) for role, one in frozen.items()}
        rows += _document_means(linear_loss(hidden_NH, head_VH, said, None, of, CHUNK_TOKENS).token(name), moved)
    return rows


def _document_means(losses_N: Tensor, batch: PackedBatch) -> list[float]:
    """Return the mean over each document's supervised tokens, summed in float64."""
    document = torch.searchsorted(batch.starts, batch.supervised, right=True) - 1
    sums = torch.zeros(len(batch.starts) - 1, dtype=torch.float64, device=losses_N.device)
    sums.index_add_(0, document, losses_N.double())
    counts = torch.bincount(document, minlength=len(sums))
    means: list[float] = (sums / counts).tolist()
    return means
