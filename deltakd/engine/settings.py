"""What a recipe says about the engine: who shards the student, and which optimizer moves it."""

from typing import Literal

from pydantic import Field

from deltakd.base.settings import Settings


class DeepSpeedSettings(Settings):
    """DeepSpeed ZeRO with AdamW: any number of student ranks."""

    name: Literal["deepspeed"]
    zero_stage: Literal[3] = Field(
        3, description="3 shards weights, gradients and optimizer state over the student ranks."
    )


class SingleSettings(Settings):
    """Plain torch in one process: for small models and for comparison."""

    name: Literal["single"]
