"""A recipe made small: random models of the same architectures and vocabularies, rows of an invented world, few tokens.

What the recipe says of everything else stays: target, divergence, payload, engine, adapters, who serves what.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltakd.base.files import write_text
from deltakd.data.settings import SourceSettings, TokenizerSettings
from deltakd.models.settings import NewModelSettings, role_key
from deltakd.plan.architecture import Architecture
from deltakd.plan.facts import Run
from deltakd.recipe.load import as_override

ROWS = {"train": 240, "validation": 16}
CORPUS = "corpus"
HEAD_DIM, STUDENT_HEADS = 16, 2  # or as many as processes share out: the student is served too, as the raw one
TIMES = 2  # as many heads has a teacher, since widths differ
MOST_TOKENS = 192  # of an example
WORLD = {"num_persons": 20, "num_raw": 240, "num_chats": ROWS["train"], "num_validation": ROWS["validation"], "seed": 1}
MOST_TEACHERS = 2  # processes of this machine, unless more are needed to serve what is asked


def write_inputs(run: Run, folder: Path) -> None:
    """Write rows, a tokenizer and a model for each that the run reads, under `folder`."""
    from deltakd.data.tokenizer import train_tokenizer
    from deltakd.data.world import write_world
    from deltakd.models.new import write_new_model

    write_world(folder / "world", **WORLD)
    for part in ROWS:
        _write_rows(folder, part, f"chat_{part}", run.recipe.data.format)
    _write_rows(folder, CORPUS, "raw_train", "text")
    files = [str(folder / "world" / "raw_train.jsonl"), str(folder / "world" / "chat_train.jsonl")]
    smallest = min(shape.head_rows for shape in _models(run).values())  # which the tokenizer has to fit
    train_tokenizer(TokenizerSettings(files=files, vocab_size=min(700, smallest)), folder / "tokenizer")
    parts = run.recipe.teachers.tensor_parallel
    for seed, (weights, shape) in enumerate(_models(run).items()):
        is_student = weights == run.recipe.models.student.weights
        heads = max(STUDENT_HEADS, parts) * (1 if is_student else TIMES)
        settings = _shrunk(shape, str(folder / "tokenizer"), heads, parts, seed)
        write_new_model(settings, Path(_place(run, folder, weights)))


def overrides(run: Run, folder: Path, steps: int) -> list[str]:
    """Return the settings that make the recipe's training a tiny one of so many steps in `folder`."""
    recipe = run.recipe
    said: dict[str, Any] = {"root": str(folder), "run": "train", "pipeline": [], "seed": recipe.seed}
    for role, model in _roles(run).items():
        key = role_key(role)
        said |= {f"{key}.weights": _place(run, folder, model), f"{key}.revision": None}
    source = {**SourceSettings(path="x").model_dump(mode="json"), "skip_rows": 0}
    for part in ROWS:
        said[f"data.{part}"] = source | {"path": str(folder / f"{part}.jsonl")}
    if recipe.data.corpus is not None:
        said |= {f"data.corpus.{key}": value for key, value in source.items()}
        said |= {"data.corpus.path": str(folder / f"{CORPUS}.jsonl"), "data.corpus.tokens_per_step": None}
    said |= {
        "data.max_tokens": MOST_TOKENS,
        "train.steps": steps,
        "train.warmup_steps": min(1, recipe.train.warmup_steps),
    }
    said |= {"train.tokens_per_step": 4 * MOST_TOKENS, "train.tokens_per_micro_batch": MOST_TOKENS}
    said |= {"checkpoints.every_steps": 2, "rollouts.max_new_tokens": 8, "rollouts.batch_size": 4}
    said |= {"evaluation.num_prompts": 4, "evaluation.max_new_tokens": 8, "evaluation.num_resamples": 100}
    said |= {"evaluation.batch_size": 4, "generation.num_prompts": 4, "generation.max_new_tokens": 8}
    if recipe.validation.every_steps is not None:
        said |= {"validation.every_steps": 2, "validation.num_rows": 4, "validation.num_prompts": 2}
        said |= {"validation.max_new_tokens": 8}
    if recipe.records.profile is not None:
        said["records.profile"] = {"first_step": 1, "last_step": 1}
    said |= {"records.wandb_project": None, "teachers.per_node": _num_teachers(run), "teachers.network": False}
    said |= {f"evaluation.kept.{name}": None for name in recipe.evaluation.kept}
    return [as_override(key, value) for key, value in said.items()]


def num_ranks(run: Run) -> int | None:
    """Return how many processes a launch has: one student and the teachers; None where it starts its teacher itself."""
    is_served = run.recipe.references.source == "service" and bool(run.frozen)
    several = is_served and run.recipe.engine.name != "single" and _num_teachers(run) > 1
    return 1 + _num_teachers(run) if several else None


def _num_teachers(run: Run) -> int:
    teachers = run.recipe.teachers
    needed = max(len(teachers.serves or [1]), teachers.tensor_parallel)
    return max(needed, min(teachers.per_node, MOST_TEACHERS))


def _roles(run: Run) -> dict[str, str]:
    """Return the weights of every model that the run reads, by role."""
    roles = run.recipe.models.roles
    return {role: roles[role].weights for role in ("student", *run.frozen) if _is_written(run, role)}


def _is_written(run: Run, role: str) -> bool:
    """Tell whether the recipe names the role: the raw student may be the student itself."""
    return role != "student_raw" or run.recipe.models.student_raw is not None


def _models(run: Run) -> dict[str, Architecture]:
    """Return the shape of each model by its weights."""
    weights = _roles(run)
    shapes = {"student": run.student} | {role: one.shape for role, one in run.frozen.items()}
    return {weights[role]: shapes[role] for role in reversed(weights)} | {weights["student"]: run.student}


def _place(run: Run, folder: Path, weights: str) -> str:
    return str(folder / f"model{list(_models(run)).index(weights)}")


def _shrunk(shape: Architecture, tokenizer: str, heads: int, parts: int, seed: int) -> NewModelSettings:
    """Return a model with few heads of each kind, which as many processes as `parts` can share out."""
    sizes = {"hidden_size": heads * HEAD_DIM, "intermediate_size": 2 * heads * HEAD_DIM, "max_positions": 1024}
    sizes |= {"num_layers": 2, "num_heads": heads, "head_rows": shape.head_rows, "seed": seed}
    sizes["num_kv_heads"] = heads if shape.num_kv_heads == shape.num_heads else min(heads, max(heads // 2, parts))
    words = {"tokenizer": tokenizer, "architecture": shape.kind, "tie_embeddings": shape.is_tied}
    return NewModelSettings.model_validate(words | sizes)


def _write_rows(folder: Path, name: str, source: str, format: str) -> None:
    rows = _as_format(_read(folder / "world" / f"{source}.jsonl"), format)
    write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows), lasting=False)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as lines:
        yield from map(json.loads, lines)


def _as_format(rows: Iterator[dict[str, Any]], format: str) -> Iterator[dict[str, Any]]:
    """Write conversations as rows of the recipe's format."""
    for row in rows:
        contents = [message["content"] for message in row["messages"]]
        if format == "math":
            answer = contents[1].split()[-1]
            solution = f"{contents[1]} \\boxed{{{answer}}}"
            yield {"problem": contents[0], "generated_solution": solution, "expected_answer": answer}
        else:
            yield {"text": " ".join(contents)} if format == "text" else row
