"""Tokenised examples: what tokens a row became, and what is learnt of them.

A set is flat arrays, so that it can be memory mapped, and so that leaving examples out copies nothing. Who makes one
from rows: tokenise.py. Who lays examples out for a model: packing.py.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from deltakd.base.errors import DataError


@dataclass(frozen=True)
class Example:
    """Tokens int32 [L]; supervised bool [L]: token i is a label, predicted from the tokens before it; never token 0.

    Of tokens that a student drew, `draws` float32 [2, supervised] may say their log-probabilities when it did, and
    their importance weights.
    """

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    draws: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class ExampleCounts:
    """What became of the rows. Tokens are those of the examples that are left."""

    rows: int = 0
    dropped_over_long: int = 0
    truncated: int = 0
    dropped_unsupervised: int = 0
    dropped_in_validation: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    @property
    def left_out(self) -> int:
        """Rows that are not learnt from, or not whole."""
        return self.dropped_over_long + self.truncated + self.dropped_unsupervised + self.dropped_in_validation

    def describe(self) -> str:
        """Say it in one line, without what did not happen."""
        left_out = {
            "over-long dropped": self.dropped_over_long,
            "truncated": self.truncated,
            "without a supervised token dropped": self.dropped_unsupervised,
            "also held out, dropped": self.dropped_in_validation,
        }
        notes = [f"{count:,} {what}" for what, count in left_out.items() if count]
        text = f"{self.rows:,} rows, {self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"
        return "; ".join([text, *notes])


@dataclass(frozen=True)
class ExampleSet:
    """Examples as flat arrays: example i is the `lengths[i]` tokens from `starts[i]` on. Indexing gives views."""

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    counts: ExampleCounts = field(default_factory=ExampleCounts)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        part = slice(int(self.starts[index]), int(self.starts[index] + self.lengths[index]))
        return Example(self.tokens[part], self.supervised[part])

    @cached_property
    def digest(self) -> str:
        """Hash of all tokens, of what is supervised and of where examples begin; a second per gigabyte."""
        digest = hashlib.blake2b(digest_size=12)
        for array in (self.tokens, self.supervised, self.starts, self.lengths):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def drop_validation(train: ExampleSet, validation: ExampleSet, prompts: bool = False) -> ExampleSet:
    """Return train without the examples whose tokens also stand in validation, counted in `dropped_in_validation`.

    Real chat sets repeat a few rows, so this is no error; but held-out rows are never learnt from. Raises DataError if
    no training example is left. Equal means equal tokens; a common prompt with another answer stays, unless `prompts`
    are what is kept apart.
    """
    held_out = {_held_out_part(example, prompts) for example in validation}
    keep = np.array([_held_out_part(example, prompts) not in held_out for example in train], dtype=np.bool_)
    if keep.all():
        return train
    if not keep.any():
        raise DataError(
            f"data.train: all {len(train):,} examples also stand in data.validation. Write other rows in one of them."
        )
    kept = replace(train, starts=train.starts[keep], lengths=train.lengths[keep])
    counts = replace(
        train.counts,
        dropped_in_validation=int((~keep).sum()),
        tokens=int(kept.lengths.sum()),
        supervised_tokens=sum(int(example.supervised.sum()) for example in kept),
    )
    return replace(kept, counts=counts)


def _held_out_part(example: Example, prompts: bool) -> bytes:
    end = int(example.supervised.argmax()) if prompts else None
    return example.tokens[:end].tobytes()
