"""One run as a report sees it: how far it came, its curves, where its time went, who took part, by which recipe.

Read from files alone, so a run that trains just now is no different; nothing here raises for what a run left half
written: it becomes a note, and the page shows it under what was not measured.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from deltakd.base.errors import DeltaKDError
from deltakd.base.rundir import ROLLOUTS, RunDirectory
from deltakd.report.lines import read_columns, read_rows
from deltakd.report.serving import Serving, serving
from deltakd.report.thin import Curve, Floats, curve

CURVES: tuple[str, ...] = (
    "loss",
    "cross_entropy",
    "kl_to_target",
    "grad_norm",
    "learning_rate",
    "alpha",
    "policy",
    "reward",
)
CURVES += ("corpus", "student_entropy")
TIMES = ("step_s", "wait_s", "forward_backward_s", "update_s")
OTHERS = ("step", "num_tokens", "memory_bytes")
VALIDATED = ("step", "loss", "cross_entropy", "kl_to_target", "rougeL", "validation_s")
WRITTEN = ("step", "answers", "tokens", "fraction", "s")
SEVERAL_BYTES = 32 * 2**20  # of steps.jsonl, from which more than one process reads
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where PyYAML has it


@dataclass(frozen=True)
class Run:
    """What there is to say of a run; curves are thinned, seconds are sums over its steps."""

    name: str
    path: Path
    state: str
    steps: int
    planned: int | None
    facts: Mapping[str, Any]
    finished: Mapping[str, Any] | None
    recipe_text: str
    recipe: Mapping[str, Any]
    curves: Mapping[str, Curve]
    validated: Mapping[str, Sequence[float | None]]
    seconds: Mapping[str, float]
    tokens: float
    serving: Serving
    went_on: int
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def is_finished(self) -> bool:
        return self.finished is not None

    @property
    def versions(self) -> str:
        """The versions of Python and of the libraries, in one line."""
        known = self.facts.get("versions")
        parts = [f"{name} {version}" for name, version in known.items()] if isinstance(known, dict) else []
        return ", ".join([f"Python {self.facts['python']}", *parts] if "python" in self.facts else parts)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of its batches per second of steps, its own writing included."""
        spent = sum(self.seconds.get(name, 0.0) for name in ("step", "rollouts"))
        return self.tokens / spent if spent else None


def read_runs(folders: Sequence[tuple[str, Path]], most_points: int) -> list[Run]:
    """Read runs, several at a time if there is much; the ones that began first come first."""
    read = partial(read_run, most_points=most_points)
    size = sum(file.stat().st_size for _, path in folders if (file := path / "steps.jsonl").exists())
    workers = min(os.cpu_count() or 1, 8, len(folders))
    if size > SEVERAL_BYTES and workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            runs = list(pool.map(read, folders, chunksize=4))
    else:
        runs = [read(one) for one in folders]
    return sorted(runs, key=lambda run: (str(run.facts.get("started", "~")), run.name))


def read_run(named: tuple[str, Path], most_points: int) -> Run:
    """Read one run's directory, given with its name."""
    name, path = named
    directory = RunDirectory(path)
    notes = list[str]()
    text, recipe = _recipe(path, notes)
    finished = _finished(directory, notes)
    steps, torn = read_columns(path / "steps.jsonl", (*OTHERS, *CURVES, *TIMES))
    validated, torn_too = read_columns(path / "validation.jsonl", VALIDATED)
    written, torn_three = read_columns(path / ROLLOUTS, WRITTEN)
    if torn + torn_too + torn_three:
        notes.append(f"{torn + torn_too + torn_three} half-written line(s) of its records are left out")
    done = int(steps["step"][-1]) if len(steps["step"]) else 0
    train = recipe.get("train")
    planned = train.get("steps") if isinstance(train, dict) else None
    went_on, _ = read_rows(path / "resumed.jsonl")
    return Run(
        name=name,
        path=path,
        state=_state(directory, finished, done),
        steps=done,
        planned=planned if isinstance(planned, int) else None,
        facts=_json(path / "run.json", notes),
        finished=finished,
        recipe_text=text,
        recipe=recipe,
        curves=_curves(steps, written, most_points),
        validated={key: _numbers(values) for key, values in validated.items()} if len(validated["step"]) else {},
        seconds=_seconds(steps, validated, written),
        tokens=float(np.nansum(steps["num_tokens"])),
        serving=serving(path, _peak(steps["memory_bytes"]), notes),
        went_on=len(went_on),
        notes=notes,
    )


def _recipe(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    try:
        text = (path / "recipe.yaml").read_text()
        tree = yaml.load(text, Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"recipe.yaml cannot be read ({type(error).__name__})")
        return "", {}
    return text, tree if isinstance(tree, dict) else {}


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        notes.append(f"no {path.name}: commit, machine and seed are unknown")
    except (OSError, ValueError, TypeError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__})")
    return {}


def _finished(directory: RunDirectory, notes: list[str]) -> dict[str, Any] | None:
    try:
        return directory.finished()
    except (DeltaKDError, OSError) as error:
        notes.append(f"finished.json is not what a run writes ({type(error).__name__})")
        return None


def _state(directory: RunDirectory, finished: Mapping[str, Any] | None, done: int) -> str:
    if finished is not None:
        return "finished"
    live = False
    with suppress(OSError):
        live = directory.is_live()
    if live:
        return "training"
    return "stopped" if done else "no step"


def _curves(steps: Mapping[str, Floats], written: Mapping[str, Floats], most: int) -> dict[str, Curve]:
    x, spent = steps["step"], steps["step_s"]
    values = {name: steps[name] for name in CURVES}
    with np.errstate(divide="ignore", invalid="ignore"):
        values["tokens_per_s"] = steps["num_tokens"] / spent
        values["waiting"] = steps["wait_s"] / spent
        values["memory"] = steps["memory_bytes"] / 2**30
        answers = {"answer_tokens": written["tokens"] / written["answers"], "on_policy": written["fraction"]}
    found = {name: curve(x, y, most) for name, y in values.items()}
    found |= {name: curve(written["step"], y, most) for name, y in answers.items()}
    return {name: one for name, one in found.items() if one is not None}


def _seconds(
    steps: Mapping[str, Floats], validated: Mapping[str, Floats], written: Mapping[str, Floats]
) -> dict[str, float]:
    seconds = {name.removesuffix("_s"): float(np.nansum(steps[name])) for name in TIMES}
    return seconds | {
        "rollouts": float(np.nansum(written["s"])),
        "validation": float(np.nansum(validated["validation_s"])),
    }


def _numbers(values: Floats) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _peak(memory: Floats) -> float | None:
    return float(np.nanmax(memory)) if np.isfinite(memory).any() else None
