"""`deltakd bench variants`: the eight parallelogram variants trained side by side, with and without the remedies.

One process, plain torch, references in process: the same batches, the same initial student, the same rate for all. What
is recorded is what a user would see in steps.jsonl; a falling loss is not success, so cross-entropy stands beside it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from deltakd.base.errors import RunError
from deltakd.base.machine import machine_facts
from deltakd.base.ranks import Placement, assign_role
from deltakd.bench.probabilities import faults
from deltakd.bench.recorder import Steps
from deltakd.losses.settings import VARIANTS
from deltakd.recipe.build import build_parts, meet
from deltakd.recipe.inputs import read_examples, read_inputs
from deltakd.recipe.load import load
from deltakd.train.loop import train

UNCLIPPED = 1.0e9
# Overrides by the name of what they do; log_ratio_clip acts on reverse KL alone.
REMEDIES: Mapping[str, Sequence[str]] = {
    "none": [f"train.max_grad_norm={UNCLIPPED:.1f}"],
    "gradient clipped at 1": ["train.max_grad_norm=1.0"],
    "support top_p 0.99": [f"train.max_grad_norm={UNCLIPPED:.1f}", "objective.support={top_p: 0.99}"],
    "log ratio clipped at 5": [f"train.max_grad_norm={UNCLIPPED:.1f}", "objective.log_ratio_clip=5.0"],
}
PLAIN = ["engine={name: single}", "references.from=in_process"]
LAST = 20  # steps over which the end of a run is averaged


def bench(
    name: str, overrides: Sequence[str], steps: int, variants: Sequence[str], alphas: Sequence[float], out: Path
) -> None:
    """Train every variant at every alpha with every remedy for `steps` steps; write JSON, a table and a plot."""
    if unknown := sorted(set(variants) - set(VARIANTS)):
        raise RunError(f"bench variants: {unknown[0]} is no variant. Write some of {','.join(VARIANTS)}.")
    points = [
        (variant, alpha, remedy)
        for variant in variants
        for alpha in alphas
        for remedy in REMEDIES
        if VARIANTS[variant][1] == "reverse" or not remedy.startswith("log ratio")
    ]
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("variants", total=len(points))
        for variant, alpha, remedy in points:
            progress.update(task, description=f"{variant} alpha {alpha:g}, {remedy}")
            target = f"objective.target={{name: parallelogram, variant: {variant}, alpha: {alpha}}}"
            extra = [*overrides, target, *REMEDIES[remedy], *PLAIN, f"train.steps={steps}", "run=bench"]
            curve, fault = _train(name, extra)
            results.append({"variant": variant, "alpha": alpha, "remedy": remedy, "fault": fault, "steps": curve})
            progress.advance(task)
    report = {"machine": machine_facts(), "recipe": name, "results": results, "probabilities": faults(name, overrides)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(
        json.dumps({**report, "results": [summary(r) for r in results]}, indent=1) + "\n"
    )
    out.with_suffix(".md").write_text(markdown(results))
    plot(results, out.with_suffix(".svg"))
    Console().print(_table(results))
    print(f"{out}: written as .json, .md and .svg")


def _train(name: str, overrides: Sequence[str]) -> tuple[list[dict[str, Any]], str | None]:
    """Return the records of a run, and the sentence that it ended with if it could not go on."""
    loaded = load(name, overrides)
    records = Steps()
    inputs = read_inputs(loaded.recipe, loaded.where)
    examples = read_examples(loaded.recipe, inputs.tokenizer, progress=False)
    role = assign_role(Placement(0, 1, 0, 1), 0)
    parts = build_parts(inputs, examples, role, meet(loaded.recipe, role), None)
    fault = None
    try:
        train(parts, records)
    except RunError as error:
        fault = str(error)
    return [asdict(record) for record in records.taken], fault


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of one run: gradient norms before clipping, loss and cross-entropy at both ends."""
    steps = result["steps"]
    norms = [step["grad_norm"] for step in steps]
    few = {key: result[key] for key in ("variant", "alpha", "remedy", "fault")}
    if not steps:
        return few
    ends = {
        f"{name}_{end}": fmean(step[name] for step in some)
        for name in ("loss", "cross_entropy")
        for end, some in (("first", steps[:1]), ("last", steps[-LAST:]))
    }
    return few | {
        "num_steps": len(steps),
        "grad_norm_first": norms[0],
        "grad_norm_median": median(norms),
        "grad_norm_most": max(norms),
        **ends,
    }


COLUMNS = {
    "variant": "variant",
    "alpha": "alpha",
    "remedy": "remedy",
    "grad_norm_first": "first gradient norm",
    "grad_norm_median": "median",
    "grad_norm_most": "largest",
    "loss_first": "first loss",
    "loss_last": "last",
    "cross_entropy_first": "first cross-entropy",
    "cross_entropy_last": "last",
}


def _cells(result: Mapping[str, Any]) -> list[str]:
    facts = summary(result)
    cells = [facts.get(key, "-") for key in COLUMNS]
    return [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return one table row per run."""
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *(_cells(result) for result in results)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return the runs without remedy, for a terminal; the others are in the files."""
    shown = [index for index, key in enumerate(COLUMNS) if key != "remedy"]
    table = Table(*(list(COLUMNS.values())[index] for index in shown), title="without remedy")
    for cells in (_cells(result) for result in results if result["remedy"] == "none"):
        table.add_row(*(cells[index] for index in shown))
    return table


def plot(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw gradient norm and cross-entropy over steps, a column per variant, a line per alpha, without remedy."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(VARIANTS), figsize=(18, 5), sharex=True, sharey="row", layout="constrained")
    for column, (variant, (vertex, direction)) in enumerate(VARIANTS.items()):
        panels[0, column].set_title(f"{variant}: {vertex} {direction}", fontsize=9)
        for row, name in enumerate(("grad_norm", "cross_entropy")):
            panels[row, column].set_yscale("log")
            for result in results:
                if result["variant"] == variant and result["remedy"] == "none":
                    values = [step[name] for step in result["steps"]]
                    panels[row, column].plot(values, label=f"alpha {result['alpha']:g}", linewidth=1)
    panels[0, 0].set_ylabel("gradient norm"), panels[1, 0].set_ylabel("cross-entropy, nats")
    panels[0, 0].legend(fontsize=8), figure.supxlabel("optimizer step")
    figure.savefig(file, metadata={"Date": None})
