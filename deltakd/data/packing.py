"""Examples to one flat batch, and the only place where labels are shifted.

Documents stand side by side and positions restart at each, so none sees another and nothing is padded. The label of
token i is written down at position i - 1, the one that predicts it; every later part of the program takes `supervised`
and `labels` as they are. How a model lays the documents out (packed or padded) is its business, not the batch's.

T tokens, S documents, N supervised positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltakd.data.examples import Example


@dataclass(frozen=True)
class PackedBatch:
    """One rank's micro-batch, on the CPU, all int64 but `draws`.

    tokens [T]; positions [T] from 0 in each document; starts [S+1], the last is T; supervised [N], the positions that
    predict a label; labels [N], what they predict. draws float32 [3, N], of labels that a student drew: their
    log-probabilities when it did, importance weights and advantages, 0 until they are known. `corpus_weight` marks
    plain text that is learnt beside a method's own tokens, by cross-entropy alone.
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    supervised: Tensor
    labels: Tensor
    draws: Tensor | None = None
    corpus_weight: float | None = None

    @property
    def asks(self) -> bool:
        """Whether frozen models are asked about it."""
        return bool(self.num_supervised) and self.corpus_weight is None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_supervised(self) -> int:
        return len(self.supervised)

    def to(self, device: str) -> "PackedBatch":
        """Return the batch on a device."""
        if device == "cpu":
            return self
        moved: dict[str, Any] = {name: part.to(device, non_blocking=True) for name, part in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """Return its arrays by name."""
        return {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}


def pack(examples: Sequence[Example]) -> PackedBatch:
    """Lay examples side by side and shift their labels: position i - 1 predicts token i if token i is supervised."""
    lengths = np.array([len(example.tokens) for example in examples], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([example.tokens for example in examples]).astype(np.int64)
    drawn = [example.draws for example in examples if example.draws is not None]
    learnt = np.flatnonzero(np.concatenate([example.supervised for example in examples]))
    if np.isin(learnt, starts).any():  # the position before is another document's
        raise ValueError("the first token of an example cannot be supervised: nothing before it predicts it")
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.arange(len(tokens)) - np.repeat(starts[:-1], lengths)),
        starts=torch.from_numpy(starts),
        supervised=torch.from_numpy(learnt - 1),
        labels=torch.from_numpy(tokens[learnt]),
        draws=torch.from_numpy(np.concatenate([*_with_advantages(drawn)], axis=1)) if drawn else None,
    )


def _with_advantages(drawn: Sequence[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    for one in drawn:
        yield np.concatenate([one, np.zeros_like(one[:1])])


def blank_batch(token_id: int = 0) -> PackedBatch:
    """Return one token of which nothing is learnt: under ZeRO-3 every rank takes part in every forward pass."""
    return pack([Example(np.array([token_id], dtype=np.int32), np.zeros(1, dtype=np.bool_))])
