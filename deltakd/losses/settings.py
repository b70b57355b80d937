"""What a recipe says about the loss: which target, which divergence, how much of plain cross-entropy."""

from typing import Annotated, Literal

from pydantic import Field

from deltakd.base.settings import Settings


class TeacherTarget(Settings):
    """The fine-tuned teacher itself: plain distillation."""

    name: Literal["teacher"] = "teacher"


class DeltaTarget(Settings):
    """The teacher's fine-tuning shift, applied to the student's own starting point (mathematics: the delta point)."""

    name: Literal["delta"]
    alpha: float = Field(
        0.5, description="Unitless. 0 with anchor teacher is the teacher itself; above 1 extrapolates."
    )
    anchor: Literal["teacher", "student"] = Field(
        "teacher",
        description="teacher: teacher * (student_raw / teacher_raw)^alpha, the paper's Eq. 8. "
        "student: student_raw * (teacher / teacher_raw)^alpha.",
    )


class Divergence(Settings):
    """How the student's distribution is compared with the target."""

    name: Literal["forward_kl", "reverse_kl"] = Field(
        "forward_kl", description="forward_kl: KL(target, student), bounded gradient. reverse_kl: KL(student, target)."
    )


class ObjectiveSettings(Settings):
    """L = sft_weight * cross-entropy + (1 - sft_weight) * divergence(target, student), per supervised token."""

    target: Annotated[TeacherTarget | DeltaTarget, Field(discriminator="name")] = TeacherTarget()
    divergence: Divergence = Divergence()
    sft_weight: float = Field(0.0, ge=0.0, le=1.0, description="Share of cross-entropy; 1 takes no teacher.")
    temperature: float = Field(1.0, gt=0.0, description="Divides both points' logits in the divergence only.")
    temperature_squared: bool = Field(False, description="Multiply the divergence by temperature^2 (Hinton et al.).")
    chunk_tokens: int = Field(512, gt=0, description="Memory only: logits exist for this many tokens at a time.")


def needed_references(objective: ObjectiveSettings) -> frozenset[str]:
    """Name the frozen models, by role, whose distributions the objective reads; the others are never loaded."""
    if objective.sft_weight == 1.0:
        return frozenset()
    if isinstance(objective.target, TeacherTarget):
        return frozenset({"teacher"})
    anchor, shift = {"teacher"}, {"student_raw", "teacher_raw"}
    if objective.target.anchor == "student":
        anchor, shift = {"student_raw"}, {"teacher", "teacher_raw"}
    return frozenset(anchor | shift if objective.target.alpha != 0.0 else anchor)
