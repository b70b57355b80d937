"""Payloads: what a frozen side says of each supervised token, as arrays that lie one behind the other in a slot.

`hidden` and `logits` keep the models apart, so the loss forms the target. `target`, `top_k` and `sampled` are formed by
the teacher rank from all models at once, for one alpha and one temperature; the student then needs no frozen head.

A payload is a function of its request alone: requests are never merged into a bigger forward, and draws come from the
request's digest, so the numbers do not depend on how many teachers there are or which of them answered.

Shapes: N supervised positions of a batch, V shared vocabulary, H hidden size, k and m the sizes of an estimate.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from deltakd.base.errors import TeacherError
from deltakd.losses.frozen import TARGET, Reference
from deltakd.losses.objectives import Objective
from deltakd.losses.points import Sampled, TopK, mix
from deltakd.models.forward import Batch, Layout, head_weight, supervised_hidden

PayloadKind = Literal["hidden", "logits", "target", "top_k", "sampled"]
APART = ("hidden", "logits")  # one payload per model
_ALIGN = 64  # bytes; where each array of a slot may start
_CHUNK_TOKENS = 256  # for how many tokens a teacher holds float32 logits at a time


@dataclass(frozen=True)
class PayloadSpec:
    """What is sent for each supervised token. `size` is k of top_k, m of sampled; `tail` adds a bucket to top_k."""

    kind: PayloadKind
    dtype: str
    layout: Layout
    vocab_size: int
    size: int = 0
    tail: bool = True

    @property
    def keeps_models_apart(self) -> bool:
        """Whether each model sends a payload of its own."""
        return self.kind in APART

    @property
    def words(self) -> str:
        """Everything that the bytes of a payload depend on, but the models."""
        size = f", {self.size}" if self.size else ""
        return f"{self.kind}, {self.dtype}{size}" + (", tail" if self.kind == "top_k" and self.tail else "")

    def fields(self, hidden_size: int) -> list[tuple[int, torch.dtype]]:
        """Return numbers per token and precision of each array, in their order."""
        precision = getattr(torch, self.dtype)
        if self.kind == "top_k":
            return [(self.size, torch.int32), (self.size, precision), *([(1, precision)] if self.tail else [])]
        if self.kind == "sampled":
            return [(self.size, torch.int32)]
        return [(hidden_size if self.kind == "hidden" else self.vocab_size, precision)]

    def num_bytes(self, num_tokens: int, hidden_size: int) -> int:
        """Bytes of a payload of `num_tokens` tokens, the gaps between its arrays included."""
        return sum(_aligned(num_tokens * width * dtype.itemsize) for width, dtype in self.fields(hidden_size))

    def split(self, data: Tensor, num_tokens: int, hidden_size: int) -> list[Tensor]:
        """Return the arrays [N, width] that lie in some bytes, without a copy."""
        arrays, start = [], 0
        for width, dtype in self.fields(hidden_size):
            num = num_tokens * width * dtype.itemsize
            arrays.append(data[start : start + num].view(dtype).view(num_tokens, width))
            start += _aligned(num)
        return arrays


@dataclass(frozen=True)
class FrozenFacts:
    """What a student knows of a frozen model that others hold."""

    identity: str
    hidden_size: int


def hidden_size(name: str, models: Mapping[str, FrozenFacts]) -> int:
    """Return the width of a model's hidden states; 0 for the target, which has none."""
    return 0 if name == TARGET else models[name].hidden_size


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN


class Together(Protocol):
    """The other processes that hold a part of the same models."""

    def forward(self, role: str, batch: Batch, run: Callable[[], Tensor]) -> Tensor:
        """Return what `run`, a model's forward here, gives while the others do their parts of it."""

    def others(self) -> Sequence[tuple[int, str]]:
        """Return pid and device of each of them."""


