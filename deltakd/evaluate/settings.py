"""What a recipe says about evaluation: how many held-out prompts, and how answers are drawn."""

from pydantic import Field

from deltakd.base.settings import Settings


class EvaluationSettings(Settings):
    """Generation on held-out prompts, ROUGE on the answers, cross-entropy on the references."""

    num_prompts: int | None = Field(None, gt=0, description="The first prompts of data.validation; null: all.")
    max_new_tokens: int = Field(256, gt=0)
    batch_size: int = Field(16, gt=0)
    temperature: float = Field(0.0, ge=0, description="0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    num_resamples: int = Field(2000, gt=0, description="Bootstrap resamples over prompts for the paired intervals.")
    kept: dict[str, str | None] = Field(
        default_factory=dict,
        description="Name -> file of raw-domain or held-out rows; the cross-entropy on them tells what a model kept. "
        "null leaves an inherited one out.",
    )


class CompareSettings(Settings):
    """Which models one table compares, and against which of them the differences are taken."""

    models: dict[str, str] = Field(min_length=1, description="Label -> weights, in the table's order.")
    baseline: str = Field(description="The label that differences are taken against.")
    teacher: str | None = Field(
        None, description="The label that should beat the baseline; a warning when it does not."
    )
