"""What a recipe says about the engine: who shards the student, and which optimizer moves it."""

from typing import Literal

from pydantic import Field

from deltakd.base.settings import Settings

Offload = Literal["none", "optimizer", "all"]


class _SharedSettings(Settings):
    meet_s: float = Field(1800.0, gt=0, description="How long student ranks wait for each other at the start.")


class DeepSpeedSettings(_SharedSettings):
    """DeepSpeed ZeRO with AdamW: any number of student ranks."""

    name: Literal["deepspeed"]
    zero_stage: Literal[1, 2, 3] = Field(
        3, description="What the student ranks share out: 1 optimizer state, 2 gradients as well, 3 weights as well."
    )
    offload: Offload = Field(
        "none", description="What waits in host memory: the optimizer's state, or weights as well (stage 3)."
    )


class Fsdp2Settings(_SharedSettings):
    """PyTorch's FSDP2 with AdamW: any number of student ranks; shares out what ZeRO-3 does."""

    name: Literal["fsdp2"]
    offload: Literal["none", "all"] = Field("none", description="all: weights and optimizer state wait in host memory.")


class SingleSettings(Settings):
    """Plain torch in one process: for small models and for comparison."""

    name: Literal["single"]
