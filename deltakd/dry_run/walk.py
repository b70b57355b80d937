"""`deltakd run NAME --dry-run`: the recipe's own training with tiny models, from the first process to the report.

Every step is a command that a user could type, in a process of its own: two steps, the third from a checkpoint, the
evaluation of what came out, and the page about it. All of it lies in ROOT/dry_run and is made anew each time.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deltakd.base.errors import RunError
from deltakd.base.files import remove, write_text
from deltakd.base.rundir import RunDirectory
from deltakd.dry_run.tiny import num_ranks, overrides, write_inputs
from deltakd.plan.facts import Run, read_run
from deltakd.plan.plan import refuse_unsplittable
from deltakd.recipe.checks import check_every_stage, check_recipe
from deltakd.recipe.load import dump_recipe, load
from deltakd.recipe.pipeline import ended_as_interrupted, launch_environment, name_accelerator
from deltakd.recipe.schema import Recipe

FOLDER, TINY, RUN = "dry_run", "recipe.yaml", "train"
STEPS, BEFORE = 3, 2  # of the training, and when it is left to be resumed
LONGEST_S = 600.0  # of one command: what hangs is said to hang
LEAVE_S = 60.0  # within which a walk that was killed has left


@dataclass(frozen=True)
class Act:
    """One command of the walk, and what must have come of it."""

    name: str
    words: Sequence[str]
    shows: str


def dry_run(name: str, typed: Sequence[str], stage: str | None, num_processes: int | None) -> None:
    """Walk through the recipe, or the training of one of its stages. Raises RunError where something fails."""
    check_every_stage(name, typed)
    loaded = load(name, typed, stage)
    check_recipe(loaded.recipe, loaded.where)
    run = read_run(name, typed, loaded.recipe, loaded.where, 0.6, None)
    refuse_unsplittable(run, loaded.where("teachers.tensor_parallel"))  # the tiny ones would split
    folder = Path(loaded.recipe.root) / FOLDER
    console, began = Console(stderr=True), time.monotonic()
    name_accelerator()
    with RunDirectory(folder.with_name(f".{FOLDER}")).claim(), ended_as_interrupted():
        with RunDirectory(folder / RUN).claim(
            LEAVE_S
        ):  # processes of a walk that was killed may still keep their state
            remove(folder)
        with console.status("tiny models and rows"):
            write_inputs(run, folder)
        console.print(_said(run))
        write_text(folder / TINY, dump_recipe(read_tiny(run, folder)), lasting=False)
        for act in _acts(str(folder / TINY), run, folder, num_processes):
            _play(act, folder, console)
    print(f"{name}: dry run passed in {time.monotonic() - began:.0f} s; its page is {folder}/report.html")


def _said(run: Run) -> str:
    roles = [("student", run.student), *((role, one.shape) for role, one in run.frozen.items())]
    return "; ".join(f"{role}: {shape.kind}, {shape.head_rows:,} rows of its head" for role, shape in roles)


def read_tiny(run: Run, folder: Path) -> Recipe:
    """Return the recipe made small, of which a copy lies in `folder`. Raises RecipeError if it no longer fits."""
    whole = folder / "whole.yaml"
    write_text(whole, dump_recipe(run.recipe), lasting=False)
    tiny = load(str(whole), overrides(run, folder, STEPS))
    check_recipe(tiny.recipe, tiny.where)
    return tiny.recipe


def _acts(recipe: str, run: Run, folder: Path, num_processes: int | None) -> list[Act]:
    ranks = num_processes or num_ranks(run)
    train = ["train", recipe, *(["--processes", str(ranks)] if ranks else [])]
    acts = [
        Act("first", [*train, f"train.steps={BEFORE}"], f"{BEFORE} steps"),
        Act("resumed", [*train, "--resume"], f"step {STEPS}, from a checkpoint"),
    ]
    if run.recipe.references.source == "cache":
        students = ["--students", str(num_processes)] if num_processes else []
        acts.insert(0, Act("cache", ["cache", recipe, *students], "what the frozen models say"))
    if run.recipe.data.format != "text":  # of which no prompt can be taken
        acts.append(Act("evaluation", ["evaluate", recipe, "--model", "train"], "answers and scores"))
    page = str(folder / "report.html")
    return [*acts, Act("report", ["report", str(folder), "-o", page], "the page about it")]


def _play(act: Act, folder: Path, console: Console) -> None:
    log, began = folder / f"{act.name}.log", time.monotonic()
    command = [sys.executable, "-m", "deltakd", *act.words]
    with log.open("wb") as output, console.status(f"{act.name}: {act.shows}"):
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=launch_environment()
        )
        try:
            code = process.wait(LONGEST_S)
        except subprocess.TimeoutExpired:
            _end(process)
            raise RunError(f"dry run, {act.name}: no end after {LONGEST_S:.0f} s. Look at {log}.") from None
        except BaseException:
            _end(process)
            raise
    if code:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("deltakd: ")]
        why = said[-1].removeprefix("deltakd: ") if said else f"ended with exit code {code}."
        raise RunError(f"dry run, {act.name}: {why} Its log is {log}.")
    console.print(f"{act.name}: {act.shows}, {time.monotonic() - began:.0f} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have a command leave, or kill what does not: its own processes notice that."""
    process.terminate()
    try:
        process.wait(LEAVE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
