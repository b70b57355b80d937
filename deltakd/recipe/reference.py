"""What a recipe may hold, for editors, for shells and for people: all made from the settings themselves.

The JSON schema lets a file leave out what it inherits: editors see one file and not what it extends, so nothing is
required and a part may lack the name that it inherits. What is missing in the end `deltakd check` says.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deltakd.recipe.explain import Spot, fields_of, models_of, tags_of, wanted, without_null
from deltakd.recipe.marks import NAMED_BY_A_WORD
from deltakd.recipe.schema import Recipe

UNIONS = ("objective.target", "objective.divergence", "engine")  # whose keys depend on a name
EXTENDS = "What this file is laid on: a recipe's name or path; or a list, the base first and methods laid on it behind."
HEAD = """\
# The recipe, key by key

    python -m deltakd schema --markdown > docs/reference.md
    python -m deltakd schema > recipe.schema.json

The first command made this page from the settings; the second gives editors the same. What stands under `default` is
what a recipe has that does not say otherwise; **must** marks what it has to say, itself or by what it extends. Beside
these a file may hold `extends`, and `{root}` or `{models.ROLE.weights}` in a text stand for their values:
[recipes.md](recipes.md).
"""


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a recipe's file."""
    schema: dict[str, Any] = _loosened(Recipe.model_json_schema(by_alias=True))
    parts = schema["$defs"]
    name = {"type": "string"}
    listed = {"type": "array", "items": name, "minItems": 1}
    extends = {"description": EXTENDS, "anyOf": [name, listed]}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    stage = parts["StageSettings"]["properties"]["train"]
    stage["anyOf"] = [{"$ref": "#"}, {"type": "null"}]
    stages = schema["properties"]["pipeline"]  # a list of one's own, or by name what changes in the extended one's
    stages |= {"type": ["array", "object"], "additionalProperties": stages["items"]}
    for key in NAMED_BY_A_WORD:
        field = parts["ObjectiveSettings"]["properties"][key]
        names = [tag for model in models_of(_field("objective", key).annotation) for tag in tags_of(model)]
        field["anyOf"] = [{"enum": names}, *field["anyOf"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A recipe of deltakd"}


def _field(*path: str) -> FieldInfo:
    model: type[BaseModel] = Recipe
    for step in path[:-1]:
        (model,) = models_of(fields_of(model)[step].annotation)
    return fields_of(model)[path[-1]]


def _loosened(tree: Any) -> Any:
    """Drop what asks for keys that may be inherited, and names that only repeat the key's."""
    if isinstance(tree, list):
        return [_loosened(child) for child in tree]
    if not isinstance(tree, dict):
        return tree
    kept = {key: child for key, child in tree.items() if key not in ("required", "discriminator")}
    kept = {key: child for key, child in kept.items() if key != "title" or not isinstance(child, str)}
    return {"anyOf" if key == "oneOf" else key: _loosened(child) for key, child in kept.items()}


def settings() -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield every group of settings once, with the key where it stands first: `data.train`, `pipeline[]`."""
    waiting: list[tuple[str, type[BaseModel]]] = [("", Recipe)]
    seen: set[type[BaseModel]] = set()
    while waiting:
        key, model = waiting.pop(0)
        if model in seen:
            continue
        seen.add(model)
        yield key, model
        inner = [
            (f"{key}.{name}{mark}".lstrip("."), child)
            for name, field in fields_of(model).items()
            for mark, child in _children(field.annotation)
        ]
        waiting = [*inner, *waiting]


def _children(annotation: Any) -> list[tuple[str, type[BaseModel]]]:
    """Return the models that a value may hold; `[]` marks a list of them, `.NAME` a mapping of names to them."""
    annotation = without_null(annotation)
    if get_origin(annotation) is list:
        return [("[]", child) for child in models_of(get_args(annotation)[0])]
    if get_origin(annotation) is dict:
        return [(".NAME", child) for child in models_of(get_args(annotation)[1])]
    return [("", child) for child in models_of(annotation)]


def keys() -> dict[str, list[str]]:
    """Return every setting that the command line can override, with its values where those are few."""
    found: dict[str, list[str]] = {}
    waiting: list[tuple[str, type[BaseModel]]] = [("", Recipe)]
    while waiting:
        above, model = waiting.pop(0)
        for name, field in fields_of(model).items():
            key = f"{above}.{name}".lstrip(".")
            children = [child for mark, child in _children(field.annotation) if not mark]
            waiting += [(key, child) for child in children]
            if not children and name != "pipeline":
                found[key] = [*found.get(key, []), *_few(without_null(field.annotation))]
    return {key: list(dict.fromkeys(values)) for key, values in sorted(found.items())}


def _few(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    return [str(value) for value in get_args(annotation)] if get_origin(annotation) is Literal else []


def markdown() -> str:
    """Return the reference for people."""
    groups = list(settings())
    titles = {model: _title(key, model) for key, model in groups}
    return "\n".join([HEAD, *(_section(model, titles) for _, model in groups)])


def _title(key: str, model: type[BaseModel]) -> str:
    tags = tags_of(model) if key in UNIONS else ()
    names = f", name {' or '.join(f'`{tag}`' for tag in tags)}" if tags else ""
    return f"`{key}`{names}" if key else "Top level"


def _section(model: type[BaseModel], titles: Mapping[type[BaseModel], str]) -> str:
    about = " ".join((model.__doc__ or "").split())
    rows = [_row(name, field, titles) for name, field in fields_of(model).items()]
    return "\n".join(
        [f"## {titles[model]}", "", about, "", "| key | may be | default | |", "|---|---|---|---|", *rows, ""]
    )


def _row(name: str, field: FieldInfo, titles: Mapping[type[BaseModel], str]) -> str:
    cells = (f"`{name}`", _may_be(field, titles), _default(name, field), " ".join((field.description or "").split()))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _may_be(field: FieldInfo, titles: Mapping[type[BaseModel], str]) -> str:
    children = _children(field.annotation)
    if not children:
        return wanted(Spot((), field.annotation, field, None))
    mark = children[0][0]
    kind = {"[]": "a list of ", ".NAME": "NAME: "}.get(mark, "")
    links = dict.fromkeys(f"[{titles[child]}](#{_anchor(titles[child])})" for _, child in children)
    null = "" if without_null(field.annotation) is field.annotation else ", or null"
    return f"{kind}{'; '.join(links)}{null}"


def _anchor(title: str) -> str:
    """Return what GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _default(name: str, field: FieldInfo) -> str:
    if name == "root":  # made up of the file's name while it is read
        return "`runs/NAME`"
    if field.is_required():
        return "**must**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_unset=True)
        return f"`{json.dumps(value)}`" if value else ""
    shown = value if isinstance(value, str) else json.dumps(value)
    return f"`{shown}`"
