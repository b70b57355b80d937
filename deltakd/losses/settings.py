"""What a recipe says about the loss: which target, which divergence, how much of plain cross-entropy.

Formulas, bounds and sources of every name: docs/objectives.md.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from deltakd.base.errors import LossError
from deltakd.base.settings import Settings
from deltakd.losses.policy_settings import PolicyGradient

VERTICES = ("student", "teacher", "student_raw", "teacher_raw")
DIRECTIONS = {"forward": "forward_kl", "reverse": "reverse_kl"}
# v1..v8: the vertices in order, forward before reverse. The numbering is this project's own.
VARIANTS = {
    f"v{2 * row + column + 1}": (vertex, direction)
    for row, vertex in enumerate(VERTICES)
    for column, direction in enumerate(DIRECTIONS)
}
Vertex = Literal["student", "teacher", "student_raw", "teacher_raw"]
Variant = Literal["v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8"]


class AlphaSchedule(Settings):
    """Alpha moves from the target's `alpha` to `end`, and stays there."""

    end: float = Field(description="Alpha after the last step of the schedule.")
    steps: int | None = Field(None, gt=0, description="Optimizer steps that it takes; null: all of train.steps.")
    shape: Literal["linear", "cosine"] = "linear"

    def value(self, start: float, fraction: float) -> float:
        """Return alpha after `fraction` (0 to 1) of the schedule."""
        if self.shape == "cosine":
            from math import cos, pi

            fraction = (1 - cos(pi * fraction)) / 2
        return start + (self.end - start) * fraction


class TeacherTarget(Settings):
    """The fine-tuned teacher itself: plain distillation."""

    name: Literal["teacher"] = "teacher"


class DeltaTarget(Settings):
    """The teacher's fine-tuning shift, applied to the student's own starting point. Source: 2509.14526, Eq. 8."""

    name: Literal["delta"]
    alpha: float = Field(
        0.5, description="Unitless. 0 with anchor teacher is the teacher itself; above 1 extrapolates."
    )
    schedule: AlphaSchedule | None = Field(None, description="Where alpha moves to; null: it stays.")
    anchor: Literal["teacher", "student"] = Field(
        "teacher",
        description="teacher: teacher * (student_raw / teacher_raw)^alpha, the paper's Eq. 8. "
        "student: student_raw * (teacher / teacher_raw)^alpha.",
    )


class MixtureTarget(Settings):
    """Any log-linear mixture of frozen models: softmax(sum of weight * logits)."""

    name: Literal["mixture"]
    weights: dict[str, float] = Field(
        min_length=1, description="By reference: teacher, teacher_raw, student_raw, teacher.NAME, teacher_raw.NAME."
    )

    @field_validator("weights")
    @classmethod
    def _some_frozen_weight(cls, weights: dict[str, float]) -> dict[str, float]:
        if "student" in weights:
            raise ValueError("student is in training and cannot be in a frozen mixture. Write student_raw, or taid")
        if "target" in weights:
            raise ValueError("target names the mixture itself. Write another name")
        if not any(weights.values()):
            raise ValueError("every weight is 0. Write at least one that is not")
        return weights


class ParallelogramTarget(Settings):
    """One vertex of `student * teacher_raw^alpha = teacher * student_raw^alpha` against the three others."""

    name: Literal["parallelogram"]
    variant: Variant | None = Field(None, description="Short for vertex and direction; v1 is Delta-KD.")
    vertex: Vertex = Field("student", description="The model that the other three are compared with.")
    direction: Literal["forward", "reverse"] | None = Field(
        None, description="forward: KL(P, Q), reverse: KL(Q, P), Q holding the student; null: the divergence decides."
    )
    alpha: float = 0.5
    schedule: AlphaSchedule | None = Field(None, description="Where alpha moves to; null: it stays.")

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, given: Any) -> Any:
        if not isinstance(given, dict) or str(given.get("variant")) not in VARIANTS:
            return given
        vertex, direction = VARIANTS[str(given["variant"])]
        named = {"vertex": vertex, "direction": direction}
        for key, value in named.items():
            if given.get(key) not in (None, value):
                raise ValueError(f"variant {given['variant']} is {key} {value}, not {given[key]}. Leave {key} out")
        return {**given, **named}

    @model_validator(mode="after")
    def _divides_by_alpha(self) -> "ParallelogramTarget":
        if self.vertex in ("student_raw", "teacher_raw"):
            end = self.alpha if self.schedule is None else self.schedule.end
            if self.alpha * end <= 0:
                raise ValueError(
                    f"vertex {self.vertex} divides by alpha, which is {self.alpha:g}"
                    f"{'' if self.schedule is None else f' and goes to {end:g}'}. "
                    "Write an alpha that is never 0, for example 0.5"
                )
        return self


