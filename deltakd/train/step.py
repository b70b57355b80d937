"""One optimizer step, whole, on one screen.

The loss is summed over supervised tokens and divided by their number on all ranks, so neither packing, accumulation nor
the number of ranks changes the gradient. Nothing is updated by a loss or a gradient that is not finite.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from deltakd.base.errors import RunError
from deltakd.base.processes import resident_bytes
from deltakd.base.ranks import World
from deltakd.data.packing import PackedBatch
from deltakd.engine.protocol import Engine
from deltakd.losses.schedules import Alpha
from deltakd.teacher.references import Payloads

RECORDED = ("loss", "cross_entropy", "divergence", "kl_to_target", "student_entropy", "target_entropy")
Scored = Iterator[tuple[PackedBatch, Payloads]]


@dataclass(frozen=True)
class StepRecord:
    """One line of steps.jsonl. Losses are means per supervised token; times are this rank's, in seconds.

    KL and entropies are None where the objective has no target, or only draws from it; alpha is the target's.
    """

    step: int
    loss: float
    cross_entropy: float
    divergence: float
    kl_to_target: float | None
    student_entropy: float
    target_entropy: float | None
    alpha: float
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


class NotFinite(RunError):
    """A loss or a gradient that is no number, on all ranks alike; nothing was updated."""


class Clock:
    """Where a step's time goes: each mark adds the time since the last one to a name."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._spent = dict.fromkeys(("wait_s", "forward_backward_s", "update_s"), 0.0)

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self._spent[name] += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Return the whole step's time and that of every name."""
        return {"step_s": self._last - self._started} | self._spent


def train_step(
    engine: Engine,
    world: World,
    schedule: Callable[[int], float],
    alpha: Alpha,
    batches: Sequence[PackedBatch],
    scored: Scored,
    step: int,
) -> StepRecord:
    """Take one optimizer step on this rank's micro-batches; `scored` yields the same ones with their payloads.

    A teacher that fails raises: there is no training without it. Raises NotFinite before the update if loss or
    gradient is not finite.
    """
    clock = Clock()
    num_tokens, num_supervised = count_tokens(world, batches, step)
    sums = [0.0] * len(RECORDED)
    step_alpha = alpha.at(step)
    clock.mark("forward_backward_s")
    for index, (batch, payloads) in enumerate(islice(scored, len(batches)), start=1):
        clock.mark("wait_s")
        result = engine.loss(batch.to(engine.device), payloads, step_alpha)
        engine.backward(result.total, weight=1 / num_supervised, last=index == len(batches))
        sums = [total + result.sum(name) for total, name in zip(sums, RECORDED, strict=True)]
        clock.mark("forward_backward_s")
    means: dict[str, Any] = dict(zip(RECORDED, (total / num_supervised for total in world.sum(sums)), strict=True))
    grad_norm = engine.grad_norm()
    require_finite(step, means["loss"], grad_norm)
    alpha.observe(means["divergence"])
    means = {name: None if math.isnan(mean) else mean for name, mean in means.items()}
    learning_rate = schedule(step)
    clock.mark("forward_backward_s")
    engine.update(learning_rate, grad_norm)
    clock.mark("update_s")
    return StepRecord(
        step=step,
        **means,
        alpha=step_alpha,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_tokens=num_tokens,
        num_supervised=num_supervised,
        num_micro_batches=len(batches),
        **clock.seconds(),
        memory_bytes=resident_bytes(),
    )


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
    """Raise NotFinite unless loss and gradient norm are finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NotFinite(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; the weights were not updated. "
            "Its micro-batches lie in faulty/. Look at them, or start a run with a lower train.learning_rate."
        )
