"""The grid of a sweep: which settings take several values, and one recipe for each combination of them.

`objective.target.alpha=0,0.5,1` has three values: commas at top level separate, those inside brackets, braces or quotes
do not. Reads recipes alone; imports no torch.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from deltakd.base.errors import RecipeError, RunError
from deltakd.recipe.checks import check_recipe
from deltakd.recipe.load import Loaded, load
from deltakd.recipe.marks import plain, read_value

SWEEPS = "sweeps"  # folder under root
SEED = "seed"
SET_HERE = ("run", "root", "pipeline")
# Points whose rows or answers differ cannot be held against each other.
MEASURE = ("evaluation", "data.validation")
LONGEST = 40  # letters of a value in a folder's name
LONGEST_NAME = 230  # of the whole, with what is added to it for files: file systems allow 255
OPENING, CLOSING = "[{(", "]})"


@dataclass(frozen=True)
class Point:
    """One combination of values: its recipe, and what was typed to get it."""

    label: str  # its folder's name, as `alpha=0.5,seed=1`
    values: Mapping[str, Any]
    overrides: Sequence[str]
    loaded: Loaded

    @property
    def setting(self) -> dict[str, Any]:
        """Its values without the seed: what is repeated from several seeds."""
        return {key: value for key, value in self.values.items() if key != SEED}

    @property
    def seed(self) -> int:
        return self.loaded.recipe.seed


@dataclass(frozen=True)
class Grid:
    """All points of a sweep, in the order of its keys and of their values."""

    recipe: str
    name: str
    keys: Mapping[str, Sequence[Any]]
    fixed: Sequence[str]
    points: Sequence[Point]

    @property
    def folder(self) -> Path:
        """Where its results lie, and a folder for each point."""
        return Path(self.points[0].loaded.recipe.root) / SWEEPS / self.name

    @property
    def short(self) -> dict[str, str]:
        """What each key is called in names and tables."""
        return short_names(self.keys)


def read_grid(recipe: str, words: Sequence[str], name: str | None = None) -> Grid:
    """Return the grid of settings as they are typed. Raises RunError or RecipeError for one that is none.

    Looks at no models and no data.
    """
    fixed, varied = _apart(words)
    short = short_names(varied)
    name = name or "_".join(short[key] for key in varied if key != SEED) or SEED
    if re.fullmatch(r"[a-z0-9_]+", name) is None:
        raise RunError(f"--name: {name!r} is no name of a folder here. Write small letters, digits and _ only.")
    values = {key: [plain(read_value(text, key)) for text in texts] for key, texts in varied.items()}
    for key, read in values.items():
        for index, value in enumerate(read):
            if value in read[:index]:
                raise RunError(
                    f"{key}: {varied[key][read.index(value)]} and {varied[key][index]} are one value. Write it once."
                )
    points = [_point(recipe, name, fixed, dict(zip(varied, texts, strict=True)), short) for texts in product_of(varied)]
    _refuse_alike(points)
    _refuse_other_rows(points)
    return Grid(recipe, name, values, fixed, points)


def product_of(varied: Mapping[str, Sequence[str]]) -> Iterable[tuple[str, ...]]:
    """Yield every combination, the last key fastest."""
    return product(*varied.values())


def _apart(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the settings with one value, and the values of the others. Raises RunError for what is no grid."""
    fixed, varied, seen = list[str](), dict[str, list[str]](), set[str]()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise RunError(f"{word}: not a setting. Write it as seed=1,2,3 or train.steps=100.")
        if key in seen:
            raise RunError(f"{key}: given twice. Write its values once, separated by commas.")
        seen.add(key)
        parts = split_values(text)
        if key == "run" or (len(parts) > 1 and key in SET_HERE):
            raise RunError(f"{word}: a sweep sets {key} itself. Leave it out; there are --name and one root=FOLDER.")
        if len(parts) == 1:
            fixed.append(word)
            continue
        if "" in parts:
            raise RunError(f"{word}: a value between commas is missing. Write {key}=1,2,3, or quotes around a comma.")
        if any(key == one or key.startswith(f"{one}.") for one in MEASURE):
            raise RunError(f"{word}: points with different {key} cannot be compared. Write one value.")
        varied[key] = parts
    if not varied:
        raise RunError(
            "sweep: no setting has several values, which is one training. Write objective.target.alpha=0,0.5,1, or use "
            "`deltakd train`."
        )
    return fixed, varied


