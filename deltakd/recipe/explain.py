"""Schema problems as sentences: file, line, key, the value as written, and what to write instead.

Reads what may stand at a key off the schema itself, so that a new setting needs no words here.
"""

import datetime
import difflib
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from deltakd.recipe.marks import Marked, nearest

MOST_LINES = 3
_FEW_KEYS = 8
_NUMBER = re.compile(r"([-+]?)(\d[\d_,]*)?(?:\.(\d*))?(?:[eE]([-+]?\d+))?")
_BOUNDS: dict[type, tuple[str, str]] = {
    annotated_types.Gt: ("gt", "above"),
    annotated_types.Ge: ("ge", "of at least"),
    annotated_types.Lt: ("lt", "below"),
    annotated_types.Le: ("le", "of at most"),
}


@dataclass(frozen=True)
class Spot:
    """A place in the schema: the key's path without union tags, the type it may hold, and the model around it."""

    path: tuple[str | int, ...]
    annotation: Any
    field: FieldInfo | None
    parent: type[BaseModel] | None


@dataclass(frozen=True)
class Problem:
    """One sentence in its parts; `missing` and `instead` tell that a typo explains a missing key."""

    path: tuple[str | int, ...]
    what: str
    todo: str
    is_unknown_key: bool = False
    instead: tuple[str | int, ...] | None = None


def explain(
    error: ValidationError, schema: type[BaseModel], tree: Marked, extra_keys: Iterable[str] = ()
) -> list[Problem]:
    """Return the problems worth reading first, at most three: unknown keys lead, and hide the key they misspell."""
    problems = [_problem(dict(details), schema, tree, tuple(extra_keys)) for details in error.errors(include_url=False)]
    misspelt = {problem.instead for problem in problems if problem.instead is not None}
    problems = [problem for problem in problems if problem.is_unknown_key or problem.path not in misspelt]
    return sorted(problems, key=lambda problem: not problem.is_unknown_key)[:MOST_LINES]


def locate(schema: type[BaseModel], loc: Iterable[str | int]) -> Spot:
    """Follow a pydantic location, in which a discriminated union adds the tag as a step of its own."""
    spot = Spot((), schema, None, None)
    for step in loc:
        models = models_of(spot.annotation)
        if len(models) > 1:
            tagged = [model for model in models if step in tags_of(model)]
            spot = Spot(spot.path, tagged[0] if tagged else Any, spot.field, spot.parent)
        elif models:
            field = fields_of(models[0]).get(str(step))
            spot = Spot((*spot.path, step), field.annotation if field else Any, field, models[0])
        else:
            inner = get_args(without_null(spot.annotation))
            spot = Spot((*spot.path, step), inner[-1] if inner else Any, None, None)
    return spot


def wanted(spot: Spot) -> str:
    """Say what may stand at `spot`: `a whole number above 0`, `one of packed, padded`, `a list`."""
    annotation = without_null(spot.annotation)
    metadata = spot.field.metadata if spot.field else []
    words = [_type_words(annotation)]
    for item in metadata:
        if type(item) in _BOUNDS:
            attribute, word = _BOUNDS[type(item)]
            bound = getattr(item, attribute)
            words.append(f"{word} {bound if isinstance(bound, int) else format(bound, 'g')}")
        elif isinstance(item, annotated_types.MinLen):
            words.append(f"with at least {item.min_length} entry")
        elif getattr(item, "pattern", None):
            words.append(f"of the form {item.pattern}")
    text = f"{words[0]} {' and '.join(words[1:])}".strip()
    return text if annotation is spot.annotation else f"{text}, or null"


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return a model's fields as a recipe writes them: `from` is no name in Python."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def closest(word: object, known: Iterable[str]) -> str | None:
    """Return the known word that `word` most likely meant."""
    matches = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def _problem(details: Mapping[str, Any], schema: type[BaseModel], tree: Marked, extra_keys: tuple[str, ...]) -> Problem:
    spot = locate(schema, details["loc"])
    kind = details["type"]
    here, depth = nearest(tree, spot.path)
    if kind == "extra_forbidden":
        return _unknown_key(spot, extra_keys)
    if kind == "missing":
        return Problem(spot.path, "missing", f"Write {spot.path[-1]}: {wanted(spot)}")
    if kind == "union_tag_not_found":
        return Problem((*spot.path, "name"), "missing", f"Write name: {_choices(_all_tags(spot))}")
    if kind == "union_tag_invalid":
        name, _ = nearest(tree, (*spot.path, "name"))
        return _unknown_choice((*spot.path, "name"), name, _all_tags(spot))
    if kind == "literal_error":
        return _unknown_choice(spot.path, here, get_args(without_null(spot.annotation)))
    if kind == "value_error":  # a validator of ours: its message already has both parts
        what, _, todo = str(details["ctx"]["error"]).partition(". ")
        return Problem(spot.path, what, todo or "Write another value")
    if kind.endswith(("_type", "_parsing")):
        what, todo = _wrong_type(here, spot)
        return Problem(spot.path, what, todo)
    if depth == len(spot.path) and spot.field is not None:
        return Problem(spot.path, f"{shown(here)} does not fit", f"Write {wanted(spot)}")
    return Problem(spot.path, f"{shown(here)} does not fit ({details['msg']})", "Write another value")


