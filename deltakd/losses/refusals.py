"""What an objective refuses: models or labels that are missing or do not fit, numbers that are none."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltakd.base.errors import LossError
from deltakd.losses.points import Sampled
from deltakd.losses.settings import ObjectiveSettings, TaidTarget


def refuse_missing(needs: frozenset[str], given: Mapping[str, Any]) -> None:
    """Raise LossError if a model that is needed is not given."""
    for name in sorted(needs - set(given)):
        raise LossError(f"{name}: missing. The objective needs {', '.join(sorted(needs))}; given: {', '.join(given)}.")


def refuse_labels(labels: Tensor, num_tokens: int, vocab_size: int) -> None:
    """Raise LossError unless there is one token of the vocabulary for every row of logits."""
    if labels.shape != (num_tokens,) or labels.is_floating_point():
        found = f"{labels.dtype} of shape {list(labels.shape)}"
        raise LossError(f"labels: {found} for {num_tokens:,} tokens. Pass one whole number per supervised token.")
    if num_tokens and (int(labels.min()) < 0 or int(labels.max()) >= vocab_size):
        ends = f"{int(labels.min())} to {int(labels.max())}"
        raise LossError(f"labels: {ends}, the vocabulary 0 to {vocab_size - 1}. Leave tokens without a label out.")


def lowest(name: str, logits: Tensor) -> float:
    """Return the lowest logit, -inf if a token is ruled out; raises LossError for NaN and +inf."""
    if not logits.numel():
        return 0.0
    least, most = (float(end) for end in torch.aminmax(logits.detach()))
    if not most < torch.inf:  # NaN is not below anything
        bad = int((logits.isnan() | logits.isposinf()).sum())
        raise LossError(f"{name}: {bad:,} of {logits.numel():,} logits are NaN or +inf. Look at the model.")
    return least


def refuse_given(settings: ObjectiveSettings, target: object) -> None:
    """Raise LossError if the objective cannot be taken from its target as it was given: summed, TopK or Sampled."""
    if isinstance(settings.target, TaidTarget):
        raise LossError("target: that of taid moves with the student, so it cannot be given. Give the teacher itself.")
    if isinstance(target, Sampled) and (settings.divergence.name != "forward_kl" or settings.support is not None):
        raise LossError(
            f"target: draws estimate forward_kl over all tokens alone, not {settings.divergence.name}"
            f"{'' if settings.support is None else ' on a support'}. Give a TopK or the logits."
        )
