"""What a sweep found: means of every point, response curves over seeds with paired intervals, and their table.

Nothing is trained or scored here: it takes the rows that were kept. `sweep.json`:

    {"recipe", "name", "fixed": [setting], "keys": [...], "short": {key: name}, "baseline": {key: value},
     "replicates": "seed" or null, "command", and the machine's facts,
     "points":   [{"label", "values": {key: value}, "run": path, "status", "metrics": {name: mean}, "why"}],
     "settings": [{"values", "seeds", "metrics": {name: {"mean", "by_seed": [...], "difference": {mean, low, high}}}}],
     "curves":   {key: [{"at": {other key: value}, "points": [{"value", "metrics": as above}]}]},
     "frozen":   {role: {name: mean}}}

`status` is finished, failed (and `why`), or waiting. A setting is a point without its seed; its interval is that of the
mean difference per seed and prompt to the baseline. Settings of which a seed is missing are left out, and so is their
place on the curves. Keys that `baseline` leaves out are alike on both sides of a difference.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from deltakd.base.errors import RunError
from deltakd.evaluate.compare import TITLES, ModelScores, shown, signed
from deltakd.evaluate.scores import Interval, two_level_difference
from deltakd.recipe.marks import plain, read_value
from deltakd.study.grid import SEED, Grid, Point, split_values


def replicated(grid: Grid) -> bool:
    """Tell whether seeds repeat the settings; a sweep of seeds alone compares them."""
    return SEED in grid.keys and len(grid.keys) > 1


def setting_of(grid: Grid, point: Point) -> dict[str, Any]:
    """Return what a point shares with those that repeat it."""
    return point.setting if replicated(grid) else dict(point.values)


def find_baseline(grid: Grid, text: str | None) -> dict[str, Any]:
    """Return what `alpha=0.5,lr=1e-3` says of the setting that others are held against; by default it is the first.

    Keys that are left out are each setting's own: with `alpha=0` others are held against alpha 0 and all else alike.
    Raises RunError for a key or a value that is not in the sweep.
    """
    found, first = dict[str, Any](), setting_of(grid, grid.points[0])
    by_name = {name: key for key, name in grid.short.items()} | {key: key for key in grid.keys}
    for part in split_values(text) if text else []:
        name, _, value = part.partition("=")
        key = by_name.get(name)
        if key not in first:
            known = ", ".join(grid.short[key] for key in first)
            raise RunError(f"--baseline: {part} names no setting of this sweep. Write some of {known}, as alpha=0.5.")
        read = plain(read_value(value, key))
        if read not in grid.keys[key]:
            raise RunError(f"--baseline: {part}: {key} has no such value here. Write one of {_texts(grid.keys[key])}.")
        found[key] = read
    return found or first


def _texts(values: Sequence[Any]) -> str:
    return ", ".join(_text(value) for value in values)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def label_of(setting: Mapping[str, Any], short: Mapping[str, str]) -> str:
    """Name a setting as its points are: `alpha=0.5, sft_weight=0`."""
    return ", ".join(f"{short[key]}={_text(value)}" for key, value in setting.items())


def against_of(found: Mapping[str, Any]) -> str:
    """Say what settings were held against, in sweep.json's words."""
    whole = not found["settings"] or len(found["baseline"]) == len(found["settings"][0]["values"])
    return label_of(found["baseline"], found["short"]) + ("" if whole else " and all else alike")


