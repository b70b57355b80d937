"""An arm of `bench step`: the same models and rows in TRL's GKDTrainer, its own way: batches of eight, padded.

lmbda 0 and beta 0: the given answers, forward KL. TRL supervises a row's last answer; what is computed is the same.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from deltakd.base.processes import use_threads
from deltakd.base.rundir import RunDirectory
from deltakd.data.sources import load_rows
from deltakd.data.tokenizer import load_tokenizer
from deltakd.recipe.load import load
from deltakd.recipe.schema import Recipe

BATCH = 8


class Counted:
    """TRL's collator, and what it made: real tokens, padding, and labels of each batch."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate
        self.made: list[dict[str, int]] = []

    def __call__(self, rows: Any) -> Any:
        batch = self._collate(rows)
        real = int(batch["attention_mask"].sum())
        learnt = int((batch["labels"] != -100).sum())
        self.made.append(
            {"num_tokens": real, "num_padding": batch["input_ids"].numel() - real, "num_supervised": learnt}
        )
        return batch


def main(name: str, *overrides: str) -> None:
    """Train a recipe's student on its teacher and leave the steps in the run's directory."""
    use_threads()
    recipe = load(name, overrides).recipe
    run = RunDirectory(Path(recipe.directory))
    run.path.mkdir(parents=True)
    trainer, counted, steps = _trainer(recipe, run.path)
    trainer.train()
    for number, (made, seconds) in enumerate(zip(counted.made, steps, strict=False), start=1):  # it collates ahead
        run.append("steps.jsonl", {"step": number, "step_s": seconds, "wait_s": 0.0, **made})


def _trainer(recipe: Recipe, folder: Path) -> tuple[Any, Counted, list[float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.utils import DataCollatorForChatML

    tokenizer = load_tokenizer(recipe.models.student.weights)
    teacher = recipe.models.teacher
    assert teacher is not None
    dtype = getattr(torch, recipe.models.dtype)
    student, frozen = (
        AutoModelForCausalLM.from_pretrained(one.weights, dtype=dtype) for one in (recipe.models.student, teacher)
    )
    rows = [{"messages": row["messages"]} for _, row in load_rows(recipe.data.train)]
    settings = GKDConfig(**_settings(recipe, folder))
    counted = Counted(DataCollatorForChatML(tokenizer=tokenizer, max_length=recipe.data.max_tokens))
    spent: list[float] = []

    class Clock(TrainerCallback):
        """Times every step; its batch has been made before, which is not counted."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            spent.append(time.perf_counter() - self.started)

    trainer = GKDTrainer(
        model=student,
        teacher_model=frozen,
        args=settings,
        data_collator=counted,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    return trainer, counted, spent


def _settings(recipe: Recipe, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trl"),
        "max_steps": recipe.train.steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": recipe.train.learning_rate,
        "lmbda": 0.0,
        "beta": 0.0,
        "temperature": 1.0,
        "max_length": recipe.data.max_tokens,
        "bf16": recipe.models.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": recipe.seed,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
