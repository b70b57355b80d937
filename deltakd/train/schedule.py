"""The learning rate of each step."""

import math
from collections.abc import Callable

from deltakd.train.settings import TrainSettings


def schedule(settings: TrainSettings) -> Callable[[int], float]:
    """Return the rate by step, counted from 1: linear warmup, then a cosine or a line to the floor, or constant."""

    def rate(step: int) -> float:
        if step <= settings.warmup_steps:
            return settings.learning_rate * step / settings.warmup_steps
        if settings.schedule == "constant":
            return settings.learning_rate
        done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
        floor = settings.learning_rate * settings.min_learning_rate_ratio
        done = min(1.0, done)
        share = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return floor + (settings.learning_rate - floor) * share

    return rate
