"""Where the points of a sweep have the frozen models' words from: one cache, if they ask about the same batches.

Hidden states are kept per model, so points that differ in alpha, divergence or learning rate read the same payloads; a
seed has batches of its own, and one cache holds those of all. Models or data that differ, and batches that the student
writes, cannot be shared: then every point asks as its recipe says.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from deltakd.base.errors import RunError
from deltakd.base.rundir import RunDirectory
from deltakd.losses.settings import needed_references
from deltakd.recipe.checks import check_recipe
from deltakd.recipe.finished import is_finished
from deltakd.recipe.load import Loaded, load
from deltakd.recipe.schema import Recipe
from deltakd.study.grid import Grid, Point

SOURCE, PAYLOAD = "references.from", "references.payload"
UNSHARED = ("models", "data", "references")  # settings of several values that no cache is shared across
BATCHES = ("seed", "data", "models", "references", "validation")
OF_TRAIN = ("tokens_per_step", "tokens_per_micro_batch", "examples_per_micro_batch")


@dataclass(frozen=True)
class Sharing:
    """The points as they are started, what `deltakd cache` is run for first, and one line about it."""

    points: Sequence[Point]
    finished: frozenset[str]  # labels of points that are
    to_cache: Sequence[Loaded]
    why: str


def share(grid: Grid, may_cache: bool = True) -> Sharing:
    """Decide for every point where its references come from. Raises RunError if a folder holds another training."""
    points, finished = list[Point](), set[str]()
    for point in grid.points:
        point, is_done = _as_begun(grid, point)
        points.append(point)
        finished |= {point.label} if is_done else set()
    waiting = [point for point in points if point.label not in finished]
    asking = [point for point in waiting if needed_references(point.loaded.recipe.objective)]
    if not asking:
        why = "no frozen model is asked" if waiting else "every point is trained"
        return Sharing(points, frozenset(finished), [], f"references: {why}")
    if not may_cache:
        return Sharing(points, frozenset(finished), [], f"references: {_source(asking)}, each task its own")
    # Whether there is something to share is a question to the whole grid: the last point left reads it as well.
    all_asking = [point for point in points if needed_references(point.loaded.recipe.objective)]
    prepared = {point.label: _with(grid, point, *_cached(grid, point)) for point in all_asking if _can_be_cached(point)}
    if reason := _cannot(grid, all_asking, _representatives(list(prepared.values()))):
        why = f"references: {_source(asking)}, not shared: {reason}"
        return Sharing(points, frozenset(finished), [], why)
    num_batches = len({_batches(point.loaded.recipe) for point in prepared.values()})
    why = (
        f"references: from one cache; {len(all_asking)} points share {num_batches} sets of batches, about each of "
        "which the frozen models are asked once"
    )
    points = [point if point.label in finished else prepared.get(point.label, point) for point in points]
    representatives = _representatives([prepared[point.label] for point in asking])
    return Sharing(points, frozenset(finished), [point.loaded for point in representatives], why)


def _source(asking: Sequence[Point]) -> str:
    return ", ".join(sorted({point.loaded.recipe.references.source for point in asking}))


def _can_be_cached(point: Point) -> bool:
    return not point.loaded.recipe.rollouts.are_written


def _cannot(grid: Grid, asking: Sequence[Point], representatives: Sequence[Point]) -> str | None:
    """Say why the points that ask cannot share a cache; None if they can."""
    given = {word.partition("=")[0]: word for word in grid.fixed}
    for key in (SOURCE, "references"):
        if key in given and "cache" not in given[key]:
            return f"{given[key]}, as the command line says"
    for key in grid.keys:
        if key.partition(".")[0] in UNSHARED and not key.startswith("models.lora"):
            return f"{key} changes what the frozen models are asked about, or what they say"
    if not all(_can_be_cached(point) for point in asking):
        return "the student writes its own batches"
    batches = {_batches(point.loaded.recipe) for point in representatives}
    if len(batches) == len(asking):
        if len(asking) == 1:
            return "one point alone asks"
        is_hidden = representatives[0].loaded.recipe.references.payload in ("hidden", "logits")
        apart = "the payload holds the target, whose alpha each point sets"
        return "no two points have the same batches" if is_hidden else apart
    return None


def _representatives(points: Sequence[Point]) -> list[Point]:
    """Return those whose payloads are all that the others read: the longest for each set of batches and models."""
    longest: dict[tuple[str, frozenset[str]], Point] = {}
    for point in points:
        key = _batches(point.loaded.recipe), needed_references(point.loaded.recipe.objective)
        if key not in longest or longest[key].loaded.recipe.train.steps < point.loaded.recipe.train.steps:
            longest[key] = point
    return list(longest.values())


def _batches(recipe: Recipe) -> str:
    """Return all that the payloads of a training depend on but the number of its steps."""
    tree: dict[str, Any] = recipe.model_dump(mode="json", include=set(BATCHES))
    tree["models"].pop("lora")  # the student's alone
    tree["train"] = recipe.train.model_dump(mode="json", include=set(OF_TRAIN))
    if recipe.references.payload not in ("hidden", "logits"):
        objective = recipe.objective.model_dump(mode="json", include={"target", "temperature"})
        tree["objective"] = [objective, recipe.train.steps]
    return json.dumps(tree, sort_keys=True)


def _is_given(grid: Grid, key: str) -> bool:
    words = [*(word.partition("=")[0] for word in grid.fixed), *grid.keys]
    return key in words or "references" in words


def _cached(grid: Grid, point: Point) -> list[str]:
    """Return what a point is started with to read a cache: `auto` might send the target of one alpha."""
    is_auto = point.loaded.recipe.references.payload == "auto" and not _is_given(grid, PAYLOAD)
    begun = (Path(point.loaded.recipe.directory) / "recipe.yaml").exists()
    return [f"{SOURCE}=cache", *([f"{PAYLOAD}=hidden"] if is_auto and not begun else [])]


def _with(grid: Grid, point: Point, *more: str) -> Point:
    """Return a point with more settings, which win over what was typed for the same key."""
    keys = {word.partition("=")[0] for word in more}
    overrides = [*(word for word in point.overrides if word.partition("=")[0] not in keys), *more]
    loaded = load(grid.recipe, overrides)
    check_recipe(loaded.recipe, loaded.where)
    return replace(point, overrides=overrides, loaded=loaded)


def _as_begun(grid: Grid, point: Point) -> tuple[Point, bool]:
    """Return a point with the references that its run was begun with, and whether it is finished.

    Where they came from may differ between two lives of a sweep (a cluster, this machine) and changes no number; which
    payload was sent may not change within a run.
    """
    run = RunDirectory(Path(point.loaded.recipe.directory))
    stored = run.path / "recipe.yaml"
    if stored.exists():
        try:
            begun = yaml.safe_load(stored.read_text())["references"]
            given = {PAYLOAD: begun["payload"], SOURCE: begun["from"]}
        except (yaml.YAMLError, KeyError, TypeError, OSError, UnicodeDecodeError) as error:
            raise RunError(
                f"{stored}: cannot be read ({type(error).__name__}). Remove the folder {run.path}."
            ) from error
        payload = [] if _is_given(grid, PAYLOAD) else [f"{PAYLOAD}={given[PAYLOAD]}"]
        same = _with(grid, point, *payload)
        if run.finished() is not None:
            done = _with(grid, same, f"{SOURCE}={given[SOURCE]}")
            if _is_finished(run, done.loaded.recipe):
                return done, True
        return same, False
    return point, False


def _is_finished(run: RunDirectory, recipe: Recipe) -> bool:
    try:
        return is_finished(run, recipe)
    except RunError as error:
        raise RunError(f"{error} For a sweep that is --name with another name.") from error
