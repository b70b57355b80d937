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


class Clock:
    """Where a step's time goes: each mark adds the time since the last one to a name."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._spent = dict.fromkeys(("wait_s", "forward_backward_s", "update_s"), 0.0)

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self._spent[name] += now - self._last
        self._last = now

    def seconds(self) -> tuple[float, float, float, float]:
        """Return the whole, waiting, forward and backward, and update."""
        spent = self._spent
        return self._last - self._started, spent["wait_s"], spent["forward_backward_s"], spent["update_s"]


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
    clock = Clock()
    num_tokens, num_supervised = count_tokens(world, batches, step)
    sums = [0.0, 0.0, 0.0]
    clock.mark("forward_backward_s")
    for index, (batch, payloads) in enumerate(islice(scored, len(batches)), start=1):
        clock.mark("wait_s")
        result = engine.loss(batch.to(engine.device), payloads)
        engine.backward(result.total, weight=1 / num_supervised, last=index == len(batches))
        parts = (result.total.detach(), result.cross_entropy, result.divergence)
        sums = [total + float(part) for total, part in zip(sums, parts, strict=True)]
        clock.mark("forward_backward_s")
    loss, cross_entropy, divergence = (total / num_supervised for total in world.sum(sums))
    grad_norm = engine.grad_norm()
    require_finite(step, loss, grad_norm)
    learning_rate = schedule(step)
    clock.mark("forward_backward_s")
    engine.update(learning_rate, grad_norm)
    clock.mark("update_s")
    counts = (num_tokens, num_supervised, len(batches))
    losses = (loss, cross_entropy, divergence)
    return StepRecord(step, *losses, grad_norm, learning_rate, *counts, *clock.seconds(), resident_bytes())


def count_tokens(world: World, batches: Sequence[PackedBatch], step: int) -> tuple[int, int]:
    """Return a step's tokens and supervised tokens over all ranks; raises RunError if nothing is to be learnt."""
    # A batch of which nothing is learnt is a blank one, for a rank that has nothing to do: its token is no data.
    learnt = [batch for batch in batches if batch.num_supervised]
    num_tokens, num_supervised = world.sum(
        [float(sum(batch.num_tokens for batch in learnt)), float(sum(batch.num_supervised for batch in learnt))]
    )
    if not num_supervised:
        raise RunError(f"step {step}: no supervised token on any rank. Look at the data's format and max_tokens.")
    return int(num_tokens), int(num_supervised)


def require_finite(step: int, loss: float, grad_norm: float) -> None:
    """Raise RunError unless loss and gradient norm are finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise RunError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; the weights were not updated. "
            "Lower train.learning_rate, or look at the data of this step."
        )
