"""What a report cannot show: runs that are not finished or evaluated, missing metrics, torn records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from deltakd.report.evaluations import Evaluation, Table, title
from deltakd.report.run import Run


@dataclass(frozen=True)
class Gap:
    """One thing that was not measured."""

    about: str
    what: str


def gaps(runs: Sequence[Run], evaluations: Sequence[Evaluation], tables: Sequence[Table]) -> list[Gap]:
    """List what was not measured, runs first."""
    found = []
    scored = set(scored_runs(runs, evaluations).values())
    for run in runs:
        if not run.is_finished:
            planned = f" of {run.planned:,}" if run.planned else ""
            far = f"it stands at step {run.steps:,}{planned}" if run.steps else f"no step{planned} yet"
            found.append(Gap(run.name, f"not finished ({run.state}): {far}"))
        elif run.planned and run.steps < run.planned:
            found.append(Gap(run.name, f"ended at step {run.steps:,} of {run.planned:,}"))
        if run.name not in scored:
            found.append(Gap(run.name, "no evaluation among these has scored its model"))
        found += [Gap(run.name, note) for note in run.notes]
    for evaluation in evaluations:
        found += [Gap(evaluation.name, note) for note in evaluation.notes]
        if evaluation.models and evaluation.baseline not in evaluation.models:
            found.append(Gap(evaluation.name, f"its baseline {evaluation.baseline} is not among its models"))
    for table in tables:
        for row in table.rows:
            missing = [title(metric) for metric in table.metrics if metric not in row.cells]
            if missing:
                found.append(Gap(f"{row.evaluation}: {row.label}", f"not taken: {', '.join(missing)}"))
            if all(cell.low is None for cell in row.cells.values()):
                found.append(Gap(f"{row.evaluation}: {row.label}", "no scores by row, so its means have no interval"))
    return found


def scored_runs(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> dict[tuple[str, str], str]:
    """Return the name of the run that made a model, by evaluation and label; of other models there is none.

    Weights are written as the evaluation was given them: relative to a folder that nobody knows any more. They mean a
    run that lies within the evaluation, beside it or around it, or where they say.
    """
    made: dict[tuple[str, str], str] = {}
    by_folder = {str(run.path): run for run in runs}
    for evaluation in evaluations:
        for label in evaluation.models:
            for name, weights in evaluation.members(label).items():
                run = _run_of(PurePath(weights).parts, evaluation, by_folder)
                if run is not None:
                    made.setdefault((evaluation.name, label), run.name)
                    made[evaluation.name, name] = run.name
    return made


def _run_of(weights: Sequence[str], evaluation: Evaluation, by_folder: Mapping[str, Run]) -> Run | None:
    for depth in range(len(weights) - 1, 0, -1):
        folder = evaluation.path.parent
        here = [one / weights[depth - 1] for one in (evaluation.path, folder)]  # a sweep's runs lie within it
        candidates = [*here, PurePath(*weights[:depth])]
        if folder.name == weights[depth - 1]:  # an evaluation within a run, of its own checkpoints
            candidates.append(folder)
        for candidate in candidates:
            if str(candidate) in by_folder:
                return by_folder[str(candidate)]
    return None
