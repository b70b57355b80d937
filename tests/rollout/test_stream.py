"""What a student writes does not depend on how many ranks share the writing, nor on where a run was stopped."""

import threading
from itertools import pairwise

import numpy as np
import pytest

from deltakd.base.ranks import SoloWorld
from deltakd.data.examples import Example, ExampleSet
from deltakd.data.stream import Stream
from deltakd.rollout.settings import RolloutSettings
from deltakd.rollout.stream import Rollouts, join, prompt_of

SETTINGS = RolloutSettings(on_policy_fraction=0.5, refresh_steps=3, max_new_tokens=5, batch_size=2)


class Meeting:
    """Ranks that are threads of this process."""

    def __init__(self, size):
        self.size, self.said, self.all_there = size, [None] * size, threading.Barrier(size)

    def world(self, rank):
        world = SoloWorld()
        world.rank, world.size, world.gather = rank, self.size, lambda values: self.gather(rank, values)
        return world

    def gather(self, rank, values):
        self.said[rank] = values
        self.all_there.wait(20)
        told = list(self.said)
        self.all_there.wait(20)
        return told


def example_set():
    draw = np.random.default_rng(0)
    lengths = draw.integers(6, 14, size=20)
    tokens = draw.integers(1, 99, size=lengths.sum()).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    supervised = np.concatenate([np.arange(length) >= length // 2 for length in lengths])
    return ExampleSet(tokens, supervised, starts, lengths)


def rollouts(rank=0, size=1, world=None, refreshed=lambda: None):
    """A student whose answers tell by whom, when and to what they were drawn: the prompt's sum, the seed's end."""
    examples = example_set()

    def write(prompts, most, seed):
        return [[sum(prompt) % 97, seed % 97, *range(most - 2)] for prompt in prompts]

    stream = Stream(examples, 3, 40, rank, size, 64, None, False)
    return Rollouts(stream, examples, SETTINGS, 3, 16, world or SoloWorld(), refreshed, write)


def documents(batches):
    """Every document of some micro-batches, in an order of its own."""
    found = []
    for batch in batches:
        starts = batch.starts.tolist()
        found += [tuple(batch.tokens[a:b].tolist()) for a, b in pairwise(starts) if b > a + 1]
    return sorted(found)


def taken(source, first, last):
    return [batches for _, batches in zip(range(first, last), source.steps(first), strict=False)]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_share_the_writing_write_what_one_does(size):
    alone = [documents(batches) for batches in taken(rollouts(), 0, 9)]
    meeting, steps = Meeting(size), {}
    ranks = [
        threading.Thread(target=lambda r=r: steps.update({r: taken(rollouts(r, size, meeting.world(r)), 0, 9)}))
        for r in range(size)
    ]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(30)
    together = [documents([one for r in range(size) for one in steps[r][step]]) for step in range(9)]
    assert together == alone


def test_it_goes_on_with_what_was_written_and_draws_nothing_anew():
    whole, renewed = rollouts(), []
    steps = whole.steps(0)
    for step in range(1, 9):
        waits = whole.waits(step)
        batches = next(steps)
        assert not waits or whole.is_written(step)
        other = rollouts(refreshed=lambda step=step: renewed.append(step))
        other.restore(whole.state(step - 1))
        assert documents(next(other.steps(step - 1))) == documents(batches)
    written = [step for step in range(1, 9) if whole.is_written(step)]
    assert 1 < len(written) < 8 and renewed == []


def test_a_step_in_which_the_first_is_written_takes_new_weights_and_no_other_does():
    times = []
    source = rollouts(refreshed=lambda: times.append(1))
    counts = []
    for step, _ in zip(range(1, 13), source.steps(0), strict=False):
        counts.append((step, source.is_written(step), len(times)))
    firsts = {(step - 1) // 3: step for step, is_written, _ in reversed(counts) if is_written}
    assert [count for _, _, count in counts] == [
        sum(first <= step for first in firsts.values()) for step, _, _ in counts
    ]


def test_a_prompt_is_what_the_last_answer_was_given_to_and_answers_are_learnt_whole():
    learnt = np.array([0, 0, 1, 1, 0, 0, 1, 1, 1], dtype=bool)
    example = Example(np.arange(9, dtype=np.int32), learnt)
    assert prompt_of(example) == [0, 1, 2, 3, 4, 5]
    joined = join([7, 8], [9])
    assert joined.tokens.tolist() == [7, 8, 9] and joined.supervised.tolist() == [False, False, True]
