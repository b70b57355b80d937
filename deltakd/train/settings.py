"""What a recipe says about the optimization: how many steps of how many tokens, at which rate."""

from typing import Literal

from pydantic import Field

from deltakd.base.settings import Settings


class TrainSettings(Settings):
    """Steps, batch and schedule. Accumulation is derived: a step's tokens, split over ranks and micro-batches."""

    steps: int = Field(gt=0)
    tokens_per_step: int = Field(
        gt=1,
        description="Tokens of one optimizer step over all ranks; which examples it takes "
        "depends on this number alone.",
    )
    tokens_per_micro_batch: int = Field(gt=1, description="Most tokens that one rank computes at once. Memory only.")
    examples_per_micro_batch: int | None = Field(None, gt=0, description="Most examples at once; null: as many as fit.")
    learning_rate: float = Field(gt=0, le=1000)
    min_learning_rate_ratio: float = Field(
        0.1, ge=0, le=1, description="Where cosine and linear end, as a share of learning_rate."
    )
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = False


class CheckpointsSettings(Settings):
    """When a run keeps its state. Asked to stop (SIGTERM, SIGUSR1, Ctrl-C) it keeps it whatever stands here."""

    every_steps: int | None = Field(
        500, gt=0, description="Keep a checkpoint every so many steps and after the last one; null: none."
    )
    keep_last: int = Field(2, gt=0, description="How many stay on the disk.")
    models: bool = Field(
        False,
        description="Beside each its model as a Hugging Face folder, models/step-N, to compare; all of them stay.",
    )
    grace_s: float = Field(
        60.0, gt=0, description="How long a run that is asked to stop may take to finish a micro-batch and save."
    )


class ValidationSettings(Settings):
    """How the student does on data.validation while it trains. Changes no number of the training."""

    every_steps: int | None = Field(
        None, gt=0, description="Validate every so many steps and after the last one; null: never."
    )
    num_rows: int = Field(256, gt=0, description="The first rows of data.validation: loss, cross-entropy and KL.")
    best_by: Literal["loss", "cross_entropy", "kl_to_target"] = Field(
        "loss", description="The lowest is best, and its weights stay in best/, a Hugging Face folder."
    )
    export: Literal["last", "best"] = Field("last", description="Which weights the run exports.")
    stop_after: int | None = Field(
        None,
        gt=0,
        description="End the training after so many validations in a row without a better one; null: never.",
    )
    answers_every: int | None = Field(
        None, gt=0, description="Every so many validations prompts are answered and ROUGE is taken; null: never."
    )
    num_prompts: int = Field(32, gt=0, description="How many; three of the answers are logged.")
    max_new_tokens: int = Field(64, gt=0, description="The longest answer; how it is drawn: see evaluation.")


class ProfileSettings(Settings):
    """Which steps rank 0 traces with torch's profiler: into trace/, for chrome://tracing or ui.perfetto.dev."""

    first_step: int = Field(gt=0)
    last_step: int = Field(gt=0)


class RecordsSettings(Settings):
    """Where the run's numbers go beside steps.jsonl."""

    tensorboard: bool = True
    profile: ProfileSettings | None = Field(None, description="Trace some steps; null: none.")
    wandb_project: str | None = Field(
        None, description="A Weights & Biases project; null: off. Needs `pip install wandb`."
    )
