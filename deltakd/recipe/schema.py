"""The whole recipe as one frozen tree: which models, which target, on whose tokens, delivered how, trained by what.

Imports no torch. Defaults live here and in the settings beside each part, nowhere else.
"""

from typing import Annotated, Any

from pydantic import Field, model_validator

from deltakd.base.settings import Settings
from deltakd.data.settings import DataSettings, TokenizerSettings, WorldSettings
from deltakd.engine.settings import DeepSpeedSettings, Fsdp2Settings, SingleSettings
from deltakd.evaluate.settings import CompareSettings, EvaluationSettings, GenerationSettings, ResponsesSettings
from deltakd.losses.settings import ObjectiveSettings
from deltakd.models.settings import ModelsSettings, NewModelSettings
from deltakd.rollout.settings import RolloutSettings
from deltakd.teacher.settings import ReferencesSettings, TeachersSettings
from deltakd.train.settings import CheckpointsSettings, RecordsSettings, TrainSettings, ValidationSettings

EngineSettings = Annotated[DeepSpeedSettings | Fsdp2Settings | SingleSettings, Field(discriminator="name")]

STAGE_KINDS = ("world", "tokenizer", "model", "generate", "train", "evaluate")


class StageSettings(Settings):
    """One stage of `deltakd run`: a name and exactly one of the kinds below. Finished stages are skipped."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="Also its folder under root.")
    world: WorldSettings | None = Field(None, description="Write the generated world's rows.")
    tokenizer: TokenizerSettings | None = Field(None, description="Train a tokenizer on rows.")
    model: NewModelSettings | None = Field(None, description="Write a new model with random weights.")
    generate: ResponsesSettings | None = Field(None, description="Have a model write responses, as rows to train on.")
    train: dict[str, Any] | None = Field(None, description="Train: what differs from this recipe, as a nested mapping.")
    evaluate: CompareSettings | None = Field(None, description="Evaluate models and print one table.")

    @model_validator(mode="after")
    def _exactly_one_kind(self) -> "StageSettings":
        given = [kind for kind in STAGE_KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"stage {self.name} has {given or 'no kind'}. Write exactly one of {', '.join(STAGE_KINDS)}"
            )
        return self

    @property
    def kind(self) -> str:
        """The one kind that is given."""
        return next(kind for kind in STAGE_KINDS if getattr(self, kind) is not None)


class Recipe(Settings):
    """A run, whole. `{root}` in any text stands for the value of root."""

    root: str = Field(
        description="Folder of everything that this recipe makes; the file's name under runs/ by default."
    )
    run: str = Field(
        "train",
        pattern=r"^[a-z0-9_]+(/[a-z0-9_][a-z0-9_.,=-]*)*$",
        description="This run's folder under root; a sweep's runs lie in folders of it.",
    )
    seed: int = Field(17, ge=0)
    models: ModelsSettings
    data: DataSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    references: ReferencesSettings = ReferencesSettings()
    teachers: TeachersSettings = TeachersSettings()
    train: TrainSettings
    checkpoints: CheckpointsSettings = CheckpointsSettings()
    validation: ValidationSettings = ValidationSettings()
    rollouts: RolloutSettings = RolloutSettings()
    engine: EngineSettings = DeepSpeedSettings(name="deepspeed")
    evaluation: EvaluationSettings = EvaluationSettings()
    generation: GenerationSettings = GenerationSettings()
    records: RecordsSettings = RecordsSettings()
    pipeline: list[StageSettings] = Field(default_factory=list, description="The stages of `deltakd run`, in order.")

    @property
    def directory(self) -> str:
        """This run's directory."""
        return f"{self.root}/{self.run}"
