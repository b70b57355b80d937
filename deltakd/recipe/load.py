"""A recipe's file, what it extends, a stage's changes and the command line, as one checked Recipe.

Later ones win: extended file, file, stage, command line. Every value keeps the line that set it, for errors now and
later. Looks at no weights and no data, imports no torch, and takes milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

import deltakd
from deltakd.base.errors import RecipeError
from deltakd.recipe.explain import closest, explain, shown
from deltakd.recipe.marks import (
    COMMAND_LINE,
    Marked,
    merge,
    names_in,
    nearest,
    plain,
    read_file,
    read_value,
    replace_in_texts,
)
from deltakd.recipe.schema import Recipe

SUFFIXES = (".yaml", ".yml")
ROOT_MARK = "{root}"
ROLES = ("student", "student_raw", "teacher", "teacher_raw")  # whose weights `{models.ROLE.weights}` stands for
STUDIES = "studies"  # a folder of recipes/ whose files ask questions of recipes: deltakd/study
STAGE_CANNOT_SET = frozenset({"root", "run", "pipeline"})


@dataclass(frozen=True)
class Loaded:
    """A recipe together with the places that set its values."""

    recipe: Recipe
    tree: Marked
    stage: str | None = None

    def where(self, key: str) -> str:
        """Return `file:line: key` of a dotted key; the line is its nearest set parent's where it is not set itself."""
        return _where(self.tree, tuple(key.split(".")), self.stage)


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), stage: str | None = None) -> Recipe:
    """Load a recipe where the places of its values are not needed."""
    return load(name_or_path, overrides, stage).recipe


def load(name_or_path: str, overrides: Sequence[str] = (), stage: str | None = None) -> Loaded:
    """Load a recipe by name or path, with `key.sub=value` overrides, as it is or as one of its stages runs it.

    Raises RecipeError with at most three lines, each `file:line: key: what, value. What to write.`
    """
    path = find_recipe(name_or_path)
    tree = read_tree(path)
    if "root" not in tree.value:
        tree = merge(tree, Marked({"root": Marked(f"runs/{path.stem}", tree.place)}, tree.place))
    base = _validate(_override(tree, overrides), None)
    if stage is None:
        return base
    entered = _enter_stage(tree, base, stage, overrides)
    meant = [override for override in overrides if _is_meant_for(override.partition("=")[0], base.tree, entered)]
    place = ("pipeline", stage, "train")
    own, depth = nearest(_typed(tree, overrides), place)
    over = _as_resolved(own, nearest(base.tree, place)[0]).value if depth == len(place) else None
    # What is typed of this stage alone wins over what is typed of all.
    own = Marked(over if isinstance(over, dict) else {}, entered.place)
    return _validate(merge(_override(entered, meant), own), stage)


def find_recipe(name_or_path: str) -> Path:
    """Return the file of a recipe: a path as it is, a name from recipes/ here or beside the package."""
    known = _known_names()
    if Path(name_or_path).is_file() and _is_path(name_or_path):
        return Path(name_or_path)
    for folder in _recipe_folders():
        if (path := folder / f"{name_or_path}.yaml").is_file():
            return path
    if _is_path(name_or_path):
        raise RecipeError(f"{name_or_path}: no such file. Write a path, or one of the names {', '.join(known)}.")
    match = closest(name_or_path, known)
    hint = f"Write {match} (known: {', '.join(known)})" if match else f"Write one of {', '.join(known)}, or a path"
    raise RecipeError(f"recipe {name_or_path}: no recipe has this name. {hint}.")


def recipe_names(folder: str = "") -> list[str]:
    """Name the recipes that lie in recipes/, or those of a folder of it, in the order of the alphabet."""
    return [name for name in _known_names() if name.startswith(folder)]


def read_added(name_or_path: str) -> dict[str, Any]:
    """Return what a recipe adds to the one that it extends: the values of its file, as they are written there.

    Files of its own folder that it extends count as it: what is added is said of the first recipe from elsewhere.
    """
    path = find_recipe(name_or_path)
    added: dict[str, Any] = plain(_read_chain(path, (), path.resolve().parent))
    return added


def read_tree(path: Path) -> Marked:
    """Return a file laid on what it extends, not yet checked."""
    return _read_chain(path, ())


def as_override(key: str, value: Any) -> str:
    """Write a plain value as `key=value` that lays it on a recipe as `extends` would."""
    # PyYAML's words, not JSON's: YAML reads 1e-05 as a text. A list around it keeps scalars on one line.
    flow = yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=float("inf"))
    return f"{key}={flow.strip()[1:-1]}"


