"""One loop for every method: what differs is the stream of batches and the objective, and both are parts.

Ranks stop together or not at all: before each micro-batch every rank says whether it can go on, since one that leaves
alone leaves the others in a collective. The state of the last whole step is then kept, and the same command continues.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import tee
from typing import Protocol

from deltakd.base.errors import DeltaKDError, PeerLost, Stopped
from deltakd.base.ranks import World
from deltakd.data.packing import PackedBatch
from deltakd.engine.protocol import Engine
from deltakd.losses.schedules import Alpha
from deltakd.teacher.references import References
from deltakd.train.advantages import Advantages
from deltakd.train.checkpoints import Checkpoints
from deltakd.train.step import NotFinite, Scored, StepRecord, train_step
from deltakd.train.validation import Sample, Validation, ValidationRecord

Steps = Callable[[int], Iterator[list[PackedBatch]]]  # a rank's micro-batches from a step on, without end


def never(step: int) -> bool:
    """Say of every step that its batches are there whatever the weights are."""
    return False


@dataclass(frozen=True)
class TrainParts:
    """What a training run is made of; every part is complete."""

    world: World
    engine: Engine
    references: References
    steps: Steps
    schedule: Callable[[int], float]
    alpha: Alpha
    num_steps: int
    checkpoints: Checkpoints | None  # None: a training that keeps none
    validation: Validation | None = None
    stop: Callable[[], str | None] = lambda: None  # why this rank is asked to stop
    done: int = 0  # steps that a checkpoint holds
    waits: Callable[[int], bool] = never  # whether a step's batches come of the weights before it
    advantages: Advantages | None = None  # what drawn tokens are worth, for objectives that ask
    heard: Callable[[float], None] = lambda loss: None  # who takes note of a validation's loss


class Recorder(Protocol):
    """Where the numbers of a run go."""

    def begins(self, step: int) -> None:
        """Hear that a step begins."""

    def write(self, record: StepRecord) -> None:
        """Take note of a step."""

    def validated(self, record: ValidationRecord, samples: list[Sample]) -> None:
        """Take note of a validation, with some of the answers."""


@dataclass(frozen=True)
class Task:
    """The next micro-batches of this rank: a step's, or those held out that are looked at after it."""

    step: int
    batches: list[PackedBatch]
    alpha: float  # as far as it can be foretold
    held_out: bool = False
    waits: bool = False  # nothing to compute: what follows is made of the weights as they then are


def tasks(
    steps: Steps,
    alpha: Alpha,
    num_steps: int,
    validation: Validation | None = None,
    done: int = 0,
    waits: Callable[[int], bool] = never,
) -> Iterator[Task]:
    """Yield everything that is still to be computed, in order."""

    def owed(step: int) -> Iterator[Task]:
        if validation is not None and validation.due(step):
            yield Task(step, validation.batches, validation.alpha, held_out=True)

    if validation is not None and validation.last_step < done:  # stopped between a step and its validation
        yield from owed(done)
    made = steps(done)
    for step in range(done + 1, num_steps + 1):
        if waits(step):
            yield Task(step, [], alpha.foretold(step), waits=True)
        yield Task(step, next(made), alpha.foretold(step))
        yield from owed(step)


class Halt(Exception):
    """All ranks leave the step at the same micro-batch, each for its reason."""

    def __init__(self, reason: DeltaKDError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def train(parts: TrainParts, records: Recorder | None) -> int:
    """Do what is not done and return the last step's number; rank 0 has `records`.

    Raises Stopped, or what ended the run, with the last whole step kept.
    """
    if parts.validation is not None and parts.validation.ended_at(parts.done):
        return parts.done
    # Two readers of one sequence: the references run ahead of the steps, across their boundaries.
    work, upcoming = tee(tasks(parts.steps, parts.alpha, parts.num_steps, parts.validation, parts.done, parts.waits))
    scored = together(parts.world, parts.references.ahead(_asked(upcoming)), parts.stop)
    task = Task(parts.done + 1, [], parts.alpha.foretold(parts.done + 1), waits=True)
    while True:
        try:
            if (upcoming_task := next(work, None)) is None:  # which may be written now, and that may be stopped
                return parts.done
            task = upcoming_task
            if task.waits:
                continue
            _do(parts, task, scored, records)
        except Halt as halt:
            raise _kept(parts, task.step if task.held_out else task.step - 1, halt.reason) from None
        except NotFinite as error:
            if parts.checkpoints is not None:
                parts.checkpoints.keep_batches(task.step, task.batches)
            raise _kept(parts, task.step - 1, error) from None
        validation, step = parts.validation, task.step
        if validation is not None and validation.due(step) and not task.held_out:
            continue  # its validation belongs to it
        ends = step == parts.num_steps or (validation is not None and validation.ended_at(step))
        if parts.checkpoints is not None:
            parts.checkpoints.save_if_due(step, ends)
        if ends:
            return step


def _asked(tasks: Iterator[Task]) -> Iterator[tuple[PackedBatch, float] | None]:
    """Yield each batch with its alpha, and None where nothing may be asked until all before it has been trained on."""
    for task in tasks:
        if task.waits:
            yield None
        yield from ((batch, task.alpha) for batch in task.batches)


def _do(parts: TrainParts, task: Task, scored: Scored, records: Recorder | None) -> None:
    if task.held_out and parts.validation is not None:
        listen = partial(_listen, parts)
        validated = parts.validation.take(parts.engine, parts.world, scored, task.step, listen)
        parts.heard(validated[0].loss)
        if records is not None:
            records.validated(*validated)
        return
    if records is not None:
        records.begins(task.step)
    given = (parts.schedule, parts.alpha, task.batches, scored, task.step, parts.advantages)
    record = train_step(parts.engine, parts.world, *given)
    if records is not None:
        records.write(record)
    if parts.checkpoints is not None:
        parts.checkpoints.count(record.num_tokens, record.num_supervised)


def together(world: World, scored: Scored, stop: Callable[[], str | None]) -> Scored:
    """Yield what `scored` does once every rank has its own; raises Halt on all of them if one cannot go on."""
    while True:
        failure = None
        try:
            pair = next(scored, None)
        except DeltaKDError as error:
            failure = error
        heed(world, stop(), failure)
        if pair is None:
            return
        yield pair


def heed(world: World, reason: str | None, failure: DeltaKDError | None = None) -> None:
    """Hear whether every rank can go on; raises Halt on all of them if one cannot."""
    asked, failed = world.sum([float(reason is not None), float(not isinstance(failure, Stopped | None))])
    if failed:
        fault = None if isinstance(failure, Stopped) else failure
        raise Halt(fault or PeerLost("another student rank cannot go on. Its own line says why."))
    if asked:
        raise Halt(Stopped(f"stopped by {reason or 'a signal to another rank'}."))


def _listen(parts: TrainParts) -> None:
    heed(parts.world, parts.stop())


def _kept(parts: TrainParts, step: int, reason: DeltaKDError) -> DeltaKDError:
    """Keep the state after a step; returns why the run ends, with where it goes on."""
    if parts.checkpoints is None:
        return reason
    folder = parts.checkpoints.save(step)
    again = f"Kept {folder}; the same command goes on from there." if folder else "It had taken no step yet."
    return type(reason)(f"{reason} {again}")
