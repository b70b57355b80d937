"""The endless sequence of steps, and this rank's part of each.

Which examples step k holds depends on the data, the seed and `tokens_per_step` alone: not on ranks, layout or
micro-batches. So a run resumes on other hardware with the same steps. Each epoch is a new permutation, drawn from
(seed, epoch); a step takes the next examples as long as they fit, across the end of an epoch. Resuming at step k
replays only lengths: about ten microseconds per step. State is the step's number; there is nothing else to save.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from deltakd.data.examples import Example, ExampleSet
from deltakd.data.micro_batches import plan_micro_batches, refuse_too_long
from deltakd.data.packing import PackedBatch, blank_batch, pack


class Stream:
    """This rank's micro-batches, step by step; the same number of them on every rank."""

    def __init__(
        self,
        examples: ExampleSet,
        seed: int,
        tokens_per_step: int,
        rank: int,
        num_ranks: int,
        tokens_per_micro_batch: int,
        examples_per_micro_batch: int | None,
        padded: bool,
    ) -> None:
        """Raise DataError if some example is longer than a micro-batch."""
        refuse_too_long(int(examples.lengths.max()), tokens_per_micro_batch)
        self._examples = examples
        self._seed = seed
        self._tokens_per_step = tokens_per_step
        self._rank, self._num_ranks = rank, num_ranks
        self._tokens_per_micro_batch = tokens_per_micro_batch
        self._examples_per_micro_batch = examples_per_micro_batch
        self._padded = padded

    def steps(self, first: int = 0) -> Iterator[list[PackedBatch]]:
        """Yield the micro-batches of step `first`, the next step, and so on without end."""
        for step, chosen in enumerate(self.indices()):
            if step < first:
                continue
            yield self.cut(chosen)

    def cut(self, chosen: NDArray[np.int64]) -> list[PackedBatch]:
        """Return this rank's micro-batches of some examples; as many on every rank."""
        return self._cut(self._examples.lengths[chosen].tolist(), lambda place: self._examples[int(chosen[place])])

    def cut_examples(self, examples: Sequence[Example]) -> list[PackedBatch]:
        """Do the same with examples that are none of the set's."""
        return self._cut([len(one.tokens) for one in examples], lambda place: examples[place])

    def _cut(self, lengths: Sequence[int], example: Callable[[int], Example]) -> list[PackedBatch]:
        plan = plan_micro_batches(
            lengths,
            self._num_ranks,
            self._tokens_per_micro_batch,
            self._examples_per_micro_batch,
            self._padded,
        )
        return [pack([example(place) for place in places]) if places else blank_batch() for places in plan[self._rank]]

    def indices(self) -> Iterator[NDArray[np.int64]]:
        """Yield the examples of each step over all ranks: as many as fit into tokens_per_step, at least one."""
        order = np.empty(0, dtype=np.int64)
        ends = np.empty(0, dtype=np.int64)  # tokens up to and with each example of the order
        taken = epoch = 0
        while True:
            spent = int(ends[taken - 1]) if taken else 0
            while not len(ends) or ends[-1] - spent <= self._tokens_per_step:
                order, taken, spent = order[taken:], 0, 0
                order = np.concatenate([order, self._permutation(epoch)])
                ends = np.cumsum(self._examples.lengths[order])
                epoch += 1
            past = max(taken + 1, int(np.searchsorted(ends, spent + self._tokens_per_step, side="right")))
            yield order[taken:past]
            taken = past

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._examples))