def dump_recipe(recipe: Recipe) -> str:
    """Write a resolved recipe as YAML that load_recipe reads back as an equal one, wherever the file lies."""
    # ASCII with escapes: PyYAML loses a next-line character in a key when it may write unicode.
    return str(yaml.safe_dump(recipe.model_dump(by_alias=True), sort_keys=False, width=120))


def _is_path(name_or_path: str) -> bool:
    return "/" in name_or_path or name_or_path.endswith(SUFFIXES)


def _recipe_folders() -> list[Path]:
    return [Path("recipes"), Path(deltakd.__file__).parents[1] / "recipes"]


def _known_names() -> list[str]:
    folders = _recipe_folders()
    files = [path.relative_to(one) for one in folders for path in one.rglob("*.yaml")]
    names = {str(file.with_suffix("")) for file in files if file.parts[0] != STUDIES}
    return sorted(names) or ["(recipes/ is empty)"]


def _read_chain(path: Path, extending: tuple[Path, ...], within: Path | None = None) -> Marked:
    """Read a file laid on what it extends; with `within`, on what lies in that folder or is added to its base alone.

    Of several that it extends the first is the base; of each later one comes what that adds to its own base, but where
    that lies (`root`). So a method is laid on any recipe.
    """
    tree = read_file(path)
    if "extends" not in tree.value:
        return tree
    extends = tree.value["extends"]
    tree = Marked({key: child for key, child in tree.value.items() if key != "extends"}, tree.place)
    chain = (*extending, path.resolve())
    base, *methods = [_find_extended(one, path, chain) for one in _listed(extends)]
    parts = [] if within is not None and base.resolve().parent != within else [_read_chain(base, chain, within)]
    for method in methods:
        added = _read_chain(method, chain, method.resolve().parent)
        parts.append(Marked({key: child for key, child in added.value.items() if key != "root"}, added.place))
    for part in [*parts[1:], tree] if parts else []:
        parts[0] = merge(parts[0], part)
    return parts[0] if parts else tree


def _listed(extends: Marked) -> list[Marked]:
    names: list[Marked] = extends.value if isinstance(extends.value, list) else [extends]
    for one in names or [extends]:
        if not isinstance(one.value, str) or not one.value:
            raise RecipeError(
                f"{extends.place}: extends: {shown(one)} is no file. Write a recipe's name or path, or a list of them."
            )
    return names


def _find_extended(extends: Marked, path: Path, chain: tuple[Path, ...]) -> Path:
    name = extends.value
    sibling = path.parent / (name if _is_path(name) else f"{name}.yaml")
    if sibling.is_file() and sibling.resolve() != path.resolve():
        parent = sibling
    elif name in _known_names():
        parent = find_recipe(name)
    elif studies := [file for one in _recipe_folders() if (file := one / STUDIES / f"{name}.yaml").is_file()]:
        parent = studies[0]
    elif _is_path(name):
        raise RecipeError(f"{extends.place}: extends: {sibling} does not exist. Write a path relative to this file.")
    else:
        try:
            parent = find_recipe(name)
        except RecipeError as error:
            raise RecipeError(f"{extends.place}: extends: {error}") from error
    if parent.resolve() in chain:
        raise RecipeError(f"{extends.place}: extends: {name} leads back to itself. Remove one extends.")
    return parent


def _override(tree: Marked, overrides: Sequence[str]) -> Marked:
    """Lay the overrides on the tree together, so that `target.alpha` before `target.name` is kept."""
    # Without overrides the top level keeps its own place, which errors about missing keys name.
    return Marked(merge(tree, _typed(tree, overrides)).value, tree.place)


def _typed(tree: Marked, overrides: Sequence[str]) -> Marked:
    """Return the overrides as one tree, to be laid on `tree`."""
    together = Marked({}, COMMAND_LINE)
    for override in overrides:
        key, equals, text = override.partition("=")
        steps = key.split(".")
        if not equals or not all(steps):
            raise RecipeError(f"{COMMAND_LINE}: {override}: not a setting. Write it as train.steps=100.")
        for depth in range(1, len(steps)):
            above, reached = nearest(tree, steps[:depth])
            if reached == depth and isinstance(above.value, list) and steps[depth] not in names_in(above):
                listed = ".".join(steps[:depth])
                raise RecipeError(f"{COMMAND_LINE}: {key}: {listed} {_addressed(listed, above)}")
        value = read_value(text, key)
        for step in reversed(steps):
            value = Marked({step: value}, COMMAND_LINE)
        together = merge(together, value)
    return together


