"""What a recipe says about tokens that the student writes itself."""

from pydantic import Field

from deltakd.evaluate.settings import SamplingSettings


class RolloutSettings(SamplingSettings):
    """On-policy steps: the prompts of the step's examples, answered by the student as it stands (GKD, 2306.13649)."""

    on_policy_fraction: float = Field(0.0, ge=0, le=1, description="Share of steps that the student writes; 0: none.")
    refresh_steps: int = Field(
        8, gt=0, description="The copy of the student that writes takes its weights before every so many steps."
    )
    temperature: float = Field(1.0, ge=0, description="0: greedy.")
