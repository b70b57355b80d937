"""Examples to one flat batch, and the only place where labels are shifted.

Documents stand side by side and positions restart at each, so none sees another and nothing is padded. The label of
token i is written down at position i - 1, the one that predicts it; every later part of the program takes `supervised`
and `labels` as they are. How a model lays the documents out (packed or padded) is its business, not the batch's.

T tokens, S documents, N supervised positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from deltakd.data.examples import Example


@dataclass(frozen=True)
class PackedBatch:
    """One rank's micro-batch, on the CPU, all int64.

    tokens [T]; positions [T] from 0 in each document; starts [S+1], the last is T; supervised [N], the positions that
    predict a label; labels [N], what they predict.
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    supervised: Tensor
    labels: Tensor

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
        return PackedBatch(*(getattr(self, part.name).to(device, non_blocking=True) for part in fields(self)))


def pack(examples: Sequence[Example]) -> PackedBatch:
    """Lay examples side by side and shift their labels: position i - 1 predicts token i if token i is supervised."""
    lengths = np.array([len(example.tokens) for example in examples], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([example.tokens for example in examples]).astype(np.int64)
    learnt = np.flatnonzero(np.concatenate([example.supervised for example in examples]))
    if np.isin(learnt, starts).any():  # the position before is another document's
        raise ValueError("the first token of an example cannot be supervised: nothing before it predicts it")
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.arange(len(tokens)) - np.repeat(starts[:-1], lengths)),
        starts=torch.from_numpy(starts),
        supervised=torch.from_numpy(learnt - 1),
        labels=torch.from_numpy(tokens[learnt]),
    )


def blank_batch(token_id: int = 0) -> PackedBatch:
    """Return one token of which nothing is learnt: under ZeRO-3 every rank takes part in every forward pass."""
    return pack([Example(np.array([token_id], dtype=np.int32), np.zeros(1, dtype=np.bool_))])
