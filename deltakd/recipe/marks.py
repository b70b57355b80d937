"""YAML as a tree of values that remember which line set them, and how two such trees merge.

Knows no schema. Marks survive merging, so an error names the file that set the value, not the one that extends it.
Stricter than YAML: keys are texts, and one mapping holds a key once. Anchors work; `<<` does not, `extends` does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deltakd.base.errors import RecipeError

COMMAND_LINE = "command line"
_TEXT_TAG = "tag:yaml.org,2002:str"
_MERGE_TAG = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Marked:
    """A value and the place that set it; a mapping or list holds marked values, a scalar its text as written."""

    value: Any
    place: str
    text: str = ""


def read_file(path: Path) -> Marked:
    """Read one file whose top level is a mapping; raise RecipeError with file and line otherwise."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). Write the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8 text.") from error
    tree = _read(text, str(path), lambda line: f"{path}:{line}")
    if tree is None:
        raise RecipeError(f"{path}: the file is empty. Write models, data and train, or extends: NAME.")
    if not isinstance(tree.value, dict):
        raise RecipeError(
            f"{tree.place}: the file holds {_kind(tree.value)}. Write keys and values: models, data, train."
        )
    return tree


def read_value(text: str, key: str) -> Marked:
    """Read the value of one command line override as YAML."""
    tree = _read(text, f"{COMMAND_LINE}: {key}", lambda line: COMMAND_LINE, key)
    if tree is None:
        raise RecipeError(f"{COMMAND_LINE}: {key}: no value. Write {key}=VALUE, or {key}=null.")
    return tree


# Where a name alone stands for the mapping with that name.
NAMED_BY_A_WORD = ("target", "divergence")


def merge(base: Marked, over: Marked) -> Marked:
    """Lay `over` on `base`: mappings merge key by key, anything else replaces.

    A mapping whose `name` changes replaces too, since settings of one named part mean nothing to another. A name alone
    under settings of its part (`divergence=jsd divergence.beta=0.3`) is the mapping with that name. A mapping laid on
    a list of named mappings, as a pipeline is, names those that it changes. Raises RecipeError for a name that is none.
    """
    if isinstance(over.value, dict) and over.value and (names := names_in(base)):
        return _merge_named(base, names, over)
    if not isinstance(base.value, dict) or not isinstance(over.value, dict) or _changes_name(base.value, over.value):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(_spelt_out(key, merged[key]), _spelt_out(key, child)) if key in merged else child
    return Marked(merged, over.place)


def names_in(tree: Marked) -> list[str]:
    """Return the names of a list's items, in order; [] for what is no list of named mappings."""
    items = tree.value if isinstance(tree.value, list) else []
    names = [item.value["name"].value for item in items if isinstance(item.value, dict) and "name" in item.value]
    return names if len(names) == len(items) and all(isinstance(name, str) for name in names) else []


def _merge_named(base: Marked, names: Sequence[str], over: Marked) -> Marked:
    for name, child in over.value.items():
        if name not in names:
            raise RecipeError(f"{child.place}: {name}: nothing here has this name. Write one of {', '.join(names)}.")
    items = [
        merge(item, over.value.get(name, Marked({}, item.place))) for name, item in zip(names, base.value, strict=True)
    ]
    return Marked(items, base.place)


def _spelt_out(key: str, tree: Marked) -> Marked:
    is_word = key in NAMED_BY_A_WORD and isinstance(tree.value, str)
    return Marked({"name": tree}, tree.place) if is_word else tree


def plain(tree: Marked) -> Any:
    """Return the values without their marks."""
    if isinstance(tree.value, dict):
        return {key: plain(child) for key, child in tree.value.items()}
    if isinstance(tree.value, list):
        return [plain(child) for child in tree.value]
    return tree.value