def report(
    grid: Grid,
    status: Mapping[str, str],
    faults: Mapping[str, str],
    scores: Mapping[str, ModelScores],
    frozen: Sequence[ModelScores],
    baseline: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what stands in sweep.json; `status`, `faults` and `scores` are by a point's label."""
    settings = _settings(grid, scores, baseline)
    return {
        "recipe": grid.recipe,
        "name": grid.name,
        "fixed": list(grid.fixed),
        "keys": list(grid.keys),
        "short": grid.short,
        "replicates": SEED if replicated(grid) else None,
        "baseline": dict(baseline),
        "points": [_point(point, status[point.label], faults, scores) for point in grid.points],
        "settings": settings,
        "curves": {key: _curves(key, settings) for key in grid.keys if key != SEED or not replicated(grid)},
        "frozen": {one.label: _means(one) for one in frozen},
    }


def _means(scores: ModelScores) -> dict[str, float]:
    return {metric: scores.mean(metric) for metric in scores.rows}


def _point(point: Point, status: str, faults: Mapping[str, str], scores: Mapping[str, ModelScores]) -> dict[str, Any]:
    about = {"label": point.label, "values": dict(point.values), "run": point.loaded.recipe.directory, "status": status}
    about["metrics"] = _means(scores[point.label]) if point.label in scores else {}
    return about | ({"why": faults[point.label]} if point.label in faults else {})


def _settings(grid: Grid, scores: Mapping[str, ModelScores], baseline: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every setting whose points are all scored, in the grid's order, with its differences to the baseline."""
    groups: list[tuple[dict[str, Any], list[Point]]] = []
    for point in grid.points:
        setting = setting_of(grid, point)
        group = next((points for known, points in groups if known == setting), None)
        if group is None:
            groups.append((setting, [point]))
        else:
            group.append(point)
    whole = [(setting, points) for setting, points in groups if all(point.label in scores for point in points)]
    found = []
    for setting, points in whole:
        other = {**setting, **baseline}
        against = next((those for one, those in whole if one == other), None)
        found.append(_setting(grid, setting, points, against, scores, setting == other))
    return found


def _setting(
    grid: Grid,
    setting: dict[str, Any],
    points: Sequence[Point],
    against: Sequence[Point] | None,
    scores: Mapping[str, ModelScores],
    is_baseline: bool,
) -> dict[str, Any]:
    evaluation = grid.points[0].loaded.recipe.evaluation
    metrics: dict[str, Any] = {}
    for metric in scores[points[0].label].rows:
        by_seed = [scores[point.label].mean(metric) for point in points]
        metrics[metric] = {"mean": fmean(by_seed), "by_seed": by_seed, "difference": None}
        if against is not None and not is_baseline:
            rows, others = ([scores[one.label].rows[metric] for one in side] for side in (points, against))
            difference = two_level_difference(rows, others, evaluation.num_resamples, evaluation.seed)
            metrics[metric]["difference"] = asdict(difference)
    return {"values": setting, "seeds": [point.seed for point in points], "metrics": metrics}


def _curves(key: str, settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the settings along one key, a curve for each combination of the other keys."""
    curves: list[dict[str, Any]] = []
    for setting in settings:
        at = {name: value for name, value in setting["values"].items() if name != key}
        curve = next((one for one in curves if one["at"] == at), None)
        if curve is None:
            curves.append(curve := {"at": at, "points": []})
        curve["points"].append({"value": setting["values"][key], "metrics": setting["metrics"]})
    return curves


def markdown(found: Mapping[str, Any]) -> str:
    """Return the curves as one table, a row per setting, the frozen models above, and what is missing below."""
    settings, short = found["settings"], found["short"]
    metrics = list(settings[0]["metrics"]) if settings else []
    keys = list(settings[0]["values"]) if settings else []
    titles = [*(short[key] for key in keys), *(TITLES.get(metric, metric) for metric in metrics)]
    lines = [titles, ["---"] * len(titles)]
    for role, means in found["frozen"].items() if settings else ():
        lines.append([role, *["-"] * (len(keys) - 1), *(shown(means[metric], metric) for metric in metrics)])
    for setting in settings:
        cells = [_text(setting["values"][key]) for key in keys]
        for metric in metrics:
            one = setting["metrics"][metric]
            difference = f" ({signed(Interval(**one['difference']), metric)})" if one["difference"] else ""
            cells.append(shown(one["mean"], metric) + difference)
        lines.append(cells)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if settings else "No setting is whole yet."
    return f"# Sweep {found['name']} of {found['recipe']}\n\n{table}\n\n{_legend(found)}\n"


def _legend(found: Mapping[str, Any]) -> str:
    seeds = found["settings"][0]["seeds"] if found["settings"] else []
    against = against_of(found)
    over = "prompts and seeds, both resampled; of so few seeds it is too narrow where seeds matter more than prompts"
    if len(seeds) < 2:
        over = "prompts alone: there is one seed, and the interval does not know how far another would be"
    counts = {kind: sum(point["status"] == kind for point in found["points"]) for kind in ("failed", "waiting")}
    missing = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return (
        f"{len(found['points'])} points{f' ({missing})' if missing else ''}; means over held-out prompts"
        + (f" and the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "")
        + ". ROUGE: F1 x 100. Cross-entropy, `kept` and KL to the teacher: nats per token, lower is better. In "
        f"brackets: mean difference to {against} with its paired 95% bootstrap interval over {over}."
    )
