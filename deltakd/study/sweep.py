"""`deltakd sweep`: the grid of all settings with several values, trained, scored on the same prompts, in one table.

    ROOT/sweeps/NAME/sweep.json, table.md           what came of it (results.py)
    ROOT/sweeps/NAME/alpha=0.5,seed=1/              a run for each point, with its log
    ROOT/sweeps/NAME/scores/, predictions/          every answer with its scores
    ROOT/cache/                                     what the frozen models said, once for all points

Each point is a command that a user could have typed. The same command goes on after any kill and repeats nothing.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deltakd.base.errors import RunError
from deltakd.base.files import write_json, write_text
from deltakd.base.machine import machine_facts
from deltakd.base.processes import use_threads
from deltakd.base.rundir import RunDirectory
from deltakd.evaluate.compare import ModelScores
from deltakd.evaluate.grouped import write_groups
from deltakd.evaluate.settings import CompareSettings
from deltakd.recipe.caching import cache_for
from deltakd.recipe.evaluation import score_models
from deltakd.recipe.held_out import held_out_conversations
from deltakd.recipe.load import as_override
from deltakd.recipe.paths import check_hub, check_paths
from deltakd.recipe.pipeline import name_accelerator
from deltakd.recipe.trainings import Training, free_devices, refuse_failed, train_all
from deltakd.study.grid import Grid, read_grid
from deltakd.study.results import against_of, find_baseline, label_of, markdown, report
from deltakd.study.sharing import Sharing, share

SCORED = TEACHER, RAW = "teacher", "student_raw"  # beside the points
JOB_SCRIPT = "slurm/deltakd_qwen.sbatch"


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    recipe: str
    words: Sequence[str]
    name: str | None
    jobs: int | None
    baseline: str | None
    slurm: bool
    sbatch: str


def sweep(asked: Asked) -> None:
    """Train what is missing, score all, write JSON and table.

    Raises RunError for a grid that is none, before anything runs, and for runs that failed, after the others are done.
    """
    if asked.jobs is not None and asked.jobs < 1:
        raise RunError(f"--jobs: {asked.jobs} trainings at a time are none. Write 1 or more.")
    _words(asked.sbatch)
    grid = read_grid(asked.recipe, asked.words, asked.name)
    baseline = find_baseline(grid, asked.baseline)
    first = grid.points[0].loaded
    for point in grid.points:
        check_paths(point.loaded.recipe, point.loaded.where, asked.recipe)
    scored = [role for role in SCORED if role in first.recipe.models.roles]  # at the end, whatever is learnt from
    check_paths(first.recipe, first.where, asked.recipe, scored)
    check_hub(first.recipe, first.where, scored)
    held_out_conversations(first.recipe, 1)
    use_threads()
    name_accelerator()
    console = Console(stderr=True)
    with RunDirectory(grid.folder).claim():
        sharing = share(grid, may_cache=not asked.slurm)
        _say_what(grid, sharing, console)
        status = {point.label: "finished" if point.label in sharing.finished else "waiting" for point in grid.points}
        _write(grid, report(grid, status, {}, {}, [], baseline), asked)
        if asked.slurm and len(sharing.finished) < len(grid.points):
            _submit(grid, sharing, asked)
            return
        faults = _train(grid, sharing, asked.jobs, console)
        status |= {point.label: "failed" if point.label in faults else "finished" for point in grid.points}
        scores, frozen = _score(grid, [label for label, one in status.items() if one == "finished"], console)
        found = report(grid, status, faults, scores, frozen, baseline)
        _write(grid, found, asked)
        _write_for_report(grid, found, scores, frozen)
        text = markdown(found)
        write_text(grid.folder / "table.md", text)
    print(f"{text}\nResults: {grid.folder}/sweep.json, answers in {grid.folder}/predictions/")
    refuse_failed(faults, len(grid.points))


def _say_what(grid: Grid, sharing: Sharing, console: Console) -> None:
    sizes = " x ".join(f"{len(values)} {grid.short[key]}" for key, values in grid.keys.items())
    console.print(
        f"{grid.folder}: {len(grid.points)} points ({sizes}), {len(sharing.finished)} are finished\n{sharing.why}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _train(grid: Grid, sharing: Sharing, jobs: int | None, console: Console) -> dict[str, str]:
    """Write the cache, train, and return the points that failed with a sentence each."""
    if sharing.to_cache:
        cache_for(sharing.to_cache, 1)
    devices = free_devices()
    trainings = [Training(grid.recipe, point.overrides, point.loaded.recipe) for point in sharing.points]
    by_directory = {str(training.directory.path): training.label for training in trainings}
    faults = train_all(trainings, jobs or len(devices) or 1, console, devices)
    return {by_directory[path]: sentence for path, sentence in faults.items()}


def _score(grid: Grid, labels: Sequence[str], console: Console) -> tuple[dict[str, ModelScores], list[ModelScores]]:
    """Score the points that are trained, the teacher and the raw student, all by the first point's settings."""
    if not labels:
        return {}, []
    loaded = grid.points[0].loaded
    roles = loaded.recipe.models.roles
    weights = {role: roles[role].weights for role in SCORED if role in roles}
    runs = {point.label: RunDirectory(Path(point.loaded.recipe.directory)) for point in grid.points}
    weights |= {label: str(runs[label].export) for label in labels}
    settings = CompareSettings(models=weights, baseline=RAW, teacher=TEACHER if TEACHER in weights else None)
    taken = score_models(loaded, f"sweep {grid.name}", settings, grid.folder, console, on_cards=True)
    scored = {one.label: one for one in taken}
    return {label: scored[label] for label in labels}, [scored[role] for role in weights if role not in runs]


