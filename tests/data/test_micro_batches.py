"""A plan places every example once, within the budget, with the same number of micro-batches on every rank."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakd.base.errors import DataError
from deltakd.data.micro_batches import plan_micro_batches

BUDGET = 100
lengths_of_a_step = st.lists(st.integers(1, BUDGET), min_size=1, max_size=60)


def cost(bin_, lengths, padded):
    own = [lengths[index] for index in bin_]
    return len(own) * max(own, default=0) if padded else sum(own)


@settings(deadline=None)
@given(lengths_of_a_step, st.integers(1, 5), st.none() | st.integers(1, 4), st.booleans())
def test_every_example_is_placed_once_within_the_budget_and_ranks_take_equally_many_turns(
    lengths, num_ranks, most, padded
):
    plan = plan_micro_batches(lengths, num_ranks, BUDGET, most, padded)
    bins = [bin_ for rank in plan for bin_ in rank]
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    assert all(cost(bin_, lengths, padded) <= BUDGET for bin_ in bins)
    assert all(len(bin_) <= (most or len(lengths)) for bin_ in bins)
    assert len(plan) == num_ranks and len({len(rank) for rank in plan}) == 1
    assert plan == plan_micro_batches(lengths, num_ranks, BUDGET, most, padded)


@settings(deadline=None)
@given(lengths_of_a_step, st.integers(1, 5))
def test_no_plan_takes_half_as_many_turns_again_as_it_must(lengths, num_ranks):
    """First-fit decreasing needs at most 11/9 of the fewest bins and one more; ranks round that up once."""
    fewest = -(-sum(lengths) // BUDGET)
    turns = len(plan_micro_batches(lengths, num_ranks, BUDGET, None, False)[0])
    halves = sum(length > BUDGET // 2 for length in lengths)
    fewest = max(fewest, halves)
    # Lengths just above a third defeat the volume bound, hence 3/2 and not 11/9.
    assert turns <= -(-(3 * fewest // 2 + 1) // num_ranks)


def test_work_is_evened_out_over_ranks_instead_of_filling_the_first():
    plan = plan_micro_batches(
        [10] * 16, num_ranks=4, tokens_per_micro_batch=1000, examples_per_micro_batch=None, padded=False
    )
    assert [[len(bin_) for bin_ in rank] for rank in plan] == [[4]] * 4
    padded = plan_micro_batches([50] * 4 + [10] * 20, 2, 1000, None, padded=True)
    assert [len(rank) for rank in plan_micro_batches([50, 30, 20] * 2, 2, 100, None, padded=False)] == [1, 1]
    costs = [cost(rank[0], [50] * 4 + [10] * 20, True) for rank in padded]
    assert max(costs) < 300  # all in one bin would cost 1,200, all the short ones beside a long one as much


@settings(deadline=None)
@given(lengths_of_a_step, st.integers(2, 4), st.booleans())
def test_ranks_that_wait_for_each_other_have_similar_work(lengths, num_ranks, padded):
    plan = plan_micro_batches(lengths, num_ranks, BUDGET, None, padded)
    turns = [[cost(rank[micro], lengths, padded) for rank in plan] for micro in range(len(plan[0]))]
    for now, later in pairwise(turns):
        assert min(now) >= max(later)


def test_an_example_longer_than_a_micro_batch_is_refused_with_the_number_to_write():
    with pytest.raises(DataError, match=r"train.tokens_per_micro_batch: 100 .*longest example, 101 tokens. Write 101"):
        plan_micro_batches([5, 101], 1, 100, None, False)
