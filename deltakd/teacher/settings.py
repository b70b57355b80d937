"""What a recipe says about the frozen models' side: what they send, who serves them, how patient everyone is."""

from typing import Literal

from pydantic import Field

from deltakd.base.settings import Settings


class ReferencesSettings(Settings):
    """How the frozen models' words reach the loss."""

    source: Literal["service", "in_process"] = Field(
        "service",
        description="service: teacher ranks in processes of their own. in_process: loaded beside the student.",
    )
    payload: Literal["hidden", "logits"] = Field(
        "hidden", description="hidden: last hidden states, the student owns the frozen heads. logits: whole vocabulary."
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="Precision of the payload.")


class TeachersSettings(Settings):
    """The teacher ranks of one node."""

    per_node: int = Field(1, gt=0, description="How many processes of a node serve; the others train.")
    look_ahead: int = Field(2, ge=0, description="Micro-batches requested beyond the one in training.")
    start_s: float = Field(600.0, gt=0, description="How long a teacher may take to load its models.")
    answer_s: float = Field(300.0, gt=0, description="How long one answer may take before the run stops.")
