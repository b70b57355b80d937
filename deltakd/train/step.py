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
from deltakd.losses.linear import LinearLoss
from deltakd.losses.schedules import Alpha
from deltakd.teacher.references import Payloads
from deltakd.train.advantages import Advantages

RECORDED = ("cross_entropy", "policy", "divergence", "kl_to_target", "student_entropy", "target_entropy")
Scored = Iterator[tuple[PackedBatch, Payloads]]


@dataclass(frozen=True)
class StepRecord:
    """One line of steps.jsonl. Losses are means per supervised token; times are this rank's, in seconds.

    KL and entropies are None where the objective has no target, or only draws from it, and the divergence where drawn
    tokens learn by their rewards alone; alpha is the target's. policy
    and reward are of tokens that the student drew; corpus is the cross-entropy of plain text, which counts in the loss
    alone.
    """

    step: int
    loss: float
    cross_entropy: float
    policy: float | None
    reward: float | None
    corpus: float | None
    divergence: float | None
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
    advantages: Advantages | None = None,
) -> StepRecord:
    """Take one optimizer step on this rank's micro-batches; `scored` yields the same ones with their payloads.

    A teacher that fails raises: there is no training without it. Raises NotFinite before the update if loss or
    gradient is not finite.
    """
    clock = Clock()
    counts = count_tokens(world, batches, step)
    sums = Sums(counts)
    step_alpha = alpha.at(step)
    clock.mark("forward_backward_s")
    own = islice(scored, len(batches))
    for index, (batch, payloads) in enumerate(advantages.weigh(own) if advantages else own, start=1):
        clock.mark("wait_s")
        result = engine.loss(batch.to(engine.device), payloads, step_alpha)
        engine.backward(result.total, weight=counts.weight(batch), last=index == len(batches))
        sums.add(batch, result)
        clock.mark("forward_backward_s")
    means: dict[str, Any] = sums.means(world)
    grad_norm = engine.grad_norm()
    require_finite(step, means["loss"], grad_norm)
    if not math.isnan(means["divergence"]):  # drawn tokens may learn by their rewards alone
        alpha.observe(means["divergence"])
    means = {name: None if math.isnan(mean) else mean for name, mean in means.items()}
    learning_rate = schedule(step)
    clock.mark("forward_backward_s")
    engine.update(learning_rate, grad_norm)
    clock.mark("update_s")
    return StepRecord(
        step=step,
        **means,
        reward=advantages.mean_reward if advantages else None,
        alpha=step_alpha,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_tokens=counts.tokens,
        num_supervised=counts.supervised + counts.corpus,
        num_micro_batches=len(batches),
        **clock.seconds(),
        memory_bytes=resident_bytes(),
    )


@dataclass(frozen=True)
class Counts:
    """A step's tokens over all ranks: all, the supervised ones of its own, and those of plain text beside them."""

    tokens: int
    supervised: int
    corpus: int

    def weight(self, batch: PackedBatch) -> float:
        """Return what one token of a micro-batch counts in the loss."""
        if batch.corpus_weight is None:
            return 1 / self.supervised
        return batch.corpus_weight / max(self.corpus, 1)  # a blank one may be all there is


def count_tokens(world: World, batches: Sequence[PackedBatch], step: int) -> Counts:
    """Count a step's tokens over all ranks; raises RunError if nothing is to be learnt."""
    # A batch of which nothing is learnt is a blank one, for a rank that has nothing to do: its token is no data.
    learnt = [batch for batch in batches if batch.num_supervised]
    own = sum(batch.num_supervised for batch in learnt if batch.corpus_weight is None)
    plain = sum(batch.num_supervised for batch in learnt) - own
    num_tokens = sum(batch.num_tokens for batch in learnt)
    counts = Counts(*(int(count) for count in world.sum([float(num_tokens), float(own), float(plain)])))
    if not counts.supervised:
        raise RunError(f"step {step}: no supervised token on any rank. Look at the data's format and max_tokens.")
    return counts


class Sums:
    """Adds up what a step's micro-batches say, and takes means over all ranks' tokens."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._loss = self._corpus = 0.0
        self._own = [0.0] * len(RECORDED)

    def add(self, batch: PackedBatch, result: LinearLoss) -> None:
        loss = result.sum("loss")
        self._loss += self._counts.weight(batch) * loss
        if batch.corpus_weight is not None:
            self._corpus += loss
        else:
            self._own = [total + result.sum(name) for total, name in zip(self._own, RECORDED, strict=True)]

    def means(self, world: World) -> dict[str, float]:
        """Return loss, corpus and RECORDED, means per token; NaN where there is no such number."""
        loss, corpus, *own = world.sum([self._loss, self._corpus, *self._own])
        named = {name: total / self._counts.supervised for name, total in zip(RECORDED, own, strict=True)}
        return {"loss": loss, "corpus": corpus / (self._counts.corpus or math.nan)} | named


def require_finite(step: int, loss: float, grad_norm: float) -> None:
    """Raise NotFinite unless loss and gradient norm are finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NotFinite(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; the weights were not updated. "
            "Its micro-batches lie in faulty/. Look at them, or start a run with a lower train.learning_rate."
        )
