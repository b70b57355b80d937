"""An `objective:` block given in Python: checked by the recipe's own settings, refused in the same kind of sentence.

In a recipe, `deltakd.recipe` says the same with file and line.
"""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from deltakd.base.errors import RecipeError
from deltakd.losses.settings import Divergence, ObjectiveSettings, Target

_KINDS: dict[str, tuple[Any, ...]] = {"target": get_args(Target), "divergence": get_args(Divergence)}


def read_block(settings: Mapping[str, Any]) -> ObjectiveSettings:
    """Return the settings of a block. Raises RecipeError with one line per key that cannot hold."""
    if not isinstance(settings, Mapping):
        raise RecipeError(f"objective: {settings!r} is no mapping. Write {{'target': 'delta'}}.")
    try:
        return ObjectiveSettings.model_validate(dict(settings))
    except ValidationError as error:
        raise RecipeError("\n".join(_sentence(dict(details)) for details in error.errors())) from error


def _sentence(details: Mapping[str, Any]) -> str:
    loc = [str(step) for step in details["loc"]]
    # Pydantic puts the name of a target or a divergence into the path, where nobody wrote one.
    where = ".".join(["objective", *loc[:1], *(loc[2:] if loc[:1] and loc[0] in _KINDS else loc[1:])])
    if details["type"] == "value_error":
        return f"{where}: {details['ctx']['error']}."
    if details["type"] == "union_tag_invalid":
        return f"{where}: {details['ctx']['tag']} is not known. Write one of {', '.join(_names(loc[0]))}."
    if details["type"] == "union_tag_not_found":
        return f"{where}: name is missing. Write one of {', '.join(_names(loc[0]))}."
    if details["type"] == "extra_forbidden":
        return f"{where}: unknown key.{_known(loc)}"
    return f"{where}: {details['msg']}, not {details['input']!r}."


def _names(part: str) -> list[str]:
    return [name for kind in _KINDS[part] for name in get_args(kind.model_fields["name"].annotation)]


def _known(loc: list[str]) -> str:
    fields: Iterable[str] = ObjectiveSettings.model_fields if len(loc) == 1 else ()
    if len(loc) == 3:
        fields = next(
            kind.model_fields for kind in _KINDS[loc[0]] if loc[1] in get_args(kind.model_fields["name"].annotation)
        )
    return f" Known here: {', '.join(fields)}." if fields else " Leave it out."
