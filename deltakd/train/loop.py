"""One loop for every method: what differs is the stream of batches and the objective, and both are parts.

Ranks stop together or not at all: before each micro-batch every rank says whether it can go on, since one that leaves
alone leaves the others in a collective. The state of the last whole step is then kept, and the same command continues.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, tee

from deltakd.base.errors import DeltaKDError, RunError, Stopped
from deltakd.base.ranks import World
from deltakd.data.packing import PackedBatch
from deltakd.engine.protocol import Engine
from deltakd.losses.schedules import Alpha
from deltakd.teacher.references import References
from deltakd.train.checkpoints import Checkpoints
from deltakd.train.step import NotFinite, Scored, StepRecord, train_step


@dataclass(frozen=True)
class TrainParts:
    """What a training run is made of; every part is complete."""

    world: World
    engine: Engine
    references: References
    steps: Callable[[int], Iterator[list[PackedBatch]]]  # this rank's micro-batches from a step on, without end
    schedule: Callable[[int], float]
    alpha: Alpha
    num_steps: int
    checkpoints: Checkpoints | None  # None: a training that keeps none
    stop: Callable[[], str | None] = lambda: None  # why this rank is asked to stop
    done: int = 0  # steps that a checkpoint holds


class Halt(Exception):
    """All ranks leave the step at the same micro-batch, each for its reason."""

    def __init__(self, reason: DeltaKDError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def train(parts: TrainParts, write: Callable[[StepRecord], None]) -> None:
    """Take the steps that are not done; `write` gets each record on rank 0.

    Raises Stopped, or what ended the run, with the last whole step kept.
    """
    # Two readers of one stream: the references run ahead of the steps, across their boundaries.
    steps, upcoming = tee(islice(parts.steps(parts.done), parts.num_steps - parts.done))
    first = parts.done + 1
    asked = ((batch, parts.alpha.foretold(step)) for step, batches in enumerate(upcoming, first) for batch in batches)
    scored = together(parts.world, parts.references.ahead(asked), parts.stop)
    for step, batches in enumerate(steps, first):
        try:
            record = train_step(parts.engine, parts.world, parts.schedule, parts.alpha, batches, scored, step)
        except Halt as halt:
            raise _kept(parts, step - 1, halt.reason) from None
        except NotFinite as error:
            if parts.checkpoints is not None:
                parts.checkpoints.keep_batches(step, batches)
            raise _kept(parts, step - 1, error) from None
        if parts.world.rank == 0:
            write(record)
        if parts.checkpoints is not None:
            parts.checkpoints.count(record.num_tokens, record.num_supervised)
            parts.checkpoints.save_if_due(step, last=step == parts.num_steps)


def together(world: World, scored: Scored, stop: Callable[[], str | None]) -> Scored:
    """Yield what `scored` does once every rank has its own; raises Halt on all of them if one cannot go on."""
    while True:
        failure = None
        try:
            pair = next(scored, None)
        except DeltaKDError as error:
            failure = error
        reason = stop()
        asked, failed = world.sum([float(reason is not None), float(not isinstance(failure, Stopped | None))])
        if failed:
            fault = None if isinstance(failure, Stopped) else failure
            raise Halt(fault or RunError("another student rank cannot go on. Its own line says why."))
        if asked:
            raise Halt(Stopped(f"stopped by {reason or 'a signal to another rank'}."))
        if pair is None:
            return
        yield pair


def _kept(parts: TrainParts, step: int, reason: DeltaKDError) -> DeltaKDError:
    """Keep the state after a step; returns why the run ends, with where it goes on."""
    if parts.checkpoints is None:
        return reason
    folder = parts.checkpoints.save(step)
    again = f"Kept {folder}; the same command goes on from there." if folder else "It had taken no step yet."
    return type(reason)(f"{reason} {again}")
