"""What a student writes does not depend on how many ranks share the writing, nor on where a run was stopped."""

import threading
from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from deltakd.base.ranks import SoloWorld
from deltakd.data.examples import Example, ExampleSet
from deltakd.data.stream import Stream
from deltakd.rollout.mixture import Mixture
from deltakd.rollout.settings import AdaptiveSettings, ReplaySettings, RolloutSettings
from deltakd.rollout.stream import Rollouts
from deltakd.rollout.writing import Answer, Writer, join, prompt_of

SETTINGS = RolloutSettings(on_policy_fraction=0.5, refresh_steps=3, max_new_tokens=5, batch_size=2)
WAYS = {
    "a fraction": {},
    "replay": {"replay": ReplaySettings(capacity=6, fresh="constant"), "on_policy_fraction": 0.9},
    "adaptive": {
        "adaptive": AdaptiveSettings(raise_by=0.3),
        "replay": ReplaySettings(capacity=6),
        "on_policy_fraction": 0.0,
    },
}


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


def rollouts(rank=0, size=1, world=None, refreshed=lambda: None, settings=SETTINGS):
    """A student whose answers tell by whom, when and to what they were drawn: the prompt's sum, the seed's end."""
    examples = example_set()

    def write(prompts, most, seed):
        answers = [[sum(prompt) % 97, seed % 97, *range(most - 2)] for prompt in prompts]
        return [Answer(one, np.float32([one, one])) for one in answers]

    stream = Stream(examples, 3, 40, rank, size, 64, None, False)
    writer = Writer(settings, 3, 16, world or SoloWorld(), write)
    return Rollouts(stream, examples, settings, 3, Mixture(settings, 3, 20), writer, refreshed)


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


@pytest.mark.parametrize("changes", WAYS, ids=WAYS)
def test_it_goes_on_with_what_was_written_and_draws_nothing_anew(changes):
    """From the state after every step: the same tokens with the same probabilities, and no new ones."""
    settings = SETTINGS.model_copy(update=WAYS[changes])
    whole, renewed = rollouts(settings=settings), []
    steps, held = whole.steps(0), []
    for step in range(1, 16):
        state = whole.state(step - 1) if step > 1 else None
        opens = whole.waits(step)
        batches = next(steps)
        held.append(state is not None and "steps" in state)
        if state is not None:
            other = rollouts(refreshed=lambda step=step: renewed.append(step), settings=settings)
            other.restore(state)
            renewed.clear()
            going_on, later = other.steps(step - 1), []
            for further in range(step, step + 6):  # past the end of the block, and so past a decision
                later.append(next(going_on))
                other.observe(1.0 + further)
                assert renewed == [] or opens or further > step
            whole_again = rollouts(settings=settings)
            for number, expected in zip(range(1, step + 6), whole_again.steps(0), strict=False):
                whole_again.observe(1.0 + number)
                if number >= step:
                    again = later[number - step]
                    assert documents(again) == documents(expected)
                    pairs = zip(again, expected, strict=True)
                    assert all((a.draws is None and b.draws is None) or torch.equal(a.draws, b.draws) for a, b in pairs)
            assert documents(later[0]) == documents(batches)
        whole.observe(1.0 + step)  # a validation after each step, worse every time
    assert any(held)


