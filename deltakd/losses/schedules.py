"""How a target's number moves over the steps of a run: alpha by a schedule of the recipe, the t of TAID by the loss.

Every rank computes the same value: it depends on the step and on the step's loss over all ranks. Imports no torch.
"""

import math
from collections.abc import Mapping
from typing import Protocol

from deltakd.losses.settings import AlphaSchedule, TaidTarget, Target, start_alpha


class Alpha(Protocol):
    """The target's moving number."""

    def at(self, step: int) -> float:
        """Return the value of a step, counted from 1."""

    @property
    def final(self) -> float:
        """The value that the run ends with."""

    def foretold(self, step: int) -> float:
        """Return the value of a step to come; NaN where it depends on losses that are not known yet."""

    def observe(self, loss: float) -> None:
        """Take note of the divergence of the step just taken, a mean over all ranks' tokens."""

    def state(self) -> dict[str, float | None]:
        """Return what the values to come depend on, beside the step."""

    def restore(self, state: Mapping[str, float | None]) -> None:
        """Go on from what `state` returned."""


class ScheduledAlpha:
    """From the target's alpha to the schedule's end; without a schedule it stays."""

    def __init__(self, start: float, schedule: AlphaSchedule | None, num_steps: int) -> None:
        self._start, self._schedule = start, schedule
        self._steps = num_steps if schedule is None or schedule.steps is None else schedule.steps
        self._num_steps = num_steps

    @property
    def final(self) -> float:
        return self.at(self._num_steps)

    def at(self, step: int) -> float:
        if self._schedule is None:
            return self._start
        return self._schedule.value(self._start, min(1.0, (step - 1) / max(1, self._steps - 1)))

    def foretold(self, step: int) -> float:
        return self.at(step)

    def observe(self, loss: float) -> None:
        """Nothing: the schedule depends on the step alone."""

    def state(self) -> dict[str, float | None]:
        return {}

    def restore(self, state: Mapping[str, float | None]) -> None:
        """Nothing, as `observe`."""


class TaidAlpha:
    """t rises at least linearly from start to end, and faster while the loss falls. Source: TAID, 2501.16937."""

    def __init__(self, target: TaidTarget, num_steps: int) -> None:
        self._target, self._num_steps = target, num_steps
        self.t = target.start
        self.momentum = 0.0
        self.last: float | None = None

    @property
    def final(self) -> float:
        return self._target.end

    def at(self, step: int) -> float:
        line = self._target.start + (self._target.end - self._target.start) * (step - 1) / max(1, self._num_steps - 1)
        self.t = min(self._target.end, max(line, self.t))
        return self.t

    def foretold(self, step: int) -> float:
        return math.nan

    def observe(self, loss: float) -> None:
        if self.last:  # after a loss of exactly 0 there is nothing that another could be compared with
            change = (self.last - loss) / self.last
            self.momentum = self._target.momentum * self.momentum + (1 - self._target.momentum) * change
            # Not below -500: exp would overflow, and the sigmoid is 0 there anyway.
            pull = 1 / (1 + math.exp(-max(self.momentum, -500.0)))
            self.t = min(self._target.end, self.t + self._target.rate * pull * (1 - self.t))
        self.last = loss

    def state(self) -> dict[str, float | None]:
        return {"t": self.t, "momentum": self.momentum, "last": self.last}

    def restore(self, state: Mapping[str, float | None]) -> None:
        self.t, self.momentum = float(state["t"] or 0.0), float(state["momentum"] or 0.0)
        self.last = state["last"]


def alpha_over_steps(target: Target, num_steps: int) -> Alpha:
    """Return how the target's number moves in a run of `num_steps` steps."""
    if isinstance(target, TaidTarget):
        return TaidAlpha(target, num_steps)
    return ScheduledAlpha(start_alpha(target), getattr(target, "schedule", None), num_steps)
