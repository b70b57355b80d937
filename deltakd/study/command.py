"""The verbs `sweep` and `target`: their options, and what they are started with. Imports no torch."""

import argparse
from collections.abc import Callable

from deltakd.base.errors import RunError

VERBS = ("sweep", "target")


def add_study(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add both verbs to the command line."""
    sweep = verb("sweep", "train and score the grid of all settings that are given several values: seed=1,2,3")
    sweep.add_argument("--name", metavar="NAME", help="its folder under ROOT/sweeps; default: the keys that vary")
    sweep.add_argument("--jobs", type=int, metavar="N", help="trainings at a time; default: one per GPU, 1 on a CPU")
    sweep.add_argument(
        "--baseline", metavar="alpha=0", help="the setting that others are held against; default: the first of all"
    )
    sweep.add_argument("--slurm", action="store_true", help="submit what is missing as one array of slurm/'s jobs")
    sweep.add_argument("--sbatch", default="", metavar="OPTIONS", help="with --slurm: more of sbatch, in one word")
    target = verb("target", "say how good the delta target is on held-out rows, for a grid of alpha")
    target.add_argument("--alphas", default="0,0.25,0.5,0.75,1", help="default 0,0.25,0.5,0.75,1")
    target.add_argument("--temperatures", default="1", help="default 1")
    target.add_argument("--rows", type=int, default=500, metavar="N", help="the first of data.validation; default 500")


def run_study(options: argparse.Namespace) -> None:
    """Start the verb that the options name."""
    if options.verb == "sweep":
        from deltakd.study import sweep

        words, name, jobs = options.overrides, options.name, options.jobs
        sweep.sweep(sweep.Asked(options.recipe, words, name, jobs, options.baseline, options.slurm, options.sbatch))
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
        raise RunError(f"{option}: {text} has one of them twice, or none that is finite. Write each once.")
    return numbers