class TaidTarget(Settings):
    """A mixture of the student itself (detached) and the teacher that moves to the teacher. Source: 2501.16937."""

    name: Literal["taid"]
    start: float = Field(0.4, ge=0.0, le=1.0, description="The teacher's weight t at the first step.")
    end: float = Field(1.0, ge=0.0, le=1.0, description="The largest t.")
    rate: float = Field(5.0e-4, ge=0.0, description="How much a falling loss may add to t in one step.")
    momentum: float = Field(0.99, ge=0.0, lt=1.0, description="Of the loss's relative change.")

    @model_validator(mode="after")
    def _rises(self) -> "TaidTarget":
        if self.end < self.start:
            raise ValueError(f"t rises from start {self.start:g}, but end is {self.end:g}. Write an end above start")
        return self


class PlainDivergence(Settings):
    """A divergence without parameters."""

    name: Literal["forward_kl", "reverse_kl", "reverse_cross_entropy", "tvd"] = Field(
        description="forward_kl: KL(target, student). reverse_kl: KL(student, target). reverse_cross_entropy: "
        "reverse_kl without the student's entropy, -E_student[log target]. tvd: half of sum |p - q|."
    )


class JsdDivergence(Settings):
    """beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q: the beta of GKD and TRL."""

    name: Literal["jsd"]
    beta: float = Field(
        0.5,
        gt=0.0,
        lt=1.0,
        description="The target's share of m. At both ends it vanishes; for the two KLs write forward_kl, reverse_kl.",
    )


class SkewDivergence(Settings):
    """skew_kl: KL(p, lam p + (1 - lam) q). skew_reverse_kl: KL(q, lam q + (1 - lam) p). Source: 2402.03898."""

    name: Literal["skew_kl", "skew_reverse_kl"]
    lam: float = Field(0.1, gt=0.0, lt=1.0, description="Share of the first argument in the second.")


class SymmetricDivergence(Settings):
    """weight KL(p, q) + (1 - weight) KL(q, p)."""

    name: Literal["symmetric_kl"]
    weight: float = Field(0.5, ge=0.0, le=1.0, description="Share of forward KL.")


class AdaptiveDivergence(Settings):
    """Forward and reverse KL, weighted by the gaps on the target's head and tail. Source: 2404.02657."""

    name: Literal["adaptive_kl"]
    mu: float = Field(0.5, gt=0.0, lt=1.0, description="The head: the most probable tokens up to this mass.")


class Support(Settings):
    """Which tokens both points are restricted to, and normalised over, in the divergence."""

    top_p: float = Field(gt=0.0, le=1.0, description="The smallest set of tokens that holds this mass of the target.")


Target = TeacherTarget | DeltaTarget | MixtureTarget | ParallelogramTarget | TaidTarget
Divergence = PlainDivergence | JsdDivergence | SkewDivergence | SymmetricDivergence | AdaptiveDivergence
WITH_REVERSE_KL = ("reverse_kl", "symmetric_kl", "adaptive_kl")
LOG_OF_TARGET = (*WITH_REVERSE_KL, "reverse_cross_entropy")  # infinite where the target rules a token out


class ObjectiveSettings(Settings):
    """L = sft_weight * cross-entropy + (1 - sft_weight) * divergence(target, student), per supervised token.

    A name alone stands for its mapping: `target: teacher`, `divergence: reverse_kl`.
    """

    target: Annotated[Target, Field(discriminator="name")] = TeacherTarget()
    divergence: Annotated[Divergence, Field(discriminator="name")] = PlainDivergence(name="forward_kl")
    sft_weight: float = Field(0.0, ge=0.0, le=1.0, description="Share of cross-entropy; 1 takes no teacher.")
    temperature: float = Field(1.0, gt=0.0, description="Divides both points' logits in the divergence only.")
    temperature_squared: bool = Field(False, description="Multiply the divergence by temperature^2 (Hinton et al.).")
    log_ratio_clip: float | None = Field(
        None, gt=0.0, description="Clamp log(q/p) to this size in the gradient of reverse KL; null: never."
    )
    support: Support | None = Field(None, description="Restrict the divergence to some tokens; null: all of them.")
    policy_gradient: PolicyGradient | None = Field(
        None, description="Learn tokens that the student drew by their rewards; on all others the loss stays as above."
    )
    chunk_tokens: int = Field(512, gt=0, description="Memory only: logits exist for this many tokens at a time.")

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = {key: {"name": value} if _is_name(key, value) else value for key, value in given.items()}
        direction = _direction(given.get("target"))
        if direction is None:
            return given
        divergence = given.setdefault("divergence", {"name": DIRECTIONS[direction]})
        name = divergence.get("name") if isinstance(divergence, dict) else getattr(divergence, "name", None)
        if name != DIRECTIONS[direction]:
            raise ValueError(
                f"the target's direction is {direction}, the divergence {name}. Write divergence: "
                f"{{name: {DIRECTIONS[direction]}}}, or give the vertex without variant and direction"
            )
        return given

    @model_validator(mode="after")
    def _draws_are_no_data(self) -> "ObjectiveSettings":
        if self.policy_gradient is not None and self.sft_weight:
            raise ValueError(
                f"sft_weight is {self.sft_weight:g}, but policy_gradient learns the student's own tokens. Write 0"
            )
        return self

    @model_validator(mode="after")
    def _clips_something(self) -> "ObjectiveSettings":
        if self.log_ratio_clip is not None and self.divergence.name not in WITH_REVERSE_KL:
            raise ValueError(
                f"log_ratio_clip acts on the gradient of reverse KL, which {self.divergence.name} has not. "
                f"Leave it out, or write one of {', '.join(WITH_REVERSE_KL)}"
            )
        return self