def split_values(text: str) -> list[str]:
    """Cut at the commas that are inside no brackets, braces or quotes.

    A quote opens where a value or a word of it begins, so that an apostrophe within a word is none.
    """
    parts, depth, quote, before = [""], 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote and before != "\\" else quote
        elif letter in "'\"" and (not before or before in ",:[{( "):
            quote = letter
        elif letter in OPENING:
            depth += 1
        elif letter in CLOSING:
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            before = letter
            continue
        parts[-1] += letter
        before = letter
    return [part.strip() for part in parts]


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Name each key by its last words: as few as tell it from the others."""
    keys = list(keys)
    short = {}
    for key in keys:
        words = key.split(".")
        ends = [".".join(words[-count:]) for count in range(1, len(words) + 1)]
        others = [other for other in keys if other != key]
        # All words, where the key is the end of another: `seed` beside `evaluation.seed`.
        short[key] = next((end for end in ends if not any(f".{o}".endswith(f".{end}") for o in others)), key)
    return {key: re.sub(r"[^a-z0-9]+", "_", name.lower()) for key, name in short.items()}


def _point(recipe: str, name: str, fixed: Sequence[str], texts: Mapping[str, str], short: Mapping[str, str]) -> Point:
    label = ",".join(f"{short[key]}={_slug(text)}" for key, text in texts.items())
    if len(label) > LONGEST_NAME:
        raise RunError(
            f"sweep: a folder would have a name of {len(label)} letters ({label[:LONGEST]}...), and {LONGEST_NAME} are "
            "the most. Write fewer settings with several values, or shorter values."
        )
    overrides = [*fixed, *(f"{key}={text}" for key, text in texts.items()), f"run={SWEEPS}/{name}/{label}"]
    loaded = load(recipe, overrides)
    check_recipe(loaded.recipe, loaded.where)
    if loaded.recipe.data.validation is None:
        raise RecipeError(
            f"{loaded.where('data.validation')}: missing, and a sweep scores its points on held-out rows. Write a path."
        )
    return Point(label, {key: plain(read_value(text, key)) for key, text in texts.items()}, overrides, loaded)


def _slug(text: str) -> str:
    """Write a value as a part of a folder's name; what a name cannot hold leaves a mark of the whole value."""
    name = re.sub(r"[^a-z0-9_.-]+", "_", text.lower()).strip("_")
    if name == text and len(name) <= LONGEST:
        return name
    mark = hashlib.blake2b(text.encode(), digest_size=2).hexdigest()
    return f"{name[:LONGEST]}_{mark}".lstrip("_")


def _refuse_other_rows(points: Sequence[Point]) -> None:
    """Refuse points that would be scored by other rows or settings: of a block that holds these besides."""
    first = points[0].loaded.recipe
    for point in points[1:]:
        recipe = point.loaded.recipe
        if (recipe.data.validation, recipe.evaluation) != (first.data.validation, first.evaluation):
            raise RunError(
                f"sweep: {points[0].label} and {point.label} differ in {' or '.join(MEASURE)} and cannot be compared. "
                "Write the keys that vary alone."
            )


def _refuse_alike(points: Sequence[Point]) -> None:
    """Refuse two points that are one training: `temperature=1,1.0`, or values that the recipe reads as the same."""
    seen: dict[str, str] = {}
    for point in points:
        text = point.loaded.recipe.model_dump_json(exclude={"run"})
        if text in seen:
            raise RunError(f"sweep: {seen[text]} and {point.label} are the same training. Write each value once.")
        seen[text] = point.label
