"""Where a recipe's rows lie on this machine, as the command line says it: `small_math=TRAIN,VALIDATION`."""

from pathlib import Path

from deltakd.base.errors import RunError
from deltakd.recipe.load import as_override, load


def row_overrides(option: str, recipe: str, given: str) -> list[str]:
    """Return the overrides that name a recipe's rows: TRAIN,VALIDATION, or TRAIN alone where the other lies beside it.

    Raises RunError, naming `option`, if they are not there.
    """
    paths = [Path(text) for text in given.split(",") if text]
    if len(paths) == 1:  # the other lies beside it, under the name that the recipe has for it
        validation = load(recipe).recipe.data.validation
        paths += [paths[0].with_name(Path(validation.path).name)] if validation else []
    if len(paths) != 2:
        raise RunError(f"{option}: {given or 'missing'}, but {recipe} needs rows. Write {option} TRAIN,VALIDATION.")
    for path in paths:
        if not path.exists():
            raise RunError(f"{option}: {path} does not exist. Write {option} TRAIN,VALIDATION.")
    return [
        as_override(f"data.{part}.path", str(path)) for part, path in zip(("train", "validation"), paths, strict=True)
    ]
