"""Many trainings: each by the launcher that a user would type, several at a time, none twice.

A run that is finished is left alone, and one that was killed goes on from its last checkpoint or begins anew; so the
whole command can be killed and started again. Asked to stop, it has its trainings keep their checkpoints first. One
that fails leaves the others alone: it is told of when they are done.
"""

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deltakd.base.errors import RunError, Stopped
from deltakd.base.files import remove, write_json
from deltakd.base.rundir import RunDirectory
from deltakd.base.stop import StopRequest
from deltakd.recipe.finished import is_finished
from deltakd.recipe.pipeline import launch_command, launch_environment
from deltakd.recipe.schema import Recipe

LOG, WALL = "log.txt", "wall.json"
POLL_S = 0.2
LEAVE_S = 30.0  # beyond the longest grace of a training, until nobody waits for it any more


@dataclass(frozen=True)
class Training:
    """One training: a recipe by its name, and what is laid on it."""

    name: str
    overrides: Sequence[str]
    recipe: Recipe
    to_the_end: bool = False  # one that `validation.stop_after` ends early has failed

    @property
    def directory(self) -> RunDirectory:
        """Where it lies."""
        return RunDirectory(Path(self.recipe.directory))

    @property
    def label(self) -> str:
        """What it is called among the others: the last part of its run's name."""
        return self.recipe.run.rpartition("/")[2]


@dataclass
class _Life:
    """A training at work."""

    training: Training
    process: "subprocess.Popen[bytes]"
    began: float
    slot: int  # which of the places beside each other, and of the accelerators, it has


@dataclass
class _Queue:
    """What waits, what is at work, and what has gone wrong."""

    waiting: list[Training]
    num: int  # of trainings, those that were finished before included
    devices: Sequence[str]
    alive: list[_Life] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)  # by directory
    told: set[str] = field(default_factory=set)

    @property
    def num_done(self) -> int:
        return self.num - len(self.waiting) - len(self.alive)


def train_all(
    trainings: Sequence[Training], jobs: int, console: Console, devices: Sequence[str] = ()
) -> dict[str, str]:
    """Train what is not finished, `jobs` at a time, in order; return a sentence for each that failed, by its directory.

    With `devices` each of the jobs has one of them to itself (CUDA_VISIBLE_DEVICES), else one process on the CPU.
    Raises Stopped if it was asked to stop, when all trainings have kept their state and ended.
    """
    queue = _Queue([one for one in trainings if not is_finished(one.directory, one.recipe)], len(trainings), devices)
    if not queue.waiting:
        return {}
    steps_before = sum(one.recipe.train.steps for one in trainings if one not in queue.waiting)
    columns = (TextColumn("{task.description:<14}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, *times, console=console, disable=not console.is_terminal)
    grace_s = max(one.recipe.checkpoints.grace_s for one in queue.waiting) + LEAVE_S
    with StopRequest(grace_s) as stop, bar:
        task = bar.add_task("trainings", total=sum(one.recipe.train.steps for one in trainings), text="")
        done = steps_before
        try:
            while (queue.waiting or queue.alive) and stop.reason is None:
                _fill(queue, jobs, console)
                done += _take_ended(queue, console)
                _show(bar, task, queue, done)
                time.sleep(POLL_S)
        finally:
            for life in queue.alive:  # which keep their state and end
                life.process.terminate()
            for life in queue.alive:
                life.process.wait()
        if stop.reason is not None:
            raise Stopped(
                f"stopped by {stop.reason}: {queue.num_done} of {queue.num} trainings are done. Start the same command "
                "again: it goes on."
            )
    return queue.faults


def refuse_failed(faults: dict[str, str], num: int) -> None:
    """Raise RunError if some of `num` trainings failed."""
    if faults:
        raise RunError(
            f"{len(faults)} of {num} runs failed: {next(iter(faults.values()))} What is finished stays when the same "
            "command is started again."
        )


def _fill(queue: _Queue, jobs: int, console: Console) -> None:
    """Start trainings while there are places for them; what a run before still holds waits until it has left."""
    for training in list(queue.waiting):
        if len(queue.alive) >= jobs:
            return
        path = str(training.directory.path)
        if training.directory.is_live():
            if path not in queue.told:
                queue.told.add(path)
                console.print(f"{path}: a process before still holds it; waiting for its end", soft_wrap=True)
            continue
        queue.waiting.remove(training)
        if is_finished(training.directory, training.recipe):  # by the process that held it
            continue
        taken = {life.slot for life in queue.alive}
        queue.alive.append(_begin(training, next(slot for slot in range(jobs) if slot not in taken), queue.devices))


def _begin(training: Training, slot: int, devices: Sequence[str]) -> _Life:
    path = training.directory.path
    path.mkdir(parents=True, exist_ok=True)
    environment = launch_environment()
    count: int | None = 1
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        if training.recipe.engine.name == "deepspeed":  # told a number, it takes the machine's first devices
            count = None
    command = launch_command(training.recipe, training.name, training.overrides, None, count, _free_port())
    with (path / LOG).open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    return _Life(training, process, time.perf_counter(), slot)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _take_ended(queue: _Queue, console: Console) -> int:
    """Take those out that have ended, and say how; return how many steps they were to take."""
    steps = 0
    for life in [one for one in queue.alive if one.process.poll() is not None]:
        queue.alive.remove(life)
        training, path = life.training, str(life.training.directory.path)
        fault = _end(life)
        if fault is not None and training.directory.is_live():  # refused by a process that is about to leave
            queue.waiting.append(training)
            continue
        steps += training.recipe.train.steps
        if fault is not None:
            queue.faults[path] = fault
        console.print(fault or f"{path}: {queue.num_done}/{queue.num}", soft_wrap=True)
    return steps


def _show(bar: Progress, task: TaskID, queue: _Queue, done: int) -> None:
    lasts = [life.training.directory.last_line("steps.jsonl") for life in queue.alive]
    under_way = sum(last["step"] for last in lasts if last)
    text = f"{queue.num_done}/{queue.num} runs  {', '.join(life.training.label for life in queue.alive)}"
    bar.update(task, completed=done + under_way, text=text)


def _end(life: _Life) -> str | None:
    """Note how long a run took; return a sentence about what went wrong, or None."""
    directory, recipe = life.training.directory, life.training.recipe
    log = directory.path / LOG
    if life.process.returncode == 0 and is_finished(directory, recipe):
        steps = (directory.finished() or {}).get("steps")
        if life.training.to_the_end and steps != recipe.train.steps:
            return f"{directory.path}: ended after {steps} of {recipe.train.steps} steps; see {log}."
        keep_wall(directory, time.perf_counter() - life.began)
        return None
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("deltakd: ")]
    why = said[-1].removeprefix("deltakd: ").rstrip(".") if said else f"ended with exit code {life.process.returncode}"
    return f"{directory.path}: {why}; its log is {log}."


def keep_wall(directory: RunDirectory, wall_s: float) -> None:
    """Keep how long a whole training took, if it did so in one life."""
    if (directory.path / "resumed.jsonl").exists():  # these are the seconds of its last life alone
        remove(directory.path / WALL)  # and those of a shorter training
    else:
        write_json(directory.path / WALL, {"wall_s": wall_s})


def free_devices() -> list[str]:
    """Name the accelerators that trainings can have to themselves; none on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(index) for index in range(torch.cuda.device_count())]
