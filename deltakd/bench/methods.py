"""`deltakd bench methods`: every method on the same models, data and number of steps, from several seeds, in one table.

Models, teacher and data of a base come from the base recipe's own stages, made once. Then each method trains a student
per seed, and all students answer the same held-out prompts. Whatever is there already is not made again.
"""

import json
from collections.abc import Sequence
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
from deltakd.evaluate.compare import ModelScores
from deltakd.evaluate.settings import CompareSettings
from deltakd.recipe import generating, pipeline
from deltakd.recipe.evaluation import score_models
from deltakd.recipe.load import as_override
from deltakd.recipe.paths import check_paths
from deltakd.recipe.stages import stages_behind
from deltakd.recipe.trainings import WALL, Training, refuse_failed, train_all

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
    root: Path
    out: Path
    data: dict[str, Sequence[str]]  # by base: paths of training and validation rows
    overrides: Sequence[str]


def bench(asked: Asked) -> None:
    """Make what the methods share, train and score all, write JSON and Markdown. Raises RunError if a run fails."""
    _refuse(asked)
    use_threads()
    console = Console(stderr=True)
    bases = [Base(name, _rows(asked, name), asked.overrides, asked.root / Path(name).stem) for name in asked.bases]
    for base in bases:
        if TEACHER not in base.load().recipe.models.roles:
            raise RunError(f"--bases: {base.name} has no models.teacher, from which every KL is taken. Write another.")
    runs = {
        base.name: plan(base, asked.methods, asked.seeds, steps, asked.engine)
        for base, steps in zip(bases, _steps(asked), strict=True)
    }
    for base in bases:
        _prepare(base, runs[base.name])
    trainings = [Training(base.name, run.overrides, run.recipe, True) for base in bases for run in runs[base.name]]
    refuse_failed(train_all(trainings, asked.jobs, console), len(trainings))
    report: dict[str, Any] = {**machine_facts(), "settings": _settings(asked), "bases": {}}
    text = f"# Methods\n\n{report['started'][:10]}, code at {report['commit']}, {report['machine']}.\n"
    for base in bases:
        figures, table = _score(base, runs[base.name], console)
        report["bases"][base.name] = figures
        # Runs that were there already may be of other code than what makes this table.
        trained = f"{figures['steps']:,} steps, {figures['num_prompts']} held-out prompts; trained by code at "
        text += f"\n## {base.name}\n\n{trained}{', '.join(figures['commits'])}.\n\n{table}"
    write_json(asked.out, report)
    write_text(asked.out.with_suffix(".md"), text)
    print(f"{text}\n{asked.out}: written, and {asked.out.with_suffix('.md')}")


def _refuse(asked: Asked) -> None:
    if asked.out.suffix != ".json":
        raise RunError(
            f"--out: {asked.out} does not end in .json, beside which .md is written. Write {asked.out}.json."
        )
    if BASELINE not in asked.methods:
        raise RunError(f"--methods: {BASELINE} is missing, which all others are held against. Add it.")
    for name, given in (("bases", asked.bases), ("methods", asked.methods), ("seeds", asked.seeds)):
        if len(set(given)) < len(given):
            raise RunError(f"--{name}: {','.join(map(str, given))} has one of them twice. Write each once.")
    if len(asked.steps) > 1 and len(asked.steps) != len(asked.bases):
        raise RunError(
            f"--steps: {len(asked.steps)} numbers for {len(asked.bases)} bases. Write one number, or one for each."
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
    option = f"--{name.removeprefix('small_')}-data"
    paths = [Path(text) for text in asked.data[name]]
    if len(paths) == 1:  # the other lies beside it, under the name that the recipe has for it
        recipe = Base(name, [], [], asked.root).load().recipe
        assert recipe.data.validation is not None
        paths.append(paths[0].with_name(Path(recipe.data.validation.path).name))
    if len(paths) != 2:
        given = ",".join(asked.data[name]) or "missing"
        raise RunError(f"{option}: {given}, but {name} needs rows. Write {option} TRAIN,VALIDATION.")
    for path in paths:
        if not path.exists():
            raise RunError(f"{option}: {path} does not exist. Write {option} TRAIN,VALIDATION.")
    parts = zip(("train", "validation"), paths, strict=True)
    return [as_override(f"data.{part}.path", str(path)) for part, path in parts]


def _prepare(base: Base, runs: Sequence[Run]) -> None:
    """Make the models and rows that all methods of a base share, and the responses that some learn from."""
    for stage in stages_behind(base.name, base.overrides, [run.recipe for run in runs]):
        pipeline.run(base.name, base.overrides, None, stage)
    for method in {run.method.name: run.method for run in runs}.values():
        if method.generate is not None:
            generating.run(base.name, method.generate, method.responses, None, 1, None)
    for run in runs:
        check_paths(run.recipe, lambda key, run=run: f"{run.label}: {key}", base.name)  # type: ignore[misc]


def _score(base: Base, runs: Sequence[Run], console: Console) -> tuple[dict[str, Any], str]:
    """Score a base's runs, its teacher and its raw student; return the figures and the table."""
    loaded = base.load()
    recipe = loaded.recipe
    roles = {TEACHER: recipe.models.roles[TEACHER].weights, RAW: recipe.models.student.weights}
    weights = roles | {run.label: str(_directory_of(run).export) for run in runs}
    settings = CompareSettings(models=weights, baseline=RAW, teacher=TEACHER)
    scored = score_models(loaded, SCORES, settings, base.root / SCORES, console)
    scores = {one.label: one for one in scored}
    methods: dict[str, list[Measured]] = {}
    for run in runs:
        methods.setdefault(run.method.name, []).append(_measured(run, scores[run.label]))
    summary = summarise(methods, BASELINE, recipe.evaluation.num_resamples, recipe.evaluation.seed)
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