def replace_in_texts(tree: Marked, old: str, new: str) -> Marked:
    """Replace `old` in every text value; keys and marks stay."""
    if isinstance(tree.value, dict):
        return Marked({key: replace_in_texts(child, old, new) for key, child in tree.value.items()}, tree.place)
    if isinstance(tree.value, list):
        return Marked([replace_in_texts(child, old, new) for child in tree.value], tree.place)
    if isinstance(tree.value, str) and old in tree.value:
        return Marked(tree.value.replace(old, new), tree.place, tree.text.replace(old, new))
    return tree


def nearest(tree: Marked, path: Sequence[str | int]) -> tuple[Marked, int]:
    """Follow `path` as far as it is set; return what is there and how many steps were taken."""
    for depth, step in enumerate(path):
        children = tree.value
        if step in (names := names_in(tree)):
            tree = children[names.index(str(step))]
        elif isinstance(children, list) and str(step).isdecimal() and int(step) < len(children):
            tree = children[int(step)]
        elif isinstance(children, dict) and step in children:
            tree = children[step]
        else:
            return tree, depth
    return tree, len(path)


def _changes_name(base: dict[str, Marked], over: dict[str, Marked]) -> bool:
    return "name" in base and "name" in over and base["name"].value != over["name"].value


def _read(text: str, source: str, place: Callable[[int], str], key: str = "") -> Marked | None:
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _Marker(loader, place).mark(node, node, key, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        prefix = f"{COMMAND_LINE}: {key}" if key else place(line + 1)
        todo = "Check indentation, colons, quotes and brackets"
        if "{root}" in "".join(text.splitlines()[line : line + 1]):
            todo = "Write a text that starts with {root} in quotes"
        raise RecipeError(f"{prefix}: not YAML: {error.problem}. {todo}.") from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise RecipeError(f"{source}: not YAML: {problem}. Write printable text.") from error


class _Marker:
    """Turns composed YAML nodes into marked values; `place` renders a line number."""

    def __init__(self, loader: yaml.SafeLoader, place: Callable[[int], str]) -> None:
        self._loader = loader
        self._place = place

    def mark(self, node: yaml.Node, placed: yaml.Node, key: str, above: tuple[yaml.Node, ...]) -> Marked:
        """Mark `node` with the line of `placed`, the key or list item that brings it; `above` are its ancestors."""
        place = self._place(placed.start_mark.line + 1)
        if any(node is ancestor for ancestor in above):
            raise RecipeError(f"{place}: {key}: an alias of something that contains it. Write the value out.")
        if isinstance(node, yaml.MappingNode):
            return Marked(self._mapping(node, key, (*above, node)), place)
        if isinstance(node, yaml.SequenceNode):
            items = [self.mark(item, item, f"{key}.{i}", (*above, node)) for i, item in enumerate(node.value)]
            return Marked(items, place)
        try:
            return Marked(self._loader.construct_object(node), place, str(node.value))
        except ValueError as error:  # what looks like a date or a number to YAML and is none, such as 2024-13-45
            raise RecipeError(
                f"{place}: {key}: {node.value} cannot be read ({error}). Write '{node.value}'."
            ) from error

    def _mapping(self, node: yaml.MappingNode, key: str, above: tuple[yaml.Node, ...]) -> dict[str, Marked]:
        children: dict[str, Marked] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node.start_mark.line + 1)
            if key_node.tag == _MERGE_TAG:
                raise RecipeError(
                    f"{place}: {key or 'top level'}: `<<` is not read. Write the keys out, or use extends."
                )
            if key_node.tag != _TEXT_TAG:
                text = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                raise RecipeError(
                    f"{place}: {key or 'top level'}: the key {text} is no text to YAML. Write it in quotes."
                )
            name = key_node.value
            child_key = f"{key}.{name}" if key else name
            if name in children:
                first = children[name].place
                raise RecipeError(f"{place}: {child_key}: written twice, first at {first}. Remove one of them.")
            children[name] = self.mark(value_node, key_node, child_key, above)
        return children


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"only {str(value)[:60]!r}"