def _unknown_key(spot: Spot, extra_keys: tuple[str, ...]) -> Problem:
    known = list(fields_of(spot.parent)) if spot.parent else []
    known += [key for key in extra_keys if len(spot.path) == 1 and key != spot.path[-1]]
    match = closest(spot.path[-1], known)
    if match is None:
        return Problem(spot.path, "unknown key", f"Known here: {', '.join(known)}", is_unknown_key=True)
    rest = f" (known here: {', '.join(known)})" if len(known) <= _FEW_KEYS else ""
    return Problem(
        spot.path, "unknown key", f"Write {match}{rest}", is_unknown_key=True, instead=(*spot.path[:-1], match)
    )


def _unknown_choice(path: tuple[str | int, ...], value: Marked, choices: Iterable[Any]) -> Problem:
    names = [str(choice) for choice in choices]
    match = closest(value.text, names)
    todo = f"Write {match} (known: {', '.join(names)})" if match and len(names) > 1 else f"Write {_choices(names)}"
    return Problem(path, f"{shown(value)} is not known", todo)


def _wrong_type(here: Marked, spot: Spot) -> tuple[str, str]:
    wants, todo = without_null(spot.annotation), f"Write {wanted(spot)}"
    if here.value is None:
        return "empty", todo
    if wants in (int, float) and not isinstance(here.value, bool):
        number = _as_number(here.text, whole=wants is int)
        todo = f"Write {number}" if number else todo
        if isinstance(here.value, float):
            return f"{shown(here)} is no whole number", todo
    elif wants is str and isinstance(here.value, dict) and list(here.value) == ["root"]:
        todo = "Write '{root}', in quotes"  # without them YAML reads braces as a mapping
    elif wants is str and here.text:
        quoted = here.text.replace("'", "''")
        todo = f"Write '{quoted}', in quotes"
    return f"{shown(here)} is {_value_words(here.value)} in YAML", todo


def shown(tree: Marked) -> str:
    """Show a value as its writer wrote it, shortened."""
    if isinstance(tree.value, dict):
        text = f"{{{', '.join(tree.value)}}}"
    elif isinstance(tree.value, list):
        text = f"[{', '.join(shown(child) for child in tree.value[:3])}]"
    else:
        text = f"'{tree.text}'" if isinstance(tree.value, str) else tree.text or "null"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _as_number(text: str, whole: bool) -> str | None:
    """Return how YAML 1.1 wants this number, which needs a point and a signed exponent; None if it is no number."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or not (match[2] or match[3]):
        return None
    sign, digits, fraction = match[1].replace("+", ""), (match[2] or "0").replace(",", "_"), match[3] or "0"
    if whole:
        value = float(text.replace(",", "").replace("_", ""))
        return f"{int(value):_}" if abs(value) < 2**53 and value == int(value) else None
    if match[4] is None:
        return f"{sign}{digits}.{fraction}" if match[3] else f"{sign}{digits}"
    exponent = match[4] if match[4][0] in "+-" else f"+{match[4]}"
    return f"{sign}{digits}.{fraction}e{exponent}"


def _value_words(value: Any) -> str:
    kinds: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "true or false"),
        ((int, float), "a number"),
        (str, "a text"),
        (dict, "a mapping"),
        (list, "a list"),
        (datetime.date, "a date"),
    ]
    return next((words for kind, words in kinds if isinstance(value, kind)), "empty")


def _type_words(annotation: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Any: "a value"}
    if annotation in words:
        return words[annotation]
    if get_origin(annotation) is Literal:
        return _choices(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) is list:
        return "a list"
    models = models_of(annotation)
    if len(models) == 1:
        required = [key for key, field in fields_of(models[0]).items() if field.is_required()]
        return f"a mapping with {', '.join(required or fields_of(models[0]))}"
    names = [str(tag) for model in models for tag in tags_of(model)]
    return f"a mapping with name: {_choices(names)}" if names else "a mapping"


def _choices(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def without_null(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        return without_null(get_args(annotation)[0])
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    kept = [member for member in get_args(annotation) if member is not types.NoneType]
    return kept[0] if len(kept) == 1 else annotation


def models_of(annotation: Any) -> list[type[BaseModel]]:
    annotation = without_null(annotation)
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]


def tags_of(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["name"].annotation) if "name" in model.model_fields else ()


def _all_tags(spot: Spot) -> list[str]:
    return [str(tag) for model in models_of(spot.annotation) for tag in tags_of(model)]
