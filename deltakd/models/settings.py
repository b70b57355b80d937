"""What a recipe says about its models: which weights play which role, and how a new small model is made."""

from typing import Literal

from pydantic import Field

from deltakd.base.settings import Settings


class WeightsSettings(Settings):
    """One model: a local Hugging Face folder or a hub id."""

    weights: str = Field(description="A folder with config.json and *.safetensors, or a hub id.")
    revision: str | None = Field(None, description="A commit or tag on the hub.")
    load_in_8bit: bool = Field(
        False,
        description="Frozen models only: linear weights in 8 bit, one scale a row; head and embedding stay whole.",
    )


class LoraSettings(Settings):
    """Train low-rank adapters of the student's linear layers instead of its weights; the export has them merged."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0, description="The adapters' product counts alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1)
    layers: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="all-linear: every one but the head; or names, as [q_proj, v_proj]."
    )


class ModelsSettings(Settings):
    """The models of a run by role; the frozen ones are loaded only where the objective needs them."""

    student: WeightsSettings = Field(description="The model in training; its initial weights.")
    student_raw: WeightsSettings | None = Field(
        None, description="The frozen raw student; null: the student's initial weights."
    )
    teacher: WeightsSettings | None = Field(None, description="The fine-tuned teacher.")
    teacher_raw: WeightsSettings | None = Field(None, description="The teacher before its fine-tuning.")
    teachers: dict[str, WeightsSettings] = Field(
        default_factory=dict, description="More teachers; NAME is teacher.NAME in a mixture's weights."
    )
    teachers_raw: dict[str, WeightsSettings] = Field(
        default_factory=dict, description="Those before their fine-tuning; NAME is teacher_raw.NAME."
    )
    lora: LoraSettings | None = Field(None, description="Adapters for the student; null: all its weights are trained.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Precision of every forward pass; the optimizer's weights are float32 either way."
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="auto: flash_attention_2 where it is installed and the device fits, else sdpa; it is said."
    )
    trust_remote_code: bool = Field(
        False, description="Run code that comes with a model. Off unless you trust its author."
    )

    @property
    def roles(self) -> dict[str, WeightsSettings]:
        """Every model by its role; the raw student is by default what the student starts from."""
        alone = {"student": self.student, "student_raw": self.student_raw or self.student}
        alone |= {"teacher": self.teacher} if self.teacher else {}
        alone |= {"teacher_raw": self.teacher_raw} if self.teacher_raw else {}
        named = (("teacher", self.teachers), ("teacher_raw", self.teachers_raw))
        return alone | {f"{role}.{name}": given for role, group in named for name, given in group.items()}


def role_key(role: str) -> str:
    """Return where a role's settings stand in a recipe: `models.teacher`, `models.teachers.NAME`."""
    kind, _, name = role.partition(".")
    return f"models.{kind.replace('teacher', 'teachers')}.{name}" if name else f"models.{role}"


class NewModelSettings(Settings):
    """A new model with random weights, for worlds that bring no model of their own (the quickstart)."""

    architecture: Literal["qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2"] = "qwen2"
    tokenizer: str = Field(description="Folder of the tokenizer that the model speaks.")
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    max_positions: int = Field(4096, gt=0)
    tie_embeddings: bool = True
    head_rows: int | None = Field(None, description="Rows of the head; null: one per token. Larger ones stay unused.")
    seed: int = 0
