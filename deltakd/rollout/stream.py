"""Batches that the student writes itself: the prompts of a step's examples, answered by the student as it stands.

A copy of the student, whole on every rank, writes: generation from sharded weights gathers them for every token. It
takes the weights before every `refresh_steps`-th step and answers the prompts of all steps until the next time. Which
steps are written, and every draw, depend on the seed and the step alone, so ranks only share the work out. What was
written and not trained on yet is part of a checkpoint.

    step      1   2   3   4 | 5   6   7   8 |         refresh_steps: 4
    weights   of the start  | after step 4  |
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltakd.base.ranks import World
from deltakd.data.examples import Example, ExampleSet
from deltakd.data.packing import PackedBatch
from deltakd.data.stream import Stream
from deltakd.rollout.settings import RolloutSettings

_WHETHER, _WHAT = 1, 2  # keep the draws of one seed apart
Write = Callable[[Sequence[list[int]], int, int], list[list[int]]]  # prompts, most new tokens and a seed to answers


class Rollouts:
    """This rank's micro-batches, of which the student has written some."""

    def __init__(
        self,
        stream: Stream,
        examples: ExampleSet,
        settings: RolloutSettings,
        seed: int,
        max_tokens: int,
        world: World,
        refresh: Callable[[], None],
        write: Write,
        record: Callable[[Mapping[str, Any]], None] = lambda facts: None,
    ) -> None:
        """`refresh` gives the writing copy the student's weights, on all ranks together; `write` answers with it."""
        self._stream, self._examples, self._settings = stream, examples, settings
        self._seed, self._max_tokens, self._world = seed, max_tokens, world
        self._refresh, self._write, self._record = refresh, write, record
        self._written: dict[int, list[Example]] = {}  # of the steps since the last refresh

    def is_written(self, step: int) -> bool:
        """Tell whether the student writes a step, the same on every rank."""
        return bool(np.random.default_rng([self._seed, _WHETHER, step]).random() < self._settings.on_policy_fraction)

    def waits(self, step: int) -> bool:
        """Tell whether a step's batches can only be made when the step before it has been taken."""
        return self.is_written(step) and step not in self._written

    def steps(self, first: int = 0) -> Iterator[list[PackedBatch]]:
        """Yield the micro-batches of the step after `first`, the next step, and so on without end."""
        numbered = enumerate(self._stream.indices(), start=1)
        while True:
            block = list(islice(numbered, self._settings.refresh_steps))
            for step, chosen in block:
                if step <= first:
                    continue
                if not self.is_written(step):
                    yield self._stream.cut(chosen)
                    continue
                if step not in self._written:
                    self._write_block([(one, asked) for one, asked in block if one >= step and self.is_written(one)])
                yield self._stream.cut_examples(self._written[step])

    def _write_block(self, block: Sequence[tuple[int, NDArray[np.int64]]]) -> None:
        """Answer the prompts of some steps; each chunk of them by one rank, and every rank gets all."""
        started = time.perf_counter()
        self._refresh()
        size = self._settings.batch_size
        prompts = {step: [prompt_of(self._examples[int(index)]) for index in chosen] for step, chosen in block}
        chunks = []
        for step, asked in prompts.items():
            order = sorted(range(len(asked)), key=[(len(one), place) for place, one in enumerate(asked)].__getitem__)
            chunks += [(step, order[first : first + size]) for first in range(0, len(order), size)]
        mine: list[int] = []
        for number in range(self._world.rank, len(chunks), self._world.size):
            step, places = chunks[number]
            answers = self._answer([prompts[step][place] for place in places], step, number)
            for place, answer in zip(places, answers, strict=True):
                mine += [step, place, len(answer), *answer]
        self._written = {step: [_nothing()] * len(asked) for step, asked in prompts.items()}
        told = [_read(said) for said in self._world.gather(mine)]
        for step, place, answer in (one for said in told for one in said):
            self._written[step][place] = join(prompts[step][place], answer)
        tokens = sum(len(answer) for said in told for _, _, answer in said)
        spent = time.perf_counter() - started
        self._record({"step": block[0][0], "answers": sum(map(len, prompts.values())), "tokens": tokens, "s": spent})

    def _answer(self, prompts: Sequence[list[int]], step: int, number: int) -> list[list[int]]:
        room = [self._max_tokens - len(prompt) for prompt in prompts]
        seed = int(np.random.SeedSequence([self._seed, _WHAT, step, number]).generate_state(1)[0])
        answers = self._write(prompts, min(self._settings.max_new_tokens, max(room)), seed)
        return [answer[:most] for answer, most in zip(answers, room, strict=True)]

    def state(self, step: int) -> dict[str, Tensor]:
        """Return what was written for the steps after one, as flat tensors."""
        kept = [(one, example) for one, written in self._written.items() if one > step for example in written]
        if not kept:
            return {}
        return {
            "steps": torch.tensor([one for one, _ in kept]),
            "lengths": torch.tensor([len(example.tokens) for _, example in kept]),
            "tokens": torch.from_numpy(np.concatenate([example.tokens for _, example in kept])),
            "supervised": torch.from_numpy(np.concatenate([example.supervised for _, example in kept])),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state` returned."""
        self._written = {}
        if not state:
            return
        ends = np.cumsum(state["lengths"].numpy())[:-1]
        parts = (np.split(state[name].numpy(), ends) for name in ("tokens", "supervised"))
        for step, tokens, supervised in zip(state["steps"].tolist(), *parts, strict=True):
            self._written.setdefault(step, []).append(Example(tokens, supervised))


def prompt_of(example: Example) -> list[int]:
    """Return the tokens before the last run of supervised ones: what the last answer was given to."""
    learnt = example.supervised
    last = int(np.flatnonzero(learnt)[-1])
    before = np.flatnonzero(~learnt[:last])
    return [int(token) for token in example.tokens[: int(before[-1]) + 1]]


def join(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """Return a prompt and its answer as an example that learns the answer."""
    tokens = np.array([*prompt, *answer], dtype=np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(prompt))


def _nothing() -> Example:
    return Example(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.bool_))


def _read(said: Sequence[int]) -> list[tuple[int, int, list[int]]]:
    found, at = [], 0
    while at < len(said):
        step, place, length = said[at : at + 3]
        found.append((step, place, list(said[at + 3 : at + 3 + length])))
        at += 3 + length
    return found
