"""`deltakd target`: is the delta target any good on held-out rows? Asked before any training, for a grid of alpha.

The teacher, its raw model and the raw student go over the first rows of data.validation once; their hidden states are
kept in the cache, so that asking again loads no model. Then one pass over chunks serves the whole grid (outlook.py).

    ROOT/target/target.json, table.md, curves.html
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from deltakd.base.errors import DataError, RecipeError, RunError
from deltakd.base.files import write_json, write_text
from deltakd.base.machine import machine_facts
from deltakd.base.processes import use_threads
from deltakd.base.ranks import Placement, assign_role
from deltakd.data.packing import PackedBatch
from deltakd.data.tokenise import build_examples
from deltakd.engine.protocol import device_name
from deltakd.losses.settings import DeltaTarget, ObjectiveSettings
from deltakd.models.settings import role_key
from deltakd.recipe.build import build_stream, frozen_facts, frozen_heads
from deltakd.recipe.caching import asked_about, open_cache, write_payloads
from deltakd.recipe.checks import check_recipe
from deltakd.recipe.inputs import Inputs, read_inputs
from deltakd.recipe.load import Loaded, load
from deltakd.recipe.paths import check_hub, check_paths
from deltakd.recipe.schema import Recipe
from deltakd.study.advice import advise, markdown
from deltakd.study.drawing import Line, Panel, draw
from deltakd.study.outlook import MODELS, Outlook, Said, Tally, look
from deltakd.teacher.cache import CachedReferences

FOLDER = "target"


def target(
    name: str, overrides: Sequence[str], alphas: Sequence[float], temperatures: Sequence[float], num_rows: int
) -> None:
    """Print the table and what follows from it, and write JSON and a drawing.

    Raises RecipeError if the recipe has not the three models or no held-out rows, RunError for a temperature or a
    number of rows that is none, and for targets that are no numbers.
    """
    if min(temperatures) <= 0:
        raise RunError(f"--temperatures: {min(temperatures):g} is none. Write numbers above 0.")
    if num_rows < 1:
        raise RunError(f"--rows: {num_rows} rows say nothing. Write 1 or more.")
    loaded = load(name, overrides)
    check_recipe(loaded.recipe, loaded.where)
    recipe = _asking_three(loaded, max(alphas, key=abs))
    check_paths(recipe, loaded.where, name)
    check_hub(recipe, loaded.where)
    use_threads()
    inputs = read_inputs(recipe, loaded.where)
    batches = _held_out(inputs, num_rows)
    assert isinstance(recipe.objective.target, DeltaTarget)
    anchor = recipe.objective.target.anchor
    tally = Tally(alphas, temperatures, anchor)
    found = look(_said(inputs, batches), tally, inputs.vocab_size)
    _refuse_no_numbers(found)
    text, sentence = markdown(found, name), advise(found, anchor)
    folder = Path(recipe.root) / FOLDER
    report = {**machine_facts(), "recipe": name, "overrides": list(overrides), "anchor": anchor, "rows": num_rows}
    write_json(folder / "target.json", report | asdict(found) | {"sentence": sentence})
    write_text(folder / "table.md", f"{text}\n{sentence}\n")
    write_text(folder / "curves.html", draw(_panels(found)))
    print(f"{text}\n{sentence}\n\nResults: {folder}/target.json, table.md and curves.html")


def _asking_three(loaded: Loaded, alpha: float) -> Recipe:
    """Return the recipe with a target that reads all three models, whatever it trains on, and hidden payloads."""
    recipe, where = loaded.recipe, loaded.where
    for role in MODELS:
        if role not in recipe.models.roles:
            key = where(role_key(role))
            raise RecipeError(f"{key}: missing, and a delta target reads it. Write {role}: {{weights: FOLDER}}.")
    if recipe.data.validation is None:
        raise RecipeError(f"{where('data.validation')}: missing, and the target is asked there. Write a path of rows.")
    anchor = getattr(recipe.objective.target, "anchor", "teacher")
    delta = DeltaTarget.model_validate({"name": "delta", "alpha": alpha or 1.0, "anchor": anchor})
    asking = {
        "objective": ObjectiveSettings(target=delta),
        "references": recipe.references.model_copy(update={"payload": "hidden", "source": "cache"}),
        "rollouts": type(recipe.rollouts)(),
    }
    return recipe.model_copy(update=asking)


def _held_out(inputs: Inputs, num_rows: int) -> list[PackedBatch]:
    """Return the first rows of data.validation as a training would see them."""
    recipe = inputs.recipe
    source = recipe.data.validation
    assert source is not None  # checked
    few = source.model_copy(update={"num_rows": min(source.num_rows or 10**12, num_rows)})
    rows = build_examples(recipe.data, few, inputs.tokenizer, Path(recipe.root) / "tokens", progress=False)
    stream = partial(build_stream, recipe, role=assign_role(Placement(0, 1, 0, 1), 0))
    batches = [batch for batch in stream(rows).cut(np.arange(len(rows))) if batch.asks]
    if not batches:
        raise DataError(f"{source.path}: no token of its first {num_rows:,} rows is supervised. Write other rows.")
    return batches


def _said(inputs: Inputs, batches: Sequence[PackedBatch]) -> Iterator[tuple[Said, Tensor]]:
    """Yield what the frozen models say of each batch and its labels; what the cache lacks is asked for first."""
    asked = [(batch, 0.0) for batch in batches]
    folder, about = open_cache(inputs)
    write_payloads(folder, about, inputs, lambda: asked_about(inputs, asked))
    device = device_name(0)
    cached = CachedReferences(folder, frozen_facts(inputs), frozen_heads(inputs, device), inputs.spec, device)
    for batch, payloads in cached.ahead(asked):
        yield payloads, batch.labels.to(device)  # type: ignore[misc]  # hidden states and heads: the payload is hidden


def _refuse_no_numbers(found: Outlook) -> None:
    """Raise RunError for an alpha or a temperature whose target is too large for floating-point numbers."""
    for one in found.targets:
        if not all(map(math.isfinite, asdict(one).values())):
            raise RunError(
                f"target: of alpha {one.alpha:g} at temperature {one.temperature:g} the numbers are not finite. Write "
                "--alphas nearer to 0, or --temperatures nearer to 1."
            )


def _panels(found: Outlook) -> list[Panel]:
    """Return what is drawn over alpha: a line for each temperature, and the frozen models' own numbers beside them."""
    temperatures = sorted({one.temperature for one in found.targets})
    panels = []
    for name, title in (
        ("cross_entropy", "cross-entropy on the references, nats"),
        ("entropy", "entropy of the target, nats"),
        ("kl_to_teacher", "KL to the teacher, nats"),
        ("kl_to_student_raw", "KL to the raw student, nats"),
    ):
        lines = []
        for temperature in temperatures:
            chosen = sorted((one for one in found.targets if one.temperature == temperature), key=lambda one: one.alpha)
            label = f"temperature {temperature:g}" if len(temperatures) > 1 else "target"
            lines.append(Line(label, [one.alpha for one in chosen], [getattr(one, name) for one in chosen]))
        levels = dict(found.cross_entropy) if name == "cross_entropy" else {}
        panels.append(Panel(title, lines, levels))
    return panels
