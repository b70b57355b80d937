"""A learning rate for each method, chosen on held-out rows that no table is made from.

Every method trains with every rate from one seed, which no table has; the rate with the least cross-entropy on the rows
behind those of the evaluation is its own; one whose training diverges is passed over. Rates at the ends of the list are
said to be there: the best may lie beyond.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from math import isfinite
from pathlib import Path

from rich.console import Console

from deltakd.base.errors import RunError
from deltakd.base.files import write_json
from deltakd.base.rundir import RunDirectory
from deltakd.bench.method_plan import RATE, Base, Run, plan_of, read_method, with_rate
from deltakd.data.sources import load_rows
from deltakd.evaluate.compare import CROSS_ENTROPY
from deltakd.evaluate.settings import CompareSettings
from deltakd.recipe.evaluation import score_models
from deltakd.recipe.load import load
from deltakd.recipe.trainings import Training, free_devices, refuse_failed, train_all
from deltakd.train.checkpoints import FAULTY

SEED = 0
Found = dict[str, dict[float, float | None]]  # method -> rate -> cross-entropy; None: it diverged
RATES, CHOSEN = "rates", "rates.json"


def rate_runs(
    base: Base, methods: Sequence[str], rates: Sequence[float], steps: int | None, engine: str, within: str
) -> list[Run]:
    """Return the trainings of every method with every rate; none without rates. Raises RunError where one is set."""
    if not rates:
        return []
    steps = base.load().recipe.train.steps if steps is None else steps
    runs = []
    for method, rate in product([read_method(base, name) for name in methods], rates):
        run = f"{within}{RATES}/{method.name}_{rate:g}"
        runs.append(plan_of(base, with_rate(method, rate), SEED, steps, engine, run))
        if runs[-1].recipe.train.learning_rate != rate:  # the user's settings win over a method's
            raise RunError(
                f"{RATE}: {' '.join(base.own)} sets it for all, and each method shall choose. Leave one out."
            )
    folders = [run.recipe.directory for run in runs]
    if len(set(folders)) < len(folders):
        raise RunError(f"learning rates: {', '.join(map(str, rates))} are too near to each other to tell apart.")
    return runs


def choose(base: Base, runs: Sequence[Run], folder: Path, jobs: int, console: Console) -> dict[str, float]:
    """Train, score on the rows for choosing, keep rates.json in `folder`; return the best rate of each method.

    A rate whose loss is not finite is none to choose. Raises RunError for other trainings that failed, or all of one's.
    """
    trainings = [Training(base.name, run.overrides, run.recipe, True) for run in runs]
    behind = rows_behind(base)
    whole = survivors(runs, train_all(trainings, jobs, console, free_devices()))
    # One token is no answer, but answers are not what is chosen by: only the references' cross-entropy is.
    loaded = load(base.name, [*base.overrides, *behind, "evaluation.max_new_tokens=1"])
    weights = {run.label: str(RunDirectory(Path(run.recipe.directory)).export) for run in whole}
    settings = CompareSettings(models=weights, baseline=whole[0].label)
    scored = score_models(loaded, RATES, settings, folder / "scores", console)
    taken = {one.label: one.mean(CROSS_ENTROPY) for one in scored}
    found: Found = {}
    for run in runs:
        found.setdefault(run.method.name, {})[run.recipe.train.learning_rate] = taken.get(run.label)
    best = best_of(found)
    texts = {name: {repr(rate): value for rate, value in by_rate.items()} for name, by_rate in found.items()}
    write_json(folder / CHOSEN, {"seed": SEED, "rows": behind, CROSS_ENTROPY: texts})
    return best


def survivors(runs: Sequence[Run], faults: Mapping[str, str]) -> list[Run]:
    """Return the runs that a rate may be chosen of: all but those whose loss was not finite.

    `faults` holds a sentence for each that failed, by its directory. Raises RunError where one failed for another
    reason, or where none of a method is left.
    """
    whole = [run for run in runs if run.recipe.directory not in faults]
    broken = {path: fault for path, fault in faults.items() if not (Path(path) / FAULTY).exists()}
    lost = {run.method.name for run in runs} - {run.method.name for run in whole}
    refuse_failed(dict(broken or (faults if lost else {})), len(runs))
    return whole


def best_of(found: Found) -> dict[str, float]:
    """Return each method's rate of least cross-entropy. Raises RunError where a method has none that is finite."""
    finite = {
        name: {rate: value for rate, value in by_rate.items() if value is not None and isfinite(value)}
        for name, by_rate in found.items()
    }
    for name, by_rate in finite.items():
        if not by_rate:
            raise RunError(f"learning rates: {name} has a finite cross-entropy with none. Write smaller ones.")
    return {name: min(by_rate, key=by_rate.__getitem__) for name, by_rate in finite.items()}


def describe(folder: Path, chosen: dict[str, float]) -> str:
    """Say which rates were chosen, and which of them lie at an end of what was tried."""
    tried = json.loads((folder / CHOSEN).read_text())[CROSS_ENTROPY]
    words = []
    for name, rate in chosen.items():
        rates = sorted(float(text) for text in tried[name])
        words.append(f"{name} {rate:g}" + (" (at an end)" if rate in (rates[0], rates[-1]) else ""))
    tried_rates = ", ".join(f"{rate:g}" for rate in sorted({float(rate) for one in tried.values() for rate in one}))
    return (
        f"Learning rates, of {tried_rates} that with the least cross-entropy from seed {SEED} on other held-out rows: "
        f"{', '.join(words)}."
    )


def rows_behind(base: Base) -> list[str]:
    """Return the overrides that have the evaluation read the rows behind its own. Raises RunError if there are none."""
    recipe = base.load().recipe
    source, wanted = recipe.data.validation, recipe.evaluation.num_prompts
    assert source is not None
    rows = sum(1 for _ in load_rows(source))
    if wanted is None or rows < 2 * wanted:
        raise RunError(
            f"--learning-rates: {base.name} has {rows} held-out rows and evaluates on {wanted or 'all'} of them, which "
            f"leaves too few to choose a rate on. Write evaluation.num_prompts={max(1, rows // 2)}."
        )
    return [f"data.validation.skip_rows={source.skip_rows + wanted}", f"data.validation.num_rows={wanted}"]
