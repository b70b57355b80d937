"""What a recipe names on this machine's disk, or on the hub: whether it is there. Imports no torch and reads no row."""

import os
import re
from collections.abc import Callable, Collection
from glob import has_magic
from pathlib import Path

from deltakd.base.errors import DataError, ModelError, RecipeError
from deltakd.base.hub import could_be_hub_id, refuse_unreachable
from deltakd.data.settings import SourceSettings
from deltakd.data.sources import local_files
from deltakd.losses.settings import needed_references
from deltakd.models.settings import role_key
from deltakd.recipe.schema import Recipe

Where = Callable[[str], str]
LABEL = re.compile(r"[A-Za-z0-9_.-]+")


def check_paths(recipe: Recipe, where: Where, name: str = "NAME", also: Collection[str] = ()) -> None:
    """Raise RecipeError for local models and data that are not there; what can be a hub id passes.

    `name` is the recipe's, for the command that would make what lies under its root; `also` are roles of models that
    are read beside those of the training.
    """
    for role in ["student", *sorted(needed_references(recipe.objective) | set(also))]:
        _check_model(recipe, f"{role_key(role)}.weights", recipe.models.roles[role].weights, where, name)
    train = _check_source(recipe, "data.train", recipe.data.train, where, name)
    if recipe.data.validation is not None:
        validation = _check_source(recipe, "data.validation", recipe.data.validation, where, name)
        shared = sorted(train & validation)
        if shared and not same_rows_source(recipe.data.train, recipe.data.validation):
            raise RecipeError(
                f"{where('data.validation.path')}: {shared[0]} is also read for data.train. "
                "Write a path whose files data.train does not read."
            )
    if recipe.data.corpus is not None:
        _check_source(recipe, "data.corpus", recipe.data.corpus, where, name)
    _check_kept(recipe, where, name)


def check_held_out(recipe: Recipe, where: Where, name: str = "NAME") -> None:
    """Raise RecipeError if there are no held-out rows, or they or the `kept` files are not there."""
    if recipe.data.validation is None:
        raise RecipeError(f"{where('data.validation')}: missing. Write data.validation.path with held-out rows.")
    if recipe.data.format == "text":
        raise RecipeError(f"{where('data.format')}: text has no prompts. Write data.format: messages or math.")
    _check_source(recipe, "data.validation", recipe.data.validation, where, name)
    _check_kept(recipe, where, name)


def check_compared(recipe: Recipe, where: Where, name: str, only: str | None = None) -> None:
    """Raise RecipeError for a local model of a table, `only` one stage's, that is not there and that no stage makes."""
    made = [f"{recipe.root}/{stage.name}" for stage in recipe.pipeline]
    for index, stage in enumerate(recipe.pipeline):
        if stage.evaluate is None or only not in (None, stage.name):
            continue
        for label, weights in stage.evaluate.models.items():
            is_made = any(weights == folder or weights.startswith(f"{folder}/") for folder in made)
            if not is_made and not Path(weights).expanduser().exists() and _is_local(weights, recipe.root):
                owner = Path(recipe.root).name
                first = f"Run what makes it first (python -m deltakd run {owner})" if owner != name else "Write a path"
                key = where(f"pipeline.{index}.evaluate.models.{label}")
                raise RecipeError(f"{key}: {weights}: no stage here makes it. {first}, or leave {label} out.")


def _check_kept(recipe: Recipe, where: Where, name: str) -> None:
    for label, path in recipe.evaluation.kept.items():
        if path is not None:
            _check_files(recipe, f"evaluation.kept.{label}", path, where, name)


def check_hub(recipe: Recipe, where: Where, also: Collection[str] = ()) -> None:
    """Raise ModelError, after seconds, if a model that the objective needs is on a hub that cannot be reached."""
    for role in ["student", *sorted(needed_references(recipe.objective) | set(also))]:
        model = recipe.models.roles[role]
        if could_be_hub_id(model.weights):
            try:
                refuse_unreachable("model", model.weights, model.revision, ModelError)
            except ModelError as error:
                raise ModelError(f"{where(f'{role_key(role)}.weights')}: {error}") from error


def _check_model(recipe: Recipe, key: str, weights: str, where: Where, name: str) -> None:
    path = Path(weights).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise RecipeError(f"{where(key)}: {weights} holds no config.json. Write the folder of a model.")
    if not path.exists() and _is_local(weights, recipe.root):
        raise _not_there(recipe, where(key), weights, name, "the folder of a model or a hub id")


def _check_source(recipe: Recipe, key: str, source: SourceSettings, where: Where, name: str) -> set[Path]:
    files = _check_files(recipe, f"{key}.path", source.path, where, name)
    ignored = {
        "subset": source.subset,
        "revision": source.revision,
        "split": None if source.split == "train" else source.split,
    }
    for setting, value in ignored.items():
        if files and value is not None:
            blank = f"{setting}: {'train' if setting == 'split' else 'null'}"
            raise RecipeError(f"{where(f'{key}.{setting}')}: {value}, but {source.path} is local. Write {blank}.")
    return files


def _check_files(recipe: Recipe, key: str, path: str, where: Where, name: str) -> set[Path]:
    """Return the local files that a path stands for, resolved; none for what can be a hub id."""
    if not Path(path).expanduser().exists() and not has_magic(path):
        if not _is_local(path, recipe.root):
            return set()
        raise _not_there(recipe, where(key), path, name, "an existing file, folder or pattern")
    try:
        return {file.resolve() for file in local_files(path)}
    except DataError as error:
        raise RecipeError(f"{where(key)}: {error}") from error


def _is_local(path: str, root: str) -> bool:
    """Tell whether a path that does not exist was meant as one of this machine, not as a hub id."""
    first, slash, _ = path.partition("/")
    return not could_be_hub_id(path) or _is_under(path, root) or bool(slash and Path(first).is_dir())


def _is_under(path: str, root: str) -> bool:
    return Path(os.path.normpath(root)) in (Path(os.path.normpath(path)), *Path(os.path.normpath(path)).parents)


def _not_there(recipe: Recipe, prefix: str, path: str, name: str, instead: str) -> RecipeError:
    todo = f"Write {instead}"
    if recipe.pipeline and _is_under(path, recipe.root):
        todo = f"Run `python -m deltakd run {name}` first, which makes it, or write {instead}"
    return RecipeError(f"{prefix}: {path} does not exist. {todo}.")


def same_rows_source(one: SourceSettings, other: SourceSettings) -> bool:
    """Tell whether two sources read the same rows, up to which of them."""
    facts = [(os.path.normpath(source.path), source.subset, source.split) for source in (one, other)]
    return facts[0] == facts[1]


def row_range(source: SourceSettings) -> tuple[int, float]:
    """Return the first row of a source and the one after its last."""
    return source.skip_rows, source.skip_rows + (source.num_rows or float("inf"))
