"""Whose tokens a step takes: the data's, new ones of the student, or older ones of it; decided by (seed, step) alone.

Every rank decides alike, whatever it is asked for: ranks that drew for themselves would wait for each other for ever.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from deltakd.rollout.settings import RolloutSettings
from deltakd.rollout.writing import WHETHER

Source = Literal["data", "written", "replayed"]


class Mixture:
    """The on-policy fraction as it moves, and what it makes of each step."""

    def __init__(self, settings: RolloutSettings, seed: int, num_steps: int) -> None:
        self._settings, self._seed, self.num_steps = settings, seed, num_steps
        self.fraction = settings.on_policy_fraction
        self._compared: float | None = None  # the validation loss that the next is held against

    def source(self, step: int, is_full: bool) -> Source:
        """Return whose tokens a step takes; `is_full`: the replay buffer has all that it can hold."""
        drawn = float(np.random.default_rng([self._seed, WHETHER, step]).random())
        if drawn >= self.fraction:
            return "data"
        if self._settings.replay is None or not is_full or drawn < self.fraction * self._fresh(step):
            return "written"
        return "replayed"

    def _fresh(self, step: int) -> float:
        assert self._settings.replay is not None
        gone = min(1.0, step / self.num_steps)
        return {"decreasing": 1 - gone, "constant": 0.5, "increasing": gone}[self._settings.replay.fresh]

    def observe(self, loss: float) -> None:
        """Take note of a validation: the fraction rises when the loss is clearly worse than at the last comparison."""
        rule = self._settings.adaptive
        if rule is None:
            return
        if self._compared is None:
            self._compared = loss
        elif loss >= self._compared + rule.tolerance:
            self.fraction, self._compared = min(1.0, self.fraction + rule.raise_by), loss

    def state(self) -> dict[str, float]:
        """Return what the decisions to come depend on, beside the step."""
        return {"fraction": self.fraction} | ({} if self._compared is None else {"compared": self._compared})

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from what `state` returned."""
        self.fraction = state.get("fraction", self.fraction)
        self._compared = state.get("compared")
