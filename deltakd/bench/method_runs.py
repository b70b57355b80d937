"""The trainings of `bench methods`: each a process that a user could have started, several at a time, none twice.

A run that is finished is left alone, and one that was killed goes on from its last checkpoint or begins anew; so the
whole command can be killed and started again. One that fails leaves the others alone: it is told of when they are done.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deltakd.base.errors import RunError
from deltakd.base.files import write_json
from deltakd.base.rundir import RunDirectory
from deltakd.bench.method_plan import Run
from deltakd.recipe.finished import is_finished
from deltakd.recipe.pipeline import launch_environment

LOG, WALL = "log.txt", "wall.json"
POLL_S = 0.2


@dataclass
class _Life:
    """A training at work."""

    run: Run
    process: "subprocess.Popen[bytes]"
    began: float


def directory_of(run: Run) -> RunDirectory:
    """Return where a run lies."""
    return RunDirectory(Path(run.recipe.directory))


def train_all(runs: Sequence[Run], jobs: int, console: Console) -> None:
    """Train what is not finished, `jobs` at a time, in order. Raises RunError if any failed, when all are done."""
    waiting = [run for run in runs if not is_finished(directory_of(run), run.recipe)]
    num_done, steps_done = len(runs) - len(waiting), sum(run.recipe.train.steps for run in runs if run not in waiting)
    columns = (TextColumn("{task.description:<14}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
    alive: list[_Life] = []
    faults: list[str] = []
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("trainings", total=sum(run.recipe.train.steps for run in runs), text="")
        try:
            while waiting or alive:
                while waiting and len(alive) < jobs:
                    alive.append(_begin(waiting.pop(0)))
                for life in [one for one in alive if one.process.poll() is not None]:
                    alive.remove(life)
                    num_done, steps_done = num_done + 1, steps_done + life.run.recipe.train.steps
                    fault = _end(life)
                    faults += [fault] if fault else []
                    console.print(fault or f"{life.run.recipe.directory}: {num_done}/{len(runs)}", soft_wrap=True)
                under_way = sum(
                    (directory_of(one.run).last_line("steps.jsonl") or {"step": 0})["step"] for one in alive
                )
                text = f"{num_done}/{len(runs)} runs  {', '.join(one.run.label for one in alive)}"
                bar.update(task, completed=steps_done + under_way, text=text)
                time.sleep(POLL_S)
        finally:
            for life in alive:  # which keep their state and end
                life.process.terminate()
            for life in alive:
                life.process.wait()
    if faults:
        raise RunError(
            f"{len(faults)} of {len(runs)} runs failed: {faults[0]} What is finished stays when the same command is "
            "started again."
        )


def _begin(run: Run) -> _Life:
    path = directory_of(run).path
    path.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "deltakd", "train", run.base.name, *run.overrides]
    with (path / LOG).open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=launch_environment() | {"OMP_NUM_THREADS": "1"},
        )
    return _Life(run, process, time.perf_counter())


def _end(life: _Life) -> str | None:
    """Note how long a run took; return a sentence about what went wrong, or None."""
    directory, recipe = directory_of(life.run), life.run.recipe
    log = directory.path / LOG
    if life.process.returncode == 0 and is_finished(directory, recipe):
        finished = directory.finished() or {}
        if finished.get("steps") != recipe.train.steps:
            return f"{directory.path}: ended after {finished.get('steps')} of {recipe.train.steps} steps; see {log}."
        if not (directory.path / "resumed.jsonl").exists():  # else these are the seconds of its last life alone
            write_json(directory.path / WALL, {"wall_s": time.perf_counter() - life.began})
        return None
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("deltakd: ")]
    why = said[-1].removeprefix("deltakd: ").rstrip(".") if said else f"ended with exit code {life.process.returncode}"
    return f"{directory.path}: {why}; its log is {log}."
