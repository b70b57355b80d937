"""What a recipe says about tokens that the student writes itself."""

from typing import Literal

from pydantic import Field

from deltakd.base.settings import Settings
from deltakd.evaluate.settings import DrawSettings, SamplingSettings


class AdaptiveSettings(Settings):
    """Raises the on-policy fraction when the validation loss gets worse. Source: DistiLLM, 2402.03898."""

    raise_by: float = Field(0.1, gt=0, le=1, description="Added to the fraction each time; it ends at 1.")
    tolerance: float = Field(
        0.1, ge=0, description="It is raised when the loss is this far above the one it was last compared with."
    )


class ReplaySettings(Settings):
    """Keeps what the student wrote and learns it again instead of writing anew each time. Source: DistiLLM."""

    capacity: int = Field(1000, gt=0, description="Answers kept; the oldest go.")
    fresh: Literal["decreasing", "constant", "increasing"] = Field(
        "decreasing",
        description="Of on-policy steps the share that is written anew once the buffer is full: falling from all to "
        "none over the run, a half, or rising from none to all. The others are drawn from the buffer.",
    )


class RolloutSettings(DrawSettings):
    """On-policy steps: the prompts of the step's examples, answered by the student as it stands (GKD, 2306.13649).

    Draws come from the recipe's `seed` and the step.
    """

    on_policy_fraction: float = Field(
        0.0, ge=0, le=1, description="Share of steps that the student writes; 0: none. With `adaptive` its start."
    )
    refresh_steps: int = Field(
        8, gt=0, description="The copy of the student that writes takes its weights before every so many steps."
    )
    temperature: float = Field(1.0, ge=0, description="0: greedy.")
    teacher_mix: float = Field(
        0.0, ge=0, lt=1, description="Share of the teacher in what tokens are drawn from, which every rank then loads."
    )
    adaptive: AdaptiveSettings | None = Field(None, description="How the fraction rises; null: it stays.")
    replay: ReplaySettings | None = Field(None, description="A buffer of what was written; null: none.")

    def sampling(self, max_new_tokens: int, seed: int) -> SamplingSettings:
        """Return how some answers are drawn."""
        chosen = self.model_dump(include=set(DrawSettings.model_fields))
        return SamplingSettings(**chosen | {"max_new_tokens": max_new_tokens, "seed": seed})

    @property
    def are_written(self) -> bool:
        """Whether the student ever writes."""
        return self.on_policy_fraction > 0 or self.adaptive is not None
