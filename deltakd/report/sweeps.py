"""Response curves of sweeps: what each metric is over the values of a setting, as `deltakd sweep` has written it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltakd.report.evaluations import SHARES, number, title
from deltakd.report.find import SWEEP

MOST_METRICS = 12


@dataclass(frozen=True)
class Response:
    """One metric over one setting: by the other settings a line of (value, mean, lowest and highest seed, words)."""

    id: str
    title: str
    setting: str
    lines: Mapping[str, Sequence[tuple[float, float, float, float, str]]]


def responses(name: str, folder: Path) -> list[Response]:
    """Return the response curves of a sweep's folder; [] where there are none, or its file cannot be read."""
    try:
        found = json.loads((folder / SWEEP).read_text())
        curves = {key: lines for key, lines in found["curves"].items() if _are_numbers(lines)}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    made: list[Response] = []
    for key, lines in curves.items():
        for metric in list(lines[0]["points"][0]["metrics"])[:MOST_METRICS]:
            named = {_at(line["at"], found["short"]): [_point(one, metric) for one in line["points"]] for line in lines}
            setting = found["short"].get(key, key)
            words = f"{title(metric)} over {setting}" + ("" if name.removeprefix("sweeps/") == setting else f", {name}")
            made.append(Response(f"{name}: {metric} over {setting}", words, setting, named))
    return made


def _are_numbers(lines: Sequence[Mapping[str, Any]]) -> bool:
    values = [one["value"] for line in lines for one in line["points"]]
    return len(values) > 1 and all(isinstance(value, int | float) for value in values)


def _at(others: Mapping[str, Any], short: Mapping[str, str]) -> str:
    return ", ".join(f"{short.get(key, key)}={value}" for key, value in others.items()) or "all"


def _point(one: Mapping[str, Any], metric: str) -> tuple[float, float, float, float, str]:
    found = one["metrics"][metric]
    seeds, difference = found["by_seed"], found["difference"]
    factor = 100 if metric in SHARES else 1  # as the tables have it
    words = "the baseline"
    if difference is not None:
        mean, low, high = (number(difference[part], metric, "+") for part in ("mean", "low", "high"))
        words = f"{mean} [{low}, {high}] to the baseline"
    return float(one["value"]), factor * found["mean"], factor * min(seeds), factor * max(seeds), words