def _addressed(key: str, listed: Marked) -> str:
    names = names_in(listed)
    if not names:
        return f"is a list, and lists are replaced whole. Write {key}=[...], or edit {listed.place}."
    return f"is a list of {', '.join(names)}. Write {key}.{names[0]}... for one of them, or edit {listed.place}."


def _enter_stage(tree: Marked, base: Loaded, stage: str, overrides: Sequence[str]) -> Marked:
    """Lay a stage's changes on the file's tree and name the run after it."""
    if "pipeline" in tree.value:  # what its texts stand for is the recipe's, not the stage's
        tree = Marked({**tree.value, "pipeline": base.tree.value["pipeline"]}, tree.place)
    names = [known.name for known in base.recipe.pipeline]
    trainings = [known.name for known in base.recipe.pipeline if known.kind == "train"]
    if stage not in trainings:
        what = "does not train" if stage in names else "is in no pipeline here"
        known = f"Write one of {', '.join(trainings)}" if trainings else "Leave --stage out"
        raise RecipeError(f"{base.where('pipeline')}: stage {stage} {what}. {known}.")
    if any(override.partition("=")[0] == "run" for override in overrides):
        raise RecipeError(f"{COMMAND_LINE}: run: a stage's run has the stage's name, here {stage}. Leave run out.")
    entry, _ = nearest(base.tree, ("pipeline", names.index(stage)))
    changes = entry.value.get("train", Marked({}, entry.place))
    if isinstance(changes.value, dict):
        for key in STAGE_CANNOT_SET & set(changes.value):
            place = changes.value[key].place
            raise RecipeError(
                f"{place}: stage {stage}: {key}: a stage cannot set it (run is the stage's name). Remove it."
            )
        tree = merge(tree, Marked(changes.value, tree.place))
    return merge(tree, Marked({"run": Marked(stage, entry.place, stage)}, tree.place))


def _as_resolved(own: Marked, resolved: Marked) -> Marked:
    """Return what was typed of a stage, with its texts as the recipe has them."""
    known = resolved.value
    if isinstance(own.value, dict) and isinstance(known, dict):
        texts = {key: _as_resolved(child, known[key]) if key in known else child for key, child in own.value.items()}
        return Marked(texts, own.place)
    return own if isinstance(known, dict) else resolved


def _is_meant_for(key: str, base: Marked, stage: Marked) -> bool:
    """Tell whether an override of the recipe also means a stage: alpha means nothing where the stage's target has none.

    It does not where a mapping on the way has another `name` in the stage than in the recipe, unless it sets the name.
    """
    steps = key.split(".")
    for depth in range(1, len(steps)):
        names = []
        for tree in (base, stage):
            here, reached = nearest(tree, steps[:depth])
            is_named = reached == depth and isinstance(here.value, dict) and "name" in here.value
            names.append(here.value["name"].value if is_named else None)
        if names[0] != names[1] and steps[depth:] != ["name"]:
            return False
    return True


def _validate(tree: Marked, stage: str | None) -> Loaded:
    root = tree.value["root"].value
    if isinstance(root, str):
        if not root or "{" in root or "}" in root:
            raise RecipeError(f"{_where(tree, ('root',), stage)}: {root!r} is no folder. Write one without braces.")
        tree = replace_in_texts(tree, ROOT_MARK, root)
    for role in ROLES:
        key = ("models", role, "weights")
        weights, depth = nearest(tree, key)
        if depth == len(key) and isinstance(weights.value, str) and "{models." not in weights.value:
            tree = replace_in_texts(tree, f"{{{'.'.join(key)}}}", weights.value)
    try:
        return Loaded(Recipe.model_validate(plain(tree)), tree, stage)
    except ValidationError as error:
        problems = explain(error, Recipe, tree, extra_keys=("extends",))
        lines = [f"{_where(tree, problem.path, stage)}: {problem.what}. {problem.todo}." for problem in problems]
        raise RecipeError("\n".join(lines)) from error


def _where(tree: Marked, path: Sequence[str | int], stage: str | None) -> str:
    here, _ = nearest(tree, path)
    key = ".".join(str(step) for step in path)
    return f"{here.place}: stage {stage}: {key}" if stage else f"{here.place}: {key}"