def _write(grid: Grid, found: dict[str, Any], asked: Asked) -> None:
    facts = {**machine_facts(), "command": shlex.join(["deltakd", "sweep", asked.recipe, *asked.words])}
    write_json(grid.folder / "sweep.json", facts | found)


def _words(options: str) -> list[str]:
    """Cut --sbatch as a shell would. Raises RunError for a quote that is not closed."""
    try:
        return shlex.split(options)
    except ValueError as error:
        raise RunError(f"--sbatch: {options} cannot be cut into words ({error}). Close its quotes.") from None


def _write_for_report(
    grid: Grid, found: dict[str, Any], scores: dict[str, ModelScores], frozen: Sequence[ModelScores]
) -> None:
    """Write the settings as rows of results.json, if their baseline is among them."""
    by_label = {one["label"]: one["values"] for one in found["points"]}
    groups, differences = {one.label: [one] for one in frozen}, dict[str, dict[str, Any]]()
    baseline = None
    for setting in found["settings"]:
        label = label_of(setting["values"], grid.short)
        groups[label] = [one for name, one in scores.items() if setting["values"].items() <= by_label[name].items()]
        taken = {metric: one["difference"] for metric, one in setting["metrics"].items()}
        differences[label] = {metric: one for metric, one in taken.items() if one is not None}
        is_baseline = found["baseline"].items() <= setting["values"].items()
        baseline = label if baseline is None and is_baseline else baseline
    if baseline is not None:
        write_groups(grid.folder, groups, baseline, differences, {**machine_facts(), "against": against_of(found)})


def _submit(grid: Grid, sharing: Sharing, asked: Asked) -> None:
    """Write the settings of every point, a line each, and submit those that are not finished as one array.

    Raises RunError if this machine has no sbatch, after saying what to type where there is one.
    """
    root = as_override("root", sharing.points[0].loaded.recipe.root)  # the same folder, wherever a task runs
    text = "".join(shlex.join([*point.overrides, root]) + "\n" for point in sharing.points)
    # A name of its own: tasks that still wait read their line when they begin, and a longer sweep has other lines.
    lines = grid.folder / f"points-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}.txt"
    write_text(lines, text)
    tasks = [str(number) for number, one in enumerate(sharing.points, 1) if one.label not in sharing.finished]
    command = ["sbatch", f"--array={','.join(tasks)}", *_words(asked.sbatch), JOB_SCRIPT]
    shown = f"SWEEP={shlex.quote(str(lines))} RECIPE={shlex.quote(grid.recipe)} {shlex.join(command)}"
    print(shown, flush=True)
    if shutil.which(command[0]) is None:
        raise RunError("sbatch: not found. Type the line above in the repository, where jobs are submitted from.")
    given = {"SWEEP": str(lines), "RECIPE": grid.recipe, "STAGE": "", "RUN": ""}
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().rstrip(".") or f"ended with exit code {done.returncode}"
        raise RunError(f"sbatch: {why}. Mend it and start the same command again.")
    print(f"{done.stdout.strip()}; when all have ended, the same command without --slurm scores them", flush=True)
