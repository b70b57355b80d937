"""What a run directory already holds of the very run that a recipe asks for: all of it, or a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deltakd.base.errors import RunError
from deltakd.base.rundir import CHANGEABLE, RunDirectory
from deltakd.models.load import identity
from deltakd.models.settings import role_key
from deltakd.recipe.load import dump_recipe
from deltakd.recipe.schema import Recipe
from deltakd.train.checkpoints import Saved, has_some, newest, remove_unfinished


def is_finished(run: RunDirectory, recipe: Recipe) -> bool:
    """Tell whether the directory holds this very run, finished.

    Raises RunError if another recipe has made it, or if a model that it came from has been made anew since.
    """
    finished = run.finished()
    if finished is None:
        return False
    if "inputs" not in finished:
        raise RunError(f"{run.path}: made by another stage, not by a training. Write run=... with another name.")
    text = dump_recipe(recipe)
    changes = run.changes(text, complete=_complete)
    if (
        any(change.startswith(("train.steps: ", "validation.")) for change in changes)
        and not run.changes(text, CHANGEABLE, _complete)
        and finished["steps"] < recipe.train.steps
        and has_some(run.path)
    ):
        return False  # it shall go on for more steps
    for role, before in finished["inputs"].items():
        model = recipe.models.roles.get(role)
        if model is None:  # another recipe, as the changes say
            continue
        folder = Path(model.weights).expanduser()
        if folder.is_dir() and identity(folder, model.load_in_8bit) != before:
            changes.append(f"{role_key(role)}: {folder} has been made anew since")
    more_steps = finished["steps"] < recipe.train.steps and not run.changes(text, CHANGEABLE, _complete)
    if changes and more_steps and not has_some(run.path):
        raise RunError(
            f"{run.path}: finished after {finished['steps']:,} steps, and no checkpoint is left to go on from to "
            f"{recipe.train.steps:,}. Write run=... with another name, or remove the folder to begin anew."
        )
    if changes:
        raise RunError(
            f"{run.path}: finished with another recipe ({'; '.join(changes[:3])}). "
            "Write run=... with another name (root=... moves all stages), or remove the folder."
        )
    return True


def find_checkpoint(run: RunDirectory, recipe: Recipe, facts: Mapping[str, Any], required: bool) -> Saved | None:
    """Return the checkpoint that this run goes on from; None if it begins with step 1. For rank 0; says what it does.

    Raises RunError if there is one of another run, or none where one is `required`.
    """
    remove_unfinished(run.path)
    saved, passed = newest(run.path)
    for sentence in passed:
        print(sentence, flush=True)
    if saved is None:
        if required:
            raise RunError(f"{run.path}: no checkpoint to go on from. Start without --resume to begin with step 1.")
        if before := run.last_line("steps.jsonl"):
            print(f"{run.path}: no checkpoint of its {before['step']:,} steps; it begins with step 1 again", flush=True)
        return None
    text = dump_recipe(recipe)
    was = {name: saved.facts.get(name) for name in facts}
    changes = run.changes(text, CHANGEABLE, _complete)
    changes += [f"{name}: {was[name]}, now {now}" for name, now in facts.items() if was[name] != now]
    if saved.step > recipe.train.steps:
        changes.append(f"train.steps: {saved.step} are done, now {recipe.train.steps}")
    if changes:
        raise RunError(
            f"{saved.folder}: of another run ({'; '.join(changes[:3])}). Write run=... with another name, or remove "
            f"{run.path} to begin anew."
        )
    allowed = "; ".join(run.changes(text, complete=_complete)[:3])
    print(f"{run.path}: goes on from {saved.folder.name}" + (f" ({allowed})" if allowed else ""), flush=True)
    return saved


def _complete(tree: Any) -> Any:
    """Add the defaults of settings that are younger than a stored recipe; as it is if it no longer fits the schema."""
    try:
        return yaml.safe_load(dump_recipe(Recipe.model_validate(tree)))
    except ValueError:
        return tree
