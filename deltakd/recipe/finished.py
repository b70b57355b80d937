"""Whether a run directory already holds the very run that a recipe asks for."""

from pathlib import Path

from deltakd.base.errors import RunError
from deltakd.base.rundir import RunDirectory
from deltakd.models.load import identity
from deltakd.models.settings import role_key
from deltakd.recipe.build import Inputs
from deltakd.recipe.load import dump_recipe
from deltakd.recipe.schema import Recipe


def is_finished(run: RunDirectory, recipe: Recipe) -> bool:
    """Tell whether the directory holds this very run, finished.

    Raises RunError if another recipe has made it, or if a model that it came from has been made anew since.
    """
    finished = run.finished()
    if finished is None:
        return False
    if "inputs" not in finished:
        raise RunError(f"{run.path}: made by another stage, not by a training. Write run=... with another name.")
    changes = run.changes(dump_recipe(recipe))
    for role, before in finished["inputs"].items():
        folder = Path(recipe.models.roles[role].weights).expanduser()
        if folder.is_dir() and identity(folder) != before:
            changes.append(f"{role_key(role)}: {folder} has been made anew since")
    if changes:
        raise RunError(
            f"{run.path}: finished with another recipe ({'; '.join(changes[:3])}). "
            "Write run=... with another name (root=... moves all stages), or remove the folder."
        )
    return True


def identities(inputs: Inputs) -> dict[str, str]:
    """Return which weights a run came from, by role."""
    return {"student": identity(inputs.student)} | {name: facts.identity for name, facts in inputs.frozen.items()}
