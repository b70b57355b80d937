"""Answers to the prompts of some steps: a rank writes each chunk, all know all, the same for any number of ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltakd.base.ranks import World
from deltakd.data.examples import Example
from deltakd.rollout.settings import RolloutSettings

WHETHER, WHAT, AGAIN = 1, 2, 3  # keep the draws of one seed apart


@dataclass(frozen=True)
class Answer:
    """What was written to a prompt; `draws` float32 [2, tokens]: log-probabilities and importance weights."""

    tokens: list[int]
    draws: NDArray[np.float32] | None = None

    def cut(self, most: int) -> "Answer":
        """Return its first tokens."""
        return Answer(self.tokens[:most], None if self.draws is None else self.draws[:, :most])


Write = Callable[[Sequence[list[int]], int, int], list[Answer]]  # prompts, most new tokens and a seed to answers


@dataclass(frozen=True)
class Writer:
    """Shares prompts out among ranks."""

    settings: RolloutSettings
    seed: int
    max_tokens: int
    world: World
    write: Write
    heed: Callable[[], None] = lambda: None  # raises on all ranks together if they shall not go on

    def answer(self, prompts: Mapping[int, Sequence[list[int]]]) -> dict[int, list[Example]]:
        """Return, by step, each prompt with its answer as an example; call it on all ranks together."""
        size = self.settings.batch_size
        chunks = []
        for step, asked in prompts.items():
            order = sorted(range(len(asked)), key=[(len(one), place) for place, one in enumerate(asked)].__getitem__)
            chunks += [(step, order[first : first + size]) for first in range(0, len(order), size)]
        mine: list[tuple[int, int, Answer]] = []
        for first in range(0, len(chunks), self.world.size):
            self.heed()
            number = first + self.world.rank
            if number < len(chunks):
                step, places = chunks[number]
                answers = self._answer([prompts[step][place] for place in places], step, number)
                mine += [(step, place, answer) for place, answer in zip(places, answers, strict=True)]
        told = {(step, place): answer for said in self.world.gather(mine) for step, place, answer in said}
        return {
            step: [join(prompt, told[step, place]) for place, prompt in enumerate(asked)]
            for step, asked in prompts.items()
        }

    def _answer(self, prompts: Sequence[list[int]], step: int, number: int) -> list[Answer]:
        room = [self.max_tokens - len(prompt) for prompt in prompts]
        seed = int(np.random.SeedSequence([self.seed, WHAT, step, number]).generate_state(1)[0])
        answers = self.write(prompts, min(self.settings.max_new_tokens, max(room)), seed)
        return [answer.cut(most) for answer, most in zip(answers, room, strict=True)]


def prompt_of(example: Example) -> list[int]:
    """Return the tokens before the last run of supervised ones: what the last answer was given to."""
    learnt = example.supervised
    last = int(np.flatnonzero(learnt)[-1])
    before = np.flatnonzero(~learnt[:last])
    return [int(token) for token in example.tokens[: int(before[-1]) + 1]]


def join(prompt: Sequence[int], answer: Answer) -> Example:
    """Return a prompt and its answer as an example that learns the answer."""
    tokens = np.array([*prompt, *answer.tokens], dtype=np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(prompt), answer.draws)
