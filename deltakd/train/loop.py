"""One loop for every method: what differs is the stream of batches and the objective, and both are parts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, tee

from deltakd.base.ranks import World
from deltakd.data.packing import PackedBatch
from deltakd.engine.protocol import Engine
from deltakd.losses.schedules import Alpha
from deltakd.teacher.references import References
from deltakd.train.step import StepRecord, train_step


@dataclass(frozen=True)
class TrainParts:
    """What a training run is made of; every part is complete."""

    world: World
    engine: Engine
    references: References
    steps: Iterator[list[PackedBatch]]  # this rank's micro-batches, step by step, without end
    schedule: Callable[[int], float]
    alpha: Alpha
    num_steps: int


def train(parts: TrainParts, write: Callable[[StepRecord], None]) -> StepRecord:
    """Take all steps; `write` gets each record on rank 0. Returns the last record."""
    # Two readers of one stream: the references run ahead of the steps, across their boundaries.
    steps, upcoming = tee(islice(parts.steps, parts.num_steps))
    asked = ((batch, parts.alpha.foretold(step)) for step, batches in enumerate(upcoming, start=1) for batch in batches)
    scored = parts.references.ahead(asked)
    for step, batches in enumerate(steps, start=1):
        record = train_step(parts.engine, parts.world, parts.schedule, parts.alpha, batches, scored, step)
        if parts.world.rank == 0:
            write(record)
    return record
