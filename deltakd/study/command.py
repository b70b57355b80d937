"""The verbs `sweep`, `target` and `study`: their options, and what they are started with. Imports no torch."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltakd.base.errors import RunError

VERBS = ("sweep", "target", "study")


def add_study(verb: Callable[[str, str], argparse.ArgumentParser], plain: Callable[[str, str], Any]) -> None:
    """Add the verbs to the command line; `plain` makes one that asks for no recipe."""
    sweep = verb("sweep", "train and score the grid of all settings that are given several values: seed=1,2,3")
    sweep.add_argument("--name", metavar="NAME", help="its folder under ROOT/sweeps; default: the keys that vary")
    sweep.add_argument("--jobs", type=int, metavar="N", help="trainings at a time; default: one per GPU, 1 on a CPU")
    sweep.add_argument(
        "--baseline",
        metavar="alpha=0",
        help="what others are held against, all else alike; default: the first setting of all",
    )
    sweep.add_argument("--slurm", action="store_true", help="submit what is missing as one array of slurm/'s jobs")
    sweep.add_argument("--sbatch", default="", metavar="OPTIONS", help="with --slurm: more of sbatch, in one word")
    target = verb("target", "say how good the delta target is on held-out rows, for a grid of alpha")
    target.add_argument("--alphas", default="0,0.25,0.5,0.75,1", help="default 0,0.25,0.5,0.75,1")
    target.add_argument("--temperatures", default="1", help="default 1")
    target.add_argument("--rows", type=int, default=500, metavar="N", help="the first of data.validation; default 500")
    study = plain("study", "answer the questions of a file of recipes/studies: sweeps and methods, in one report")
    study.add_argument("study", metavar="STUDY", help="a name from recipes/studies/, or a path")
    study.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of all worlds")
    study.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="RECIPE=TRAIN,VALIDATION",
        help="where a recipe's rows lie; VALIDATION may be left out where it lies beside TRAIN as the recipe names it",
    )
    study.add_argument("--only", metavar="NAME,NAME", help="some of its questions; default: all")
    study.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time; default 1")
    study.add_argument("--root", type=Path, metavar="FOLDER", help="where everything lies; default runs/STUDY")


def run_study(options: argparse.Namespace) -> None:
    """Start the verb that the options name."""
    if options.verb == "sweep":
        from deltakd.study import sweep

        words, name, jobs = options.overrides, options.name, options.jobs
        sweep.sweep(sweep.Asked(options.recipe, words, name, jobs, options.baseline, options.slurm, options.sbatch))
        return
    if options.verb == "study":
        from deltakd.study import study

        only = options.only.split(",") if options.only else []
        root = options.root or Path("runs") / Path(options.study).stem
        study.study(study.Asked(options.study, options.rows, only, options.jobs, root, options.overrides))
        return
    from deltakd.study.target import target

    alphas, temperatures = (read_numbers(f"--{name}", getattr(options, name)) for name in ("alphas", "temperatures"))
    target(options.recipe, options.overrides, alphas, temperatures, options.rows)


def read_numbers(option: str, text: str) -> list[float]:
    """Read numbers by commas. Raises RunError for what is none, or is there twice."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise RunError(f"{option}: {text} are no numbers. Write them by commas: 0,0.5,1.") from None
    if len(set(numbers)) < len(numbers) or not all(abs(number) < float("inf") for number in numbers):
        raise RunError(f"{option}: {text} has one of them twice, or one that is not finite. Write each once.")
    return numbers
