"""Steps depend on data, seed and tokens per step alone; ranks and micro-batches only share them out."""

from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakd.base.errors import DataError
from deltakd.data.examples import ExampleSet
from deltakd.data.stream import Stream


def example_set(lengths) -> ExampleSet:
    """Examples of which every token but the first is learnt, and every token is its example's number."""
    lengths = np.array(lengths, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    supervised = np.ones(lengths.sum(), dtype=np.bool_)
    supervised[starts] = False
    return ExampleSet(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), supervised, starts, lengths)


def stream(examples, rank=0, num_ranks=1, seed=3, tokens_per_step=60, micro=30, most=None, padded=False) -> Stream:
    return Stream(examples, seed, tokens_per_step, rank, num_ranks, micro, most, padded)


def contents(batches) -> list[int]:
    """The examples in some batches, sorted; blank batches have no labels and count for nothing."""
    return sorted(int(batch.tokens[begin]) for batch in batches if batch.num_supervised for begin in batch.starts[:-1])


lengths_of_a_set = st.lists(st.integers(2, 30), min_size=1, max_size=25)


@settings(deadline=None, max_examples=60)
@given(lengths_of_a_set, st.integers(0, 9))
def test_epochs_follow_each_other_and_each_holds_every_example_once(lengths, seed):
    steps = stream(example_set(lengths), seed=seed).indices()
    order = [index for step in islice(steps, 3 * len(lengths)) for index in step.tolist()]
    epochs = [order[at : at + len(lengths)] for at in range(0, len(order) - len(lengths), len(lengths))]
    assert len(epochs) >= 2 and all(sorted(epoch) == list(range(len(lengths))) for epoch in epochs)


@settings(deadline=None, max_examples=60)
@given(lengths_of_a_set, st.integers(1, 100))
def test_a_step_takes_the_next_examples_as_long_as_they_fit_and_at_least_one(lengths, tokens_per_step):
    steps = list(islice(stream(example_set(lengths), tokens_per_step=tokens_per_step).indices(), 30))
    for now, later in pairwise(steps):
        tokens = sum(lengths[index] for index in now)
        assert len(now) == 1 or tokens <= tokens_per_step
        assert tokens + lengths[later[0]] > tokens_per_step


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(("micro", "most", "padded"), [(30, None, False), (64, 2, False), (45, None, True)])
def test_ranks_and_micro_batches_share_a_step_out_and_change_nothing_in_it(num_ranks, micro, most, padded):
    examples = example_set(np.random.default_rng(5).integers(2, 31, size=40))
    plain = [sorted(step.tolist()) for step in islice(stream(examples).indices(), 12)]
    ranks = [
        islice(stream(examples, rank, num_ranks, micro=micro, most=most, padded=padded).steps(), 12)
        for rank in range(num_ranks)
    ]
    for expected, shares in zip(plain, zip(*ranks, strict=True), strict=True):
        assert contents(batch for share in shares for batch in share) == expected
        assert len({len(share) for share in shares}) == 1


def test_a_rank_without_examples_still_takes_part_with_a_blank_batch():
    examples = example_set([30, 30])
    shares = [next(stream(examples, rank, num_ranks=4).steps()) for rank in range(4)]
    assert sorted(share[0].num_supervised for share in shares) == [0, 0, 29, 29]
    assert all(len(share) == 1 for share in shares)


def test_resuming_at_a_step_gives_what_would_have_come():
    examples = example_set(np.random.default_rng(5).integers(2, 31, size=20))
    whole = [[batch.tokens.tolist() for batch in step] for step in islice(stream(examples).steps(), 40)]
    for first in (0, 1, 17):
        resumed = islice(stream(examples).steps(first=first), 40 - first)
        assert [[batch.tokens.tolist() for batch in step] for step in resumed] == whole[first:]


def test_seeds_and_epochs_shuffle_differently():
    examples = example_set([2] * 20)
    epochs = [next(stream(examples, seed=seed, tokens_per_step=80).indices()).tolist() for seed in (0, 1)]
    orders = [epochs[0][:20], epochs[0][20:], epochs[1][:20], epochs[1][20:], list(range(20))]
    assert len({tuple(order) for order in orders}) == 5


def test_a_stream_refuses_at_once_what_no_micro_batch_can_hold():
    with pytest.raises(DataError, match=r"20 tokens do not hold the longest example, 25 tokens"):
        stream(example_set([5, 25, 7]), micro=20)
