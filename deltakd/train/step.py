"""One optimizer step, whole, on one screen.

The loss is summed over supervised tokens and divided by their number on all ranks, so neither packing, accumulation nor
the number of ranks changes the gradient. Nothing is updated by a loss or a gradient that is not finite.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from deltakd.base.errors import RunError
from deltakd.base.processes import resident_bytes
from deltakd.base.ranks import World
from deltakd.data.packing import PackedBatch
from deltakd.engine.protocol import Engine
from deltakd.teacher.references import Payloads

Scored = Iterator[tuple[PackedBatch, Payloads]]


@dataclass(frozen=True)
class StepRecord:
    """One line of steps.jsonl. Losses are means per supervised token; times are this rank's, in seconds."""

    step: int
    loss: float
    cross_entropy: float
    divergence: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_supervised: int
    num_micro_batches: int
    step_s: float
    wait_s: float
    forward_backward_s: float
    update_s: float
    memory_bytes: int


def train_step(
    engine: Engine,
    world: World,
    schedule: Callable[[int], float],
    batches: Sequence[PackedBatch],
    scored: Scored,
    step: int,
) -> StepRecord:
    """Take one optimizer step on this rank's micro-batches; `scored` yields the same ones with their payloads.

    A teacher that fails raises: there is no training without it. Raises RunError before the update if loss or gradient
    is not finite.
    """
    started = time.perf_counter()
    wait_s = 0.0
    # A batch of which nothing is learnt is a blank one, for a rank that has nothing to do: its token is no data.
    learnt = [batch for batch in batches if batch.num_supervised]
    num_tokens, num_supervised = world.sum(
        [float(sum(batch.num_tokens for batch in learnt)), float(sum(batch.num_supervised for batch in learnt))]
    )
    if not num_supervised:
        raise RunError(f"step {step}: no supervised token on any rank. Look at the data's format and max_tokens.")
    sums = [0.0, 0.0, 0.0]
    asked = time.perf_counter()
    for index, (batch, payloads) in enumerate(islice(scored, len(batches)), start=1):
        wait_s += time.perf_counter() - asked
        result = engine.loss(batch.to(engine.device), payloads)
        engine.backward(result.total, weight=1 / num_supervised, last=index == len(batches))
        parts = (result.total.detach(), result.cross_entropy, result.divergence)
        sums = [total + float(part) for total, part in zip(sums, parts, strict=True)]
        asked = time.perf_counter()
    loss, cross_entropy, divergence = (total / num_supervised for total in world.sum(sums))
    grad_norm = engine.grad_norm()
    backward_end = time.perf_counter()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise RunError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; the weights were not updated. "
            "Lower train.learning_rate, or look at the data of this step."
        )
    learning_rate = schedule(step)
    engine.update(learning_rate, grad_norm)
    ended = time.perf_counter()
    return StepRecord(
        step=step,
        loss=loss,
        cross_entropy=cross_entropy,
        divergence=divergence,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_tokens=int(num_tokens),
        num_supervised=int(num_supervised),
        num_micro_batches=len(batches),
        step_s=ended - started,
        wait_s=wait_s,
        forward_backward_s=backward_end - started - wait_s,
        update_s=ended - backward_end,
        memory_bytes=resident_bytes(),
    )
