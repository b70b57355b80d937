"""What drawn tokens are worth: rewards from what the models say of them, returns, and returns whitened over a step.

Frozen models are asked once: what they say of a micro-batch gives both its rewards and, where the objective wants one,
its divergence. Whitening needs the whole step's rewards before its first gradient; the step's payloads are then kept.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from deltakd.base.ranks import World
from deltakd.data.packing import PackedBatch
from deltakd.losses.frozen import Reference
from deltakd.losses.points import STUDENT
from deltakd.losses.policy import log_probs_of, returns, rewards, whiten
from deltakd.losses.policy_settings import PolicyGradient
from deltakd.teacher.references import Payloads

Pair = tuple[PackedBatch, Payloads]


class Advantages:
    """Says of each drawn token of a step what it was worth, on all ranks together."""

    def __init__(self, settings: PolicyGradient, world: World, vocab_size: int) -> None:
        self._settings, self._world, self._vocab_size = settings, world, vocab_size
        self.mean_reward: float | None = None  # of the last step's drawn tokens, over all ranks

    def weigh(self, scored: Iterator[Pair]) -> Iterator[Pair]:
        """Yield a step's micro-batches with their advantages; tokens that nobody drew pass through."""
        earned = [0.0, 0.0]
        if not self._settings.whiten:
            yield from (self._weigh_one(batch, payloads, earned) for batch, payloads in scored)
            self._note(earned)
            return
        kept = [self._weigh_one(batch, self._kept(payloads), earned) for batch, payloads in scored]
        self._note(earned)
        drawn = [batch.draws[2].double() for batch, _ in kept if batch.draws is not None]
        num, total = self._world.sum([float(sum(map(len, drawn))), float(sum(one.sum() for one in drawn))])
        mean = total / max(num, 1)
        (squares,) = self._world.sum([float(sum((one - mean).square().sum() for one in drawn))])
        for batch, payloads in kept:
            if batch.draws is not None:
                white = whiten(batch.draws[2], mean, squares / max(num, 1))
                batch = replace(batch, draws=torch.stack([*batch.draws[:2], white]))
            yield batch, payloads

    def _weigh_one(self, batch: PackedBatch, payloads: Payloads, earned: list[float]) -> Pair:
        if batch.draws is None:
            return batch, payloads
        said: dict[str, Tensor] = {STUDENT: batch.draws[0]}
        for name, weight in self._settings.reward.items():
            if weight and name != STUDENT:
                said[name] = self._said(batch, payloads, name).to(batch.draws)
        earned_here = rewards(said, self._settings)
        earned[0] += float(earned_here.sum())
        earned[1] += len(earned_here)
        worth = returns(earned_here, answer_lengths(batch), self._settings)
        return replace(batch, draws=torch.stack([*batch.draws[:2], worth])), payloads

    def _said(self, batch: PackedBatch, payloads: Payloads, name: str) -> Tensor:
        part = payloads[name]
        assert isinstance(part, Tensor | tuple)  # an estimate of the whole target names no model; see recipe/checks.py
        device = part.device if isinstance(part, Tensor) else part[0].device
        return log_probs_of(batch.labels.to(device), part, self._vocab_size)

    def _kept(self, payloads: Payloads) -> Payloads:
        """Copy what lies in a slot that the next micro-batch will take; heads stay where they are."""

        def copy(part: Reference) -> Reference:
            if isinstance(part, tuple):
                return part[0].clone(), part[1]
            return part.clone() if isinstance(part, Tensor) else part

        return {name: copy(part) for name, part in payloads.items()}

    def _note(self, earned: list[float]) -> None:
        total, num = self._world.sum(earned)
        self.mean_reward = total / num if num else None


def answer_lengths(batch: PackedBatch) -> list[int]:
    """Return how many supervised tokens each document has, in order; documents without any are left out."""
    document = torch.searchsorted(batch.starts, batch.supervised, right=True) - 1
    return [count for count in torch.bincount(document).tolist() if count]
