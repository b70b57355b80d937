"""`deltakd bench methods`: every method on the same models, data and number of steps, from several seeds, in one table.

Models, teacher and data of a base come from the base recipe's own stages, made once. Then each method trains a student
per seed, and all students answer the same held-out prompts. Whatever is there already is not made again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deltakd.base.errors import RunError
from deltakd.base.files import write_json, write_text
from deltakd.base.machine import machine_facts
from deltakd.base.processes import use_threads
from deltakd.base.rundir import ROLLOUTS, RunDirectory
from deltakd.bench.method_plan import SET_HERE, Base, Run, plan
from deltakd.bench.method_table import Measured, markdown, summarise
from deltakd.bench.rates import RATES, SEED, choose, describe, rate_runs
from deltakd.evaluate.compare import ModelScores
from deltakd.evaluate.grouped import write_groups
from deltakd.evaluate.settings import CompareSettings
from deltakd.recipe import generating, pipeline
from deltakd.recipe.evaluation import score_models
from deltakd.recipe.paths import check_paths
from deltakd.recipe.rows_given import row_overrides
from deltakd.recipe.stages import stages_behind
from deltakd.recipe.trainings import WALL, Training, free_devices, refuse_failed, train_all

BASELINE, TEACHER, RAW = "sft", "teacher", "student_raw"
SCORES = "methods"  # folder under a base's root: answers and scores of every run


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    bases: Sequence[str]
    methods: Sequence[str]
    seeds: Sequence[int]
    steps: Sequence[int]  # of each base, or one number for all; none: the base's own
    jobs: int
    engine: str
    rates: Sequence[float]  # of which each method chooses; none: the base's
    root: Path
    out: Path
    data: dict[str, str]  # by base: paths of training and validation rows, by a comma
    overrides: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """Methods on one base, and, if they choose, the learning rates that each of them tries."""

    base: Base
    methods: Sequence[str]
    seeds: Sequence[int]
    steps: int | None
    engine: str
    rates: Sequence[float] = ()
    within: str = ""  # a folder under the base's root, with a slash, in which all of this lies

    @property
    def tried(self) -> Path:
        """Where its learning rates are tried."""
        return self.base.root / self.within / RATES


def bench(asked: Asked) -> None:
    """Make what the methods share, train and score all, write JSON and Markdown. Raises RunError if a run fails."""
    _refuse(asked)
    bases = [Base(name, _rows(asked, name), asked.overrides, asked.root / Path(name).stem) for name in asked.bases]
    comparisons = [
        Comparison(base, asked.methods, asked.seeds, steps, asked.engine, asked.rates)
        for base, steps in zip(bases, _steps(asked), strict=True)
    ]
    found = compare_methods(comparisons, asked.jobs, Console(stderr=True))
    report: dict[str, Any] = {**machine_facts(), "settings": _settings(asked), "bases": {}}
    text = f"# Methods\n\n{report['started'][:10]}, code at {report['commit']}, {report['machine']}.\n"
    for base, (figures, table) in zip(bases, found, strict=True):
        report["bases"][base.name] = figures
        text += f"\n## {base.name}\n\n{table}"
    write_json(asked.out, report)
    write_text(asked.out.with_suffix(".md"), text)
    print(f"{text}\n{asked.out}: written, and {asked.out.with_suffix('.md')}")


def compare_methods(comparisons: Sequence[Comparison], jobs: int, console: Console) -> list[tuple[dict[str, Any], str]]:
    """Train and score what is missing; return each comparison's figures and its table with the words around it."""
    use_threads()
    for one in comparisons:
        refuse_comparison(one)
    tried = [rate_runs(one.base, one.methods, one.rates, one.steps, one.engine, one.within) for one in comparisons]
    for one, runs in zip(comparisons, tried, strict=True):
        _prepare(one.base, [*_plan(one, {}), *runs])
    rates = [
        choose(one.base, runs, one.tried, jobs, console) if runs else {}
        for one, runs in zip(comparisons, tried, strict=True)
    ]
    planned = [_plan(one, own) for one, own in zip(comparisons, rates, strict=True)]
    trainings = [Training(run.base.name, run.overrides, run.recipe, True) for runs in planned for run in runs]
    refuse_failed(train_all(trainings, jobs, console, free_devices()), len(trainings))
    found = []
    for one, runs, own in zip(comparisons, planned, rates, strict=True):
        figures, table = _score(one, runs, console)
        # Runs that were there already may be of other code than what makes this table.
        about = f"{figures['steps']:,} steps, {figures['num_prompts']} held-out prompts; trained by code at "
        about += f"{', '.join(figures['commits'])}." + (f" {describe(one.tried, own)}" if own else "")
        found.append(({**figures, "learning_rates": own}, f"{about}\n\n{table}"))
    return found


def refuse_comparison(one: Comparison) -> None:
    """Find what is wrong with a comparison before anything is made. Raises RunError or RecipeError."""
    if TEACHER not in one.base.load().recipe.models.roles:
        raise RunError(f"{one.base.name} has no models.teacher, from which every KL is taken. Write another base.")
    if BASELINE not in one.methods:
        raise RunError(f"methods: {BASELINE} is missing, which all others are held against. Add it.")
    for name, given in (("methods", one.methods), ("seeds", one.seeds), ("learning rates", one.rates)):
        if len(set(given)) < len(given):
            raise RunError(f"{name}: {', '.join(map(str, given))} has one of them twice. Write each once.")
    if not one.seeds or (SEED in one.seeds and one.rates):
        raise RunError(
            f"seeds: {', '.join(map(str, one.seeds)) or 'none'}. Write some, and with learning rates others than "
            f"{SEED}, from which rates are chosen."
        )
    _plan(one, {})
    rate_runs(one.base, one.methods, one.rates, one.steps, one.engine, one.within)


