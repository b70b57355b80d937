"""What linear_loss refuses before it computes: references, labels and payloads missing, misshapen or broken."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from deltakd.base.errors import LossError
from deltakd.losses.frozen import TARGET, Reference
from deltakd.losses.objectives import Objective
from deltakd.losses.points import STUDENT, Sampled, TopK
from deltakd.losses.refusals import refuse_given, refuse_labels, refuse_missing


def refuse_unfit(
    hidden_NH: Tensor,
    head_VH: Tensor,
    references: Mapping[str, Reference],
    labels_N: Tensor | None,
    objective: Objective,
    drawn: bool = False,
) -> None:
    """Raise LossError unless references and labels are there and have the student's tokens and vocabulary."""
    num_tokens, vocab_size = len(hidden_NH), len(head_VH)
    if hidden_NH.dim() != 2 or head_VH.dim() != 2 or hidden_NH.shape[1] != head_VH.shape[1]:
        shapes = f"hidden {list(hidden_NH.shape)}, head {list(head_VH.shape)}"
        raise LossError(f"student: {shapes}. Pass [N, H] and [V, H], supervised tokens only.")
    if hidden_NH.dtype != head_VH.dtype:
        raise LossError(f"student: hidden is {hidden_NH.dtype}, head {head_VH.dtype}. Pass both in one precision.")
    if labels_N is None and objective.settings.sft_weight > 0:
        raise LossError(f"labels: missing, but sft_weight is {objective.settings.sft_weight:g}. Pass labels [N].")
    if labels_N is not None:
        refuse_labels(labels_N, num_tokens, vocab_size)
    if not num_tokens or not objective.reads_frozen(drawn):
        return
    given = references.get(TARGET)
    of_q = objective.weights[1] if given is not None and objective.needs else {}
    needed = objective.needs if given is None else frozenset(set(of_q) - {STUDENT})
    refuse_missing(needed, references)
    if given is not None:
        refuse_given(objective.settings, given)
    for name in sorted(needed | ({TARGET} if given is not None else set())):
        _refuse_misfit(name, references[name], num_tokens, vocab_size)


def _refuse_misfit(name: str, part: Reference, num_tokens: int, vocab_size: int) -> None:
    if isinstance(part, TopK | Sampled) and name == TARGET:
        _refuse_estimate(part, vocab_size)
        tokens, width = len(part.ids), vocab_size
    elif isinstance(part, Tensor) and part.dim() == 2:
        tokens, width = part.shape
    elif isinstance(part, tuple) and len(part) == 2 and all(isinstance(p, Tensor) and p.dim() == 2 for p in part):
        _refuse_pair(name, *part)
        tokens, width = len(part[0]), len(part[1])
    else:
        raise LossError(
            f"{name}: {type(part).__name__}. Pass logits [N, V] or (hidden states [N, H], head [V, H]); "
            f"TopK and Sampled only as {TARGET}."
        )
    if tokens != num_tokens:
        raise LossError(f"{name}: speaks of {tokens:,} tokens, the student of {num_tokens:,}. Pass the same tokens.")
    if width < vocab_size:
        raise LossError(
            f"{name}: a vocabulary of {width:,}, smaller than the student's head of {vocab_size:,}. "
            f"Cut the student's head to {width:,} rows."
        )


def _refuse_pair(name: str, hidden: Tensor, head: Tensor) -> None:
    if hidden.shape[-1] != head.shape[-1]:
        raise LossError(f"{name}: hidden states {hidden.shape[-1]} wide, head {head.shape[-1]}. Pass one model's.")
    if hidden.device != head.device:
        raise LossError(f"{name}: hidden states on {hidden.device}, head on {head.device}. Move them together.")
    # The ends tell of NaN and inf without an [N, H] mask.
    if hidden.numel() and not all(math.isfinite(end) for end in torch.aminmax(hidden.detach())):
        bad = int((~torch.isfinite(hidden)).sum())
        raise LossError(f"{name}: {bad:,} of {hidden.numel():,} hidden numbers are not finite. Look at the model.")


def _refuse_estimate(part: TopK | Sampled, vocab_size: int) -> None:
    ids = part.ids
    if ids.dim() != 2 or ids.is_floating_point() or not ids.shape[-1]:
        raise LossError(f"{TARGET}: ids {ids.dtype} of shape {list(ids.shape)}. Pass whole numbers [N, at least 1].")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        far = int(ids.max()) if int(ids.max()) >= vocab_size else int(ids.min())
        raise LossError(f"{TARGET}: token {far:,} of a vocabulary of {vocab_size:,}. Cut it there.")
    numbers = part.weights if isinstance(part, Sampled) else part.log_probs
    if numbers is not None and (numbers.shape != ids.shape or bool(numbers.isnan().any())):
        raise LossError(f"{TARGET}: {list(numbers.shape)} numbers for {list(ids.shape)} ids, or NaN. Pass one per id.")
    if isinstance(part, Sampled) and numbers is not None and bool((numbers < 0).any()):
        raise LossError(f"{TARGET}: a weight of {float(numbers.min()):g}. A draw counts 0 or more.")
    if isinstance(part, TopK):
        if bool((ids.sort(-1).values.diff(dim=-1) == 0).any()):
            raise LossError(f"{TARGET}: a token stands twice in one top k. Pass each once.")
        tail = part.log_tail
        if tail is not None and (tail.shape != ids.shape[:1] or bool(tail.isnan().any())):
            raise LossError(f"{TARGET}: log_tail {list(tail.shape)} for {len(ids):,} tokens, or NaN. Pass [N].")


def refuse_broken_heads(references: Mapping[str, Reference]) -> None:
    """Raise LossError if a frozen head is not finite: looked for only once a loss is not, as a head is large."""
    for name, part in references.items():
        if isinstance(part, tuple) and not torch.isfinite(part[1]).all():
            bad = int((~torch.isfinite(part[1])).sum())
            raise LossError(
                f"{name}: {bad:,} of {part[1].numel():,} numbers of its head are not finite. Look at the model."
            )
