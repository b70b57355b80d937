"""What a recipe says about learning from the tokens that the student drew, by their rewards.

Formulas and sources: docs/objectives.md.
"""

from pydantic import Field, field_validator

from deltakd.base.settings import Settings


class PolicyGradient(Settings):
    """On tokens that the student drew: a reward for each, and PPO's loss. Sources: 2306.08543, 2602.12125."""

    reward: dict[str, float] = Field(
        min_length=1,
        description="Weights of the drawn token's log-probabilities: teacher, teacher_raw, student_raw, teacher.NAME, "
        "teacher_raw.NAME, and student as it was when it drew.",
    )
    reward_scale: float = Field(1.0, gt=0.0, description="Every reward is multiplied by it (MiniLLM: 2).")
    reward_clip: float | None = Field(None, gt=0.0, description="The largest size of a reward, scaled; null: any.")
    discount: float = Field(
        0.0, ge=0.0, le=1.0, description="What the next token's reward counts in a return; 0: each has its own alone."
    )
    own_reward: bool = Field(True, description="Whether a token's own reward is in its return, or only what follows.")
    length_normalised: bool = Field(False, description="Divide a return by the number of tokens it sums over.")
    whiten: bool = Field(False, description="Shift and scale a step's returns to mean 0 and variance 1.")
    ratio_clip: float | None = Field(
        0.2,
        gt=0.0,
        lt=1.0,
        description="How far q may move from where it drew before a token stops to count; null: any.",
    )
    importance_weights: bool = Field(
        True, description="Correct for what rollouts.teacher_mix draws from, inside the clip."
    )
    divergence_weight: float = Field(
        0.0, ge=0.0, description="How much of the divergence, exact over the vocabulary, is added (MiniLLM: 1)."
    )

    @field_validator("reward")
    @classmethod
    def _some_weight(cls, reward: dict[str, float]) -> dict[str, float]:
        if not any(weight for name, weight in reward.items() if name != "student"):
            raise ValueError("no frozen model has a weight. Write for example {teacher: 1, student: -1}")
        return reward
