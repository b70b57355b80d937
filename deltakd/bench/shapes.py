"""Models of a given shape with random weights, and a recipe over them: what speed is measured on. Imports no torch.

Speed does not depend on what weights say, so nothing here is trained; lengths of rows and which tokens are supervised
come from the rows that are given.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deltakd.base.files import write_text


@dataclass(frozen=True)
class Shape:
    """One model's size."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    tie_embeddings: bool = True

    @property
    def backbone_parameters(self) -> int:
        """Parameters of all matrices but embedding and head."""
        kv = self.hidden_size * self.num_kv_heads // self.num_heads
        return self.num_layers * self.hidden_size * (2 * self.hidden_size + 2 * kv + 3 * self.intermediate_size)


@dataclass(frozen=True)
class Pair:
    """Student and teacher, the vocabulary that they share and the longest row."""

    student: Shape
    teacher: Shape
    vocab_size: int
    max_tokens: int
    tokens_per_step: int
    dtype: str


TINY = Pair(Shape(32, 2, 4, 2, 64), Shape(48, 2, 4, 2, 96), 1000, 128, 512, "float32")
SMALL = Pair(Shape(384, 8, 6, 2, 1024), Shape(512, 8, 8, 4, 1408), 8192, 2048, 2048, "float32")
QWEN = Pair(
    Shape(1536, 28, 12, 2, 8960), Shape(3584, 28, 28, 4, 18944, tie_embeddings=False), 151_936, 2048, 8192, "bfloat16"
)
PAIRS = {"tiny": TINY, "small": SMALL, "qwen2.5": QWEN}
MODELS = ("student", "teacher", "teacher_raw")


def make_pair(pair: Pair, data: str | None, folder: Path) -> Path:
    """Write rows (unless `data` names some), a tokenizer and the models that are not there yet; return the recipe."""
    import torch

    from deltakd.data.settings import SourceSettings, TokenizerSettings
    from deltakd.data.tokenizer import train_tokenizer
    from deltakd.data.world import write_world
    from deltakd.models.new import write_new_model
    from deltakd.models.settings import NewModelSettings

    if data is None and not (folder / "world").exists():
        write_world(folder / "world", num_persons=40, num_raw=10, num_chats=3000, num_validation=10, seed=1)
    rows = str(Path(data).resolve()) if data is not None else str(folder / "world" / "chat_train.jsonl")
    if not (folder / "tokenizer").exists():
        size = TokenizerSettings(files=[rows], vocab_size=min(pair.vocab_size, 8192), num_rows=4000)
        train_tokenizer(size, folder / "tokenizer")
    for seed, name in enumerate(MODELS):
        if not (folder / name).exists():
            shape = pair.student if name == "student" else pair.teacher
            made: dict[str, Any] = vars(shape) | {"head_rows": pair.vocab_size, "seed": seed}
            settings = NewModelSettings(tokenizer=str(folder / "tokenizer"), max_positions=32768, **made)
            write_new_model(settings, folder / name, getattr(torch, pair.dtype))
    return _write_recipe(pair, SourceSettings(path=rows, num_rows=4000).model_dump(exclude_defaults=True), folder)


def _write_recipe(pair: Pair, rows: dict[str, Any], folder: Path) -> Path:
    models: dict[str, Any] = {name: {"weights": str(folder / name)} for name in MODELS}
    recipe = {
        "root": str(folder / "runs"),
        "models": models | {"dtype": pair.dtype},
        "data": {"train": rows, "max_tokens": pair.max_tokens, "over_long": "truncate"},
        "objective": {"target": {"name": "delta", "alpha": 0.5}},
        "train": {
            "steps": 1,
            "tokens_per_step": pair.tokens_per_step,
            "tokens_per_micro_batch": pair.tokens_per_step,
            "learning_rate": 1.0e-5,
            "schedule": "constant",
            "gradient_checkpointing": pair is QWEN,
        },
        "checkpoints": {"every_steps": None},
        "records": {"tensorboard": False},
        "engine": {"name": "single"},
    }
    write_text(folder / "step.yaml", yaml.safe_dump(recipe, sort_keys=False))
    return folder / "step.yaml"