@dataclass(frozen=True)
class FrozenModels:
    """The frozen models of a process, and how a payload is formed from them."""

    models: Mapping[str, Any]
    spec: PayloadSpec
    objective: Objective
    seed: int = 0
    group: Together | None = None  # where this process holds a part of them

    def hidden_size(self, name: str) -> int:
        """Return the width of a model's hidden states; 0 for the target, which has none."""
        return 0 if name == TARGET else int(head_weight(self.models[name]).shape[1])

    def num_tokens(self) -> int:
        """Return the smallest number of tokens that a model of this process embeds."""
        return min(len(model.get_input_embeddings().weight) for model in self.models.values())

    def serves(self, name: str) -> bool:
        """Tell whether a payload of this name can be formed here."""
        return self.objective.needs <= set(self.models) if name == TARGET else name in self.models

    def payload(self, name: str, batch: Batch, alpha: float, digest: bytes) -> list[Tensor]:
        """Return the arrays [N, width] of one model, or of the `target` at `alpha`.

        Raises TeacherError if the precision cannot hold a number, or if one is none.
        """
        arrays = self._form(name, batch, alpha, digest)
        bad, whole = count_bad(arrays, self.spec)
        if bad:
            raise TeacherError(
                f"{bad:,} of {whole:,} numbers are not finite in {self.spec.dtype}. "
                "Write references.dtype=float32, or look at the model."
            )
        return arrays

    def fill(self, name: str, batch: Batch, alpha: float, digest: bytes, place: Callable[[int], Tensor]) -> Tensor:
        """Form a payload in the bytes that `place` gives for their number, and return them."""
        arrays = self.payload(name, batch, alpha, digest)
        num_tokens, width = len(batch.supervised), self.hidden_size(name)
        data = place(self.spec.num_bytes(num_tokens, width))
        for part, array in zip(self.spec.split(data, num_tokens, width), arrays, strict=True):
            part.copy_(array)
        return data

    @torch.inference_mode()
    def _form(self, name: str, batch: Batch, alpha: float, digest: bytes) -> list[Tensor]:
        precision = getattr(torch, self.spec.dtype)
        if name != TARGET:
            hidden_NH = self._hidden(name, batch)
            if self.spec.kind == "logits":
                hidden_NH = hidden_NH @ head_weight(self.models[name])[: self.spec.vocab_size].T
            return [hidden_NH.to(precision)]
        weights = {role: weight for role, weight in self.objective.at(alpha).weights[0].items() if weight}
        hidden = {role: self._hidden(role, batch) for role in weights}
        chunks = []
        generator = torch.Generator(device=batch.tokens.device).manual_seed(_seed(self.seed, digest))
        for start in range(0, len(batch.supervised), _CHUNK_TOKENS):
            few = slice(start, start + _CHUNK_TOKENS)
            logits = {role: self._logits(role, states[few]) for role, states in hidden.items()}
            summed = mix(weights, logits)
            assert summed is not None  # a point mixes at least one model
            chunks.append(self._say(summed, generator))
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def _hidden(self, role: str, batch: Batch) -> Tensor:
        def run() -> Tensor:
            return supervised_hidden(self.models[role], batch, self.spec.layout)

        return run() if self.group is None else self.group.forward(role, batch, run)

    def _logits(self, role: str, hidden_nH: Tensor) -> Tensor:
        return (hidden_nH @ head_weight(self.models[role])[: self.spec.vocab_size].T).float()

    def _say(self, summed: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Turn the target's logits [n, V] into what is sent of them."""
        spec, precision = self.spec, getattr(torch, self.spec.dtype)
        if spec.kind == "target":  # what softmax ignores is taken off: 16 bits are finest near 0
            return [(summed - summed.amax(-1, keepdim=True)).to(precision)]
        log_p = torch.log_softmax(summed / self.objective.settings.temperature, dim=-1)
        if spec.kind == "sampled":
            return [torch.multinomial(log_p.exp(), spec.size, replacement=True, generator=generator).int()]
        values, ids = log_p.topk(spec.size, dim=-1)
        if not spec.tail:
            return [ids.int(), (values - values.logsumexp(-1, keepdim=True)).to(precision)]
        rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return [ids.int(), values.to(precision), rest.to(precision)]


def read_payload(arrays: list[Tensor], spec: PayloadSpec, head: Tensor | None) -> Reference:
    """Return a payload as the loss reads it; `head` [V, H] belongs to hidden states."""
    if spec.kind == "top_k":
        return TopK(arrays[0].long(), arrays[1], arrays[2][:, 0] if spec.tail else None)
    if spec.kind == "sampled":
        return Sampled(arrays[0].long())
    return arrays[0] if head is None else (arrays[0], head)


def unpack_payload(
    data: Tensor, spec: PayloadSpec, num_tokens: int, width: int, head: Tensor | None, device: str
) -> Reference:
    """Return a payload that lies in some bytes, as the loss reads it on a device; `width` is the hidden size."""
    return read_payload([array.to(device) for array in spec.split(data, num_tokens, width)], spec, head)


def count_bad(arrays: list[Tensor], spec: PayloadSpec) -> tuple[int, int]:
    """Count the numbers of a payload that no loss can be taken of, and all of them; a log of 0 is a number."""
    bad = whole = 0
    for array in arrays:
        whole += array.numel()
        # NaN and inf survive a sum: one reading pass tells that all is well, as it nearly always is.
        if array.is_floating_point() and not torch.isfinite(array.sum(dtype=torch.float64)):
            usable = torch.isfinite(array)
            bad += int((~(usable if spec.keeps_models_apart else usable | array.isneginf())).sum())
    return bad, whole


def _seed(seed: int, digest: bytes) -> int:
    drawn = hashlib.blake2b(digest, digest_size=8, key=seed.to_bytes(16, "little")).digest()
    return int.from_bytes(drawn, "little") >> 1


def choose_payload(hidden_sizes: Mapping[str, int], vocab_size: int, bytes_each: int) -> tuple[PayloadKind, str]:
    """Return the exact payload of the fewest bytes, and why in a sentence.

    Exact are hidden states and the whole target; estimates (top_k, sampled) are never chosen for anyone.
    """
    hidden = sum(hidden_sizes.values()) * bytes_each
    target = vocab_size * bytes_each
    if hidden <= target:
        why = f"{hidden:,} bytes a token, the whole target would be {target:,}"
        return "hidden", f"payload hidden: {why}"
    return "target", f"payload target: {target:,} bytes a token, hidden states would be {hidden:,}"