def test_a_step_in_which_the_first_is_written_takes_new_weights_and_no_other_does():
    times = []
    source = rollouts(refreshed=lambda: times.append(1))
    counts, own = [], Mixture(SETTINGS, 3, 20)
    for step, _ in zip(range(1, 13), source.steps(0), strict=False):
        counts.append((step, own.source(step, False) == "written", len(times)))
    firsts = {(step - 1) // 3: step for step, is_written, _ in reversed(counts) if is_written}
    assert [count for _, _, count in counts] == [
        sum(first <= step for first in firsts.values()) for step, _, _ in counts
    ]


def test_a_prompt_is_what_the_last_answer_was_given_to_and_answers_are_learnt_whole():
    learnt = np.array([0, 0, 1, 1, 0, 0, 1, 1, 1], dtype=bool)
    example = Example(np.arange(9, dtype=np.int32), learnt)
    assert prompt_of(example) == [0, 1, 2, 3, 4, 5]
    joined = join([7, 8], Answer([9]))
    assert joined.tokens.tolist() == [7, 8, 9] and joined.supervised.tolist() == [False, False, True]


def test_replayed_steps_repeat_what_was_written_before_and_nothing_else():
    settings = SETTINGS.model_copy(update=WAYS["replay"])
    asked, seen, replayed = Mixture(settings, 3, 20), set(), 0
    source = rollouts(settings=settings)
    data = {
        document
        for batches in taken(rollouts(settings=SETTINGS.model_copy(update={"on_policy_fraction": 0.0})), 0, 20)
        for document in documents(batches)
    }
    for step, batches in zip(range(1, 16), source.steps(0), strict=False):
        own = set(documents(batches))
        if asked.source(step, is_full=False) == "data":
            assert own <= data
        elif own <= seen:
            replayed += 1
        seen |= own - data
    assert replayed > 2


def test_the_fraction_rises_only_when_a_validation_is_worse_than_the_one_it_is_compared_with():
    """DistiLLM's rule: 0.1 more when the loss is 0.1 above the last comparison, which only then is replaced."""
    rising = Mixture(RolloutSettings(on_policy_fraction=0.0, adaptive=AdaptiveSettings()), 3, 20)
    fractions = []
    for loss in (2.0, 1.0, 2.05, 2.11, 2.15, 2.22, 9.0, *[100.0 + k for k in range(12)]):
        rising.observe(loss)
        fractions.append(round(rising.fraction, 9))
    assert fractions[:7] == [0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.3] and fractions[-1] == 1.0


def test_every_rank_decides_alike_and_a_share_of_steps_is_the_student_s():
    settings = RolloutSettings(on_policy_fraction=0.6, replay=ReplaySettings())
    sources = [[Mixture(settings, 3, 1000).source(step, True) for step in range(1, 1001)] for _ in range(2)]
    assert sources[0] == sources[1]
    early, late = sources[0][:300], sources[0][-300:]
    assert 0.5 < 1 - sources[0].count("data") / 1000 < 0.7
    assert early.count("written") > 5 * early.count("replayed") and late.count("replayed") > 5 * late.count("written")


def test_a_share_of_what_is_written_anew_rises_falls_or_stays_over_the_run():
    shares = {}
    for fresh in ("decreasing", "constant", "increasing"):
        mixture = Mixture(RolloutSettings(on_policy_fraction=1.0, replay=ReplaySettings(fresh=fresh)), 3, 1000)
        written = [mixture.source(step, True) == "written" for step in range(1, 1001)]
        shares[fresh] = [sum(written[:300]) / 300, sum(written[-300:]) / 300]
        assert all(mixture.source(step, False) == "written" for step in range(1, 1001))
    assert shares["decreasing"][0] > 0.7 > 0.3 > shares["decreasing"][1]
    assert shares["increasing"][0] < 0.3 < 0.7 < shares["increasing"][1]
    assert all(0.35 < share < 0.65 for share in shares["constant"])


def test_a_full_buffer_gives_no_answer_twice_to_a_step_other_answers_to_another_and_asks_for_no_weights():
    settings = RolloutSettings(
        on_policy_fraction=1.0, replay=ReplaySettings(capacity=9, fresh="increasing"), refresh_steps=1
    )
    times, steps = [], []
    source = rollouts(refreshed=lambda: times.append(1), settings=settings)
    for batches in islice(source.steps(0), 15):
        steps.append((len(times), documents(batches)))
    together = [
        (one, two) for (a, one), (b, two), (c, _) in zip(steps, steps[1:], steps[2:], strict=False) if a == b == c
    ]
    assert together and all(one != two for one, two in together)  # of one buffer, each step draws its own
    replayed = [found for (before, _), (count, found) in pairwise(steps) if count == before]
    assert len(replayed) > 3 and all(len(set(found)) == len(found) for found in replayed)
    assert len({tuple(found) for found in replayed}) > 1


class Asked:
    """Answers by whom it was asked for, and remembers with which seeds and how much room."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, most, seed):
        self.calls.append((seed, most, [len(prompt) for prompt in prompts]))
        answers = [[sum(prompt) % 97, *range(1, most)] for prompt in prompts]
        return [Answer(one, np.float32([one, one])) for one in answers]


def test_an_answer_fits_its_own_prompt_s_room_with_its_draws_and_every_chunk_has_a_seed_of_its_own():
    asked = Asked()
    settings = RolloutSettings(on_policy_fraction=1.0, max_new_tokens=6, batch_size=2)
    prompts = {4: [[5] * 3, [7] * 9, [5] * 3, [7] * 9], 5: [[5] * 3, [7] * 9]}
    made = Writer(settings, 3, 12, SoloWorld(), asked).answer(prompts)
    assert len({seed for seed, _, _ in asked.calls}) == len(asked.calls) == 3
    assert all(most == 6 or min(lengths) == 9 for _, most, lengths in asked.calls)
    for step, examples in made.items():
        for prompt, example in zip(prompts[step], examples, strict=True):
            room = min(6, 12 - len(prompt))
            assert example.tokens.tolist()[: len(prompt)] == prompt
            assert example.tokens.tolist()[len(prompt) :] == [sum(prompt) % 97, *range(1, room)]
            assert example.draws[0].tolist() == example.tokens[len(prompt) :].tolist()


def test_writing_is_left_when_the_ranks_shall_not_go_on_and_nothing_is_decided():
    class Leave(Exception):
        pass

    heard = []

    def heed():
        heard.append(1)
        if len(heard) == 3:
            raise Leave

    source = rollouts()
    source._writer = Writer(SETTINGS, 3, 16, SoloWorld(), Asked(), heed)
    with pytest.raises(Leave):
        list(zip(range(9), source.steps(0), strict=False))
    assert "steps" not in source.state(0) and int(source.state(0)["decided"]) == 0


def test_the_line_about_what_was_written_last_comes_back_with_it():
    lines = []
    source = rollouts()
    source._record = lines.append
    first = next(step for step in range(1, 9) if source.waits(step))
    list(zip(range(first), source.steps(0), strict=False))
    (line,) = lines
    again = rollouts()
    again._record = lines.append
    again.restore(source.state(first - 1))  # stopped right after writing: this run's file has no such line
    assert lines == [line, line]
    again.restore(source.state(first))
    assert len(lines) == 2