def _plan(one: Comparison, rates: Mapping[str, float]) -> list[Run]:
    return plan(one.base, one.methods, one.seeds, one.steps, one.engine, rates, one.within)


def _refuse(asked: Asked) -> None:
    if asked.out.suffix != ".json":
        raise RunError(
            f"--out: {asked.out} does not end in .json, beside which .md is written. Write {asked.out}.json."
        )
    if BASELINE not in asked.methods:
        raise RunError(f"--methods: {BASELINE} is missing, which all others are held against. Add it.")
    for name, given in (
        ("bases", asked.bases),
        ("methods", asked.methods),
        ("seeds", asked.seeds),
        ("learning-rates", asked.rates),
    ):
        if len(set(given)) < len(given):
            raise RunError(f"--{name}: {','.join(map(str, given))} has one of them twice. Write each once.")
    if len(asked.steps) > 1 and len(asked.steps) != len(asked.bases):
        raise RunError(
            f"--steps: {len(asked.steps)} numbers for {len(asked.bases)} bases. Write one number, or one for each."
        )
    if any(not 0 < rate <= 1000 for rate in asked.rates) or (SEED in asked.seeds and asked.rates):
        raise RunError(
            f"--learning-rates: {','.join(map(str, asked.rates))} with seeds {','.join(map(str, asked.seeds))}. Write "
            f"rates above 0, and seeds other than {SEED}, from which rates are chosen."
        )
    if asked.jobs < 1:
        raise RunError(f"--jobs: {asked.jobs} trainings at a time are none. Write 1 or more.")
    for override in asked.overrides:
        if (key := override.partition("=")[0]) in SET_HERE:
            raise RunError(f"{override}: bench methods sets {key} itself. Leave it out; there are --root and --seeds.")


def _steps(asked: Asked) -> list[int | None]:
    given: list[int | None] = [*asked.steps] or [None]
    return given if len(given) > 1 else given * len(asked.bases)


def _rows(asked: Asked, name: str) -> list[str]:
    """Return the overrides that say where a base's rows lie. Raises RunError if they are not there."""
    if name not in asked.data:
        return []
    return row_overrides(f"--{name.removeprefix('small_')}-data", name, asked.data[name])


def _prepare(base: Base, runs: Sequence[Run]) -> None:
    """Make the models and rows that all methods of a base share, and the responses that some learn from."""
    for stage in stages_behind(base.name, base.overrides, [run.recipe for run in runs]):
        pipeline.run(base.name, base.overrides, None, stage)
    for method in {run.method.name: run.method for run in runs}.values():
        if method.generate is not None:
            generating.run(base.name, method.generate, method.responses, None, 1, None)
    for run in runs:
        check_paths(run.recipe, lambda key, run=run: f"{run.label}: {key}", base.name)  # type: ignore[misc]


def _score(one: Comparison, runs: Sequence[Run], console: Console) -> tuple[dict[str, Any], str]:
    """Score a base's runs, its teacher and its raw student; return the figures and the table."""
    base = one.base
    loaded = base.load()
    recipe = loaded.recipe
    roles = {TEACHER: recipe.models.roles[TEACHER].weights, RAW: recipe.models.student.weights}
    weights = roles | {run.label: str(_directory_of(run).export) for run in runs}
    settings = CompareSettings(models=weights, baseline=RAW, teacher=TEACHER)
    scored = score_models(loaded, SCORES, settings, base.root / one.within / SCORES, console, on_cards=True)
    scores = {one.label: one for one in scored}
    methods: dict[str, list[Measured]] = {}
    for run in runs:
        methods.setdefault(run.method.name, []).append(_measured(run, scores[run.label]))
    summary = summarise(methods, BASELINE, recipe.evaluation.num_resamples, recipe.evaluation.seed)
    groups = {label: [scores[label]] for label in roles}
    groups |= {name: [each.scores for each in measured] for name, measured in methods.items()}
    differences = {name: figures["difference"] for name, figures in summary.items()}
    write_groups(base.root / one.within / SCORES, groups, BASELINE, differences, machine_facts())
    frozen, adds = [scores[label] for label in roles], {run.method.name: run.method.blocks for run in runs}
    figures = {
        "steps": runs[0].recipe.train.steps,
        "overrides": base.overrides,
        "commits": sorted({one.commit for measured in methods.values() for one in measured}),
        "num_prompts": len(scored[0].rows["rougeL"]),
        "frozen": {one.label: {metric: one.mean(metric) for metric in one.rows} for one in frozen},
        "methods": {name: {"adds": adds[name], **one} for name, one in summary.items()},
    }
    return figures, markdown(summary, frozen, BASELINE)


def _directory_of(run: Run) -> RunDirectory:
    return RunDirectory(Path(run.recipe.directory))


def _measured(run: Run, scores: ModelScores) -> Measured:
    directory = _directory_of(run)
    step_s = sum(step["step_s"] for step in directory.read_lines("steps.jsonl"))
    writing_s = sum(writing["s"] for writing in directory.read_lines(ROLLOUTS))
    wall, began = directory.path / WALL, json.loads((directory.path / "run.json").read_text())
    wall_s = float(json.loads(wall.read_text())["wall_s"]) if wall.exists() else None
    return Measured(run.seed, scores, step_s, writing_s, wall_s, began["commit"])


def _settings(asked: Asked) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(asked).items()}
