"""A folder with two recipes, and what is said of others that a test writes beside them."""

from pathlib import Path

import pytest

from deltakd.base.errors import RecipeError
from deltakd.recipe.load import load

BASE = """\
models:
  student: {weights: org/student}
  teacher: {weights: "{root}/teacher/export"}
data:
  train: {path: "{other}/rows.jsonl"}
train:
  steps: 10
  tokens_per_step: 8_192
  tokens_per_micro_batch: 4_096
  learning_rate: 1
engine: {name: deepspeed, zero_stage: 3}
"""
CHILD = """\
extends: base
train:
  learning_rate: 1.0e-3
pipeline:
  - name: words
    tokenizer: {vocab_size: 300, files: ["{root}/rows.jsonl"]}
  - name: sft
    train:
      objective: {sft_weight: 1.0}
      train: {steps: 3}
"""


@pytest.fixture(autouse=True)
def recipes(tmp_path, monkeypatch):
    """Work in a folder with recipes/base.yaml and recipes/child.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/base.yaml").write_text(BASE)
    Path("recipes/child.yaml").write_text(CHILD)


def refusal(name: str, *overrides: str, stage: str | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load(name, overrides, stage)
    return str(caught.value)


def written(text: str, name: str = "recipes/case.yaml") -> str:
    Path(name).write_text(text)
    return name
