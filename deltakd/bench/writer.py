"""A rank of `bench rollouts`: a student under ZeRO-3 that answers prompts, with a whole copy and without, in turns.

torch.distributed.run starts as many as there are students. Before each round the student trains: the copy is then
as stale as it is in a run, and the engine as a step leaves it. Rank 0 writes a line for each round.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from deltakd.base.errors import RunError
from deltakd.base.processes import end_with_launchers, use_threads
from deltakd.base.ranks import World, assign_role, read_placement
from deltakd.base.rundir import RunDirectory
from deltakd.bench.rollouts import LINES
from deltakd.data.examples import ExampleSet
from deltakd.evaluate.generate import write_tokens
from deltakd.evaluate.settings import SamplingSettings
from deltakd.recipe.build import build_parts, meet
from deltakd.recipe.inputs import Inputs, read_examples, read_inputs
from deltakd.recipe.load import load
from deltakd.recipe.rollouts import load_copy
from deltakd.rollout.writing import prompt_of
from deltakd.train.loop import TrainParts
from deltakd.train.step import Scored, train_step

WARM_UP_TOKENS = 2
Answers = list[list[int]]


class Arms:
    """The two ways to write the same answers, each timed over all ranks together, in seconds."""

    def __init__(self, inputs: Inputs, parts: TrainParts, prompts: Sequence[list[int]]) -> None:
        self._engine, self._world, self._prompts = parts.engine, parts.world, prompts
        self._copy, self._refresh = load_copy(inputs, parts.engine)
        # No row of the head has this id: no answer ends early. As prompts are of one length, none is padded with it.
        self._never = int(self._copy.config.vocab_size)

    def copy(self, settings: SamplingSettings) -> tuple[dict[str, float], Answers]:
        """Refresh the copy and write with it: what a recipe's rollouts do."""
        _, refresh_s = timed(self._world, self._refresh)
        answers, write_s = timed(self._world, lambda: self._write(self._copy, settings, synced=False))
        return {"refresh_s": refresh_s, "copy_write_s": write_s}, answers

    def sharded(self, settings: SamplingSettings) -> tuple[dict[str, float], Answers]:
        """Write with the engine's own module, whose weights the ranks gather for every token: what validation does."""
        with self._engine.evaluating() as model:
            synced = self._world.size > 1
            answers, write_s = timed(self._world, lambda: self._write(model, settings, synced))
        return {"sharded_write_s": write_s}, answers

    def _write(self, model: Any, settings: SamplingSettings, synced: bool) -> Answers:
        answers = write_tokens(model, self._prompts, self._never, settings, synced=synced)
        if any(len(answer) != settings.max_new_tokens for answer in answers):
            raise RunError("bench rollouts: an answer ended early, so the arms cannot be compared. Report this.")
        return answers


def timed(world: World, work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what some work returns and the seconds from the moment all ranks begin to the moment all are done."""
    _settle(world)
    started = time.perf_counter()
    result = work()
    _settle(world)
    return result, time.perf_counter() - started


def _settle(world: World) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    world.barrier()


def own_prompts(examples: ExampleSet, each: int, world: World) -> list[list[int]]:
    """Return this rank's part of the first rows' prompts, the last tokens of each: as many as the shortest has."""
    indices = islice(cycle(range(len(examples))), each * world.size)
    prompts = [prompt_of(examples[index]) for index in indices]
    length = min(map(len, prompts))
    return [prompt[-length:] for prompt in prompts[world.rank :: world.size]]


def measure(arms: Arms, world: World, settings: SamplingSettings, number: int) -> dict[str, Any]:
    """Take one round: both arms, the order of which changes from round to round."""
    turns = [arms.copy, arms.sharded] if number % 2 else [arms.sharded, arms.copy]
    seconds: dict[str, float] = {}
    written = []
    for turn in turns:
        spent, answers = turn(settings)
        seconds |= spent
        written.append(answers)
    # Sampled by one seed from the same weights: a copy that had missed a step would soon write something else.
    alike = sum(one == other for one, other in zip(*written, strict=True))
    tokens, same = world.sum([float(sum(map(len, written[0]))), float(alike)])
    return {"tokens": int(tokens), "same_answers": int(same), **seconds}


def main(recipe: str, each: str, rounds: str, train_steps: str, *overrides: str) -> None:
    """Measure `rounds` rounds of `each` prompts a rank; the recipe says how answers are drawn.

    DeepSpeed takes all between the beginnings of two steps for one step, records the order of its modules and plans by
    it when to let go of weights. With one micro-batch before a round, that plan holds the writing as well: it may take
    minutes to make, and keeps weights whole while every round writes as many tokens. After two it is of a step alone.
    """
    end_with_launchers()
    use_threads()
    loaded = load(recipe, overrides)
    role = assign_role(read_placement(os.environ), 0)
    inputs = read_inputs(loaded.recipe, loaded.where)
    examples = read_examples(loaded.recipe, inputs.tokenizer, progress=False)
    world = meet(loaded.recipe, role)
    parts = build_parts(inputs, examples, role, world, None)
    prompts = own_prompts(examples, int(each), world)
    rollouts, arms = loaded.recipe.rollouts, Arms(inputs, parts, prompts)
    settings = rollouts.sampling(rollouts.max_new_tokens, loaded.recipe.seed)
    run = RunDirectory(Path(loaded.recipe.directory))
    steps = enumerate(parts.steps(0), start=1)
    for number in range(int(rounds) + 1):
        for step, batches in islice(steps, int(train_steps)):
            scored: Scored = iter([(batch, {}) for batch in batches])
            train_step(parts.engine, world, parts.schedule, parts.alpha, batches, scored, step)
        if not number:  # not counted: torch and transformers do some things once
            measure(arms, world, settings.model_copy(update={"max_new_tokens": WARM_UP_TOKENS}), number)
            continue
        line = measure(arms, world, settings, number) | {"prompt_tokens": len(prompts[0])}
        if role.rank == 0:
            run.append(LINES, line)


if __name__ == "__main__":
    main(*sys.argv[1:])