def _is_name(key: str, value: Any) -> bool:
    return key in ("target", "divergence") and isinstance(value, str)


def _direction(target: Any) -> str | None:
    if isinstance(target, ParallelogramTarget):
        return target.direction
    if not isinstance(target, dict) or target.get("name") != "parallelogram":
        return None
    direction = VARIANTS.get(str(target.get("variant")), (None, target.get("direction")))[1]
    return direction if str(direction) in DIRECTIONS else None


Weights = dict[str, float]


def start_alpha(target: Target) -> float:
    """Return what the target's moving number is at the first step: alpha, or the t of TAID; 0 where nothing moves."""
    if isinstance(target, DeltaTarget | ParallelogramTarget):
        return target.alpha
    return target.start if isinstance(target, TaidTarget) else 0.0


def point_weights(target: Target, alpha: float) -> tuple[Weights, Weights]:
    """Return the weights of the frozen point P and of the point Q that holds the student (docs/concepts.md: points)."""
    student = {"student": 1.0}
    if isinstance(target, TeacherTarget):
        return {"teacher": 1.0}, student
    if isinstance(target, MixtureTarget):
        return dict(target.weights), student
    if isinstance(target, TaidTarget):
        return {"student": 1.0 - alpha, "teacher": alpha}, student
    shift = {"student_raw": alpha, "teacher_raw": -alpha}
    if isinstance(target, DeltaTarget):
        if target.anchor == "student":
            return {"student_raw": 1.0, "teacher": alpha, "teacher_raw": -alpha}, student
        return {"teacher": 1.0} | shift, student
    if target.vertex == "student":
        return {"teacher": 1.0} | shift, student
    if target.vertex == "teacher":
        return {"teacher": 1.0}, student | {"student_raw": -alpha, "teacher_raw": alpha}
    if alpha == 0:
        raise LossError(f"alpha: 0, by which vertex {target.vertex} divides. Write an alpha that is never 0.")
    step = 1.0 / alpha
    if target.vertex == "student_raw":
        return {"student_raw": 1.0}, {"teacher_raw": 1.0, "student": step, "teacher": -step}
    return {"teacher_raw": 1.0}, {"student_raw": 1.0, "teacher": step, "student": -step}


def must_stay_apart(objective: ObjectiveSettings) -> str | None:
    """Say why frozen models cannot be summed into one target before they meet the student; None if they can."""
    if objective.policy_gradient is not None:
        return "its reward reads every model's own log-probabilities"
    of_p, of_q = point_weights(objective.target, start_alpha(objective.target) or 1.0)
    if "student" in of_p:
        return f"the target of {objective.target.name} moves with the student"
    if len(of_q) > 1:
        return f"the target of {objective.target.name} sets frozen models beside the student"
    return None


def needed_references(objective: ObjectiveSettings) -> frozenset[str]:
    """Name the frozen models, by role, whose distributions the objective reads; the others are never loaded."""
    if objective.sft_weight == 1.0:
        return frozenset()
    alphas = {start_alpha(objective.target)}
    if isinstance(objective.target, TaidTarget):
        alphas.add(objective.target.end)
    schedule = getattr(objective.target, "schedule", None)
    if schedule is not None:
        alphas.add(schedule.end)
    points = [weights for alpha in alphas for weights in point_weights(objective.target, alpha)]
    if objective.policy_gradient is not None:
        points.append(objective.policy_gradient.reward)
    return frozenset(name for weights in points for name, weight in weights.items() if weight and name != "student")
