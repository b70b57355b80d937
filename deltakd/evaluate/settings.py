"""What a recipe says about answers: how they are drawn, which are held against references, which are kept as rows."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from deltakd.base.settings import Settings
from deltakd.data.settings import SourceSettings


class DrawSettings(Settings):
    """From what a model's answers are drawn."""

    max_new_tokens: int = Field(256, gt=0)
    batch_size: int = Field(16, gt=0)
    temperature: float = Field(0.0, ge=0, description="0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1)


class SamplingSettings(DrawSettings):
    """How a model's answers are drawn."""

    seed: int = Field(0, ge=0)


class EvaluationSettings(SamplingSettings):
    """Generation on held-out prompts, ROUGE on the answers, cross-entropy on the references."""

    num_prompts: int | None = Field(None, gt=0, description="The first prompts of data.validation; null: all.")
    num_resamples: int = Field(2000, gt=0, description="Bootstrap resamples over prompts for the paired intervals.")
    kept: dict[str, str | None] = Field(
        default_factory=dict,
        description="Name -> file of raw-domain or held-out rows; the cross-entropy on them tells what a model kept. "
        "null leaves an inherited one out.",
    )


class GenerationSettings(SamplingSettings):
    """How responses are written that are kept as rows to train on."""

    num_prompts: int | None = Field(None, gt=0, description="The first prompts; null: all.")
    per_prompt: int = Field(1, gt=0, description="Responses to each prompt; above 1 they must be sampled.")
    unended: Literal["drop", "keep"] = Field(
        "drop", description="What becomes of a response that max_new_tokens cut off: kept, it is learnt as ended there."
    )
    backend: Literal["auto", "transformers", "vllm"] = Field(
        "auto", description="Who writes; auto: vllm where it is installed and a GPU is there, else transformers."
    )

    @model_validator(mode="after")
    def _several_are_sampled(self) -> "GenerationSettings":
        if self.per_prompt > 1 and not self.temperature:
            raise ValueError(
                f"per_prompt is {self.per_prompt} with temperature 0: all would be alike. Write 1, or a temperature"
            )
        return self


class ResponsesSettings(Settings):
    """Who writes responses, and to which prompts."""

    model: str = Field("teacher", description="A model of this recipe by its role, or a folder or hub id.")
    rows: SourceSettings | None = Field(None, description="Where the prompts come from; null: data.train.")


def _without_null(models: Any) -> Any:
    """Leave out what a recipe that extends another sets to null."""
    return {label: one for label, one in models.items() if one is not None} if isinstance(models, Mapping) else models


class CompareSettings(Settings):
    """Which models one table compares, and against which of them the differences are taken."""

    models: Annotated[dict[str, str], BeforeValidator(_without_null, json_schema_input_type=dict[str, str | None])] = (
        Field(
            min_length=1,
            description="Label -> weights, in the table's order. null leaves an inherited one out.",
        )
    )
    baseline: str = Field(description="The label that differences are taken against.")
    teacher: str | None = Field(
        None,
        description="The label that should beat the baseline, with a warning when it does not. Every model's KL "
        "to it is taken.",
    )
