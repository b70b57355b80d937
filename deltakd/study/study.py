"""`deltakd study`: several questions, each a sweep or a comparison of methods in some worlds, and one report of all.

    ROOT/WORLD/                  what the world's own stages made, once for all questions asked there
    ROOT/WORLD/sweeps/QUESTION/  a sweep (sweep.py); methods lie in ROOT/WORLD/QUESTION/ (bench methods)
    ROOT/study.md, report.html   every question with its tables; the page of `deltakd report` about all of it

The same command goes on after any kill and repeats nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deltakd.base.errors import DeltaKDError, RunError, Stopped
from deltakd.base.files import write_text
from deltakd.base.machine import machine_facts
from deltakd.base.processes import use_threads
from deltakd.base.rundir import RunDirectory
from deltakd.bench.method_plan import Base
from deltakd.bench.methods import Comparison, compare_methods, refuse_comparison
from deltakd.recipe import pipeline
from deltakd.recipe.rows_given import row_overrides
from deltakd.recipe.stages import stages_behind
from deltakd.report.build import gather, page
from deltakd.study import sweep
from deltakd.study.grid import read_grid
from deltakd.study.questions import Asking, Study, askings, read_study
from deltakd.study.results import find_baseline

REPORT, TABLES, TABLE, HEADING = "report.html", "study.md", "table.md", "heading.md"
Faults = dict[tuple[str, str], str]  # by question and world


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    study: str
    rows: Sequence[str]  # RECIPE=TRAIN,VALIDATION
    only: Sequence[str]
    jobs: int
    root: Path
    overrides: Sequence[str]


def study(asked: Asked) -> None:
    """Answer what is not answered yet, write tables and the page.

    Raises RecipeError or RunError for what cannot be asked, before anything runs, and RunError for trainings that
    failed, after all other questions.
    """
    if asked.jobs < 1:
        raise RunError(f"--jobs: {asked.jobs} trainings at a time are none. Write 1 or more.")
    found = read_study(asked.study)
    rows = _rows(asked, found)
    chosen = askings(found, asked.only, asked.overrides)
    bases = {one.world: _base(asked, one, rows) for one in chosen}
    for one in chosen:
        try:
            _refuse(one, bases[one.world])
        except DeltaKDError as error:
            raise RunError(f"{one.name} in {one.world}: {error}") from error
    use_threads()
    console = Console(stderr=True)
    faults: Faults = {}
    with RunDirectory(asked.root).claim():
        for number, one in enumerate(chosen, 1):
            console.rule(f"{number}/{len(chosen)} {one.name} in {one.world}: {one.question.ask}")
            try:
                _answer(one, bases[one.world], asked.jobs, console)
            except Stopped:
                raise
            except DeltaKDError as error:
                console.print(f"{one.name} in {one.world}: {error}", soft_wrap=True, markup=False)
                faults[one.name, one.world] = str(error)
        text = _tables(found, askings(found, ()), asked, faults)
        write_text(asked.root / TABLES, text)
        written = [asked.root / TABLES, *_write_page(asked.root, found.title, console)]
    print(f"{text}\n{' and '.join(map(str, written))}: written")
    for (name, world), fault in faults.items():
        raise RunError(f"{len(faults)} of {len(chosen)} questions are not answered. {name} in {world}: {fault}")


def _write_page(root: Path, title: str, console: Console) -> list[Path]:
    """Write the page, if there is a run to write of."""
    try:
        text = page(gather([str(root)]), title)
    except RunError as error:  # the first question failed before anything was trained
        console.print(f"no page: {error}", soft_wrap=True, markup=False)
        return []
    write_text(root / REPORT, text, lasting=False)
    return [root / REPORT]


def _rows(asked: Asked, found: Study) -> Mapping[str, Sequence[str]]:
    """Return by recipe the overrides that say where its rows lie."""
    recipes = {world.recipe for world in found.worlds.values()}
    rows = {}
    for word in asked.rows:
        recipe, equals, given = word.partition("=")
        if not equals or recipe not in recipes:
            raise RunError(f"--rows: {word}. Write RECIPE=TRAIN,VALIDATION with one of {', '.join(sorted(recipes))}.")
        rows[recipe] = row_overrides(f"--rows {recipe}=", recipe, given)
    return rows


def _base(asked: Asked, one: Asking, rows: Mapping[str, Sequence[str]]) -> Base:
    own: dict[str, str] = {}
    for word in (*one.set, *one.typed):  # a world's win over the study's, those that are typed over both
        key = word.partition("=")[0]
        own.pop(key, None)
        own[key] = word
    return Base(one.recipe, rows.get(one.recipe, []), list(own.values()), asked.root / one.world)


def _words(one: Asking, base: Base) -> list[str]:
    """Return what the sweep is asked: the question's settings win over its world's, and typed ones over both."""
    typed = {word.partition("=")[0] for word in one.typed}
    asked = [word for word in one.question.sweep if word.partition("=")[0] not in typed]
    keys = {word.partition("=")[0] for word in asked}
    return [*(word for word in base.overrides if word.partition("=")[0] not in keys), *asked]


def _refuse(one: Asking, base: Base) -> None:
    """Find what is wrong with a question before the first runs. Raises RecipeError or RunError."""
    if one.question.sweep:
        grid = read_grid(base.name, _words(one, base), one.name)
        find_baseline(grid, one.question.baseline)
    else:
        if one.name in (stages := [stage.name for stage in base.load().recipe.pipeline]):
            raise RunError(f"a stage of {base.name} has this name and folder. Write none of {', '.join(stages)}.")
        refuse_comparison(_comparison(one, base))


def _comparison(one: Asking, base: Base) -> Comparison:
    question, engine = one.question, base.load().recipe.engine.name
    rates, within = question.learning_rates, f"{one.name}/"
    steps = None if any(word.startswith("train.steps=") for word in one.typed) else question.steps
    return Comparison(base, question.methods, question.seeds, steps, engine, rates, within)


def _answer(one: Asking, base: Base, jobs: int, console: Console) -> None:
    question = one.question
    # It stands over the table for as long as that stands: what is typed with a later command may be for others only.
    write_text(_folder(one, base.root) / HEADING, _heading(one, base.own))
    if question.methods:
        ((_, table),) = compare_methods([_comparison(one, base)], jobs, console)
        write_text(_folder(one, base.root) / TABLE, table)
        return
    grid = read_grid(base.name, _words(one, base), one.name)
    for stage in stages_behind(base.name, base.overrides, [point.loaded.recipe for point in grid.points]):
        pipeline.run(base.name, base.overrides, None, stage)
    sweep.sweep(sweep.Asked(base.name, _words(one, base), one.name, jobs, question.baseline, False, ""))


def _tables(found: Study, every: Sequence[Asking], asked: Asked, faults: Faults) -> str:
    """Return every question with its tables; what is not answered yet, or could not be answered now, says so."""
    facts = machine_facts()
    lines = [f"# {found.title}", f"{facts['started'][:10]}, code at {facts['commit']}, {facts['machine']}."]
    asked_before = ""
    for one in every:
        if one.name != asked_before:
            lines.append(f"## {one.question.ask}")
        asked_before = one.name
        folder = _folder(one, asked.root / one.world)
        table, heading = folder / TABLE, folder / HEADING
        lines.append(heading.read_text() if heading.exists() else _heading(one, one.set))
        if fault := faults.get((one.name, one.world)):
            lines.append(f"Not answered: {fault}" + (" What there is of it:" if table.exists() else ""))
        lines.append(_without_title(table.read_text()) if table.exists() else "Not measured yet.")
    return "\n\n".join(lines) + "\n"


def _folder(one: Asking, root: Path) -> Path:
    return root / (one.name if one.question.methods else f"sweeps/{one.name}")


def _heading(one: Asking, settings: Sequence[str]) -> str:
    return f"### {one.world}: {' '.join([one.recipe, *settings])}"


def _without_title(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("# ")).strip()
