"""The page's charts, as plotly's own descriptions, and plotly itself: the only file that knows plotly.

Colours are not here: the page gives each run its colour, in all charts alike, by the theme that its reader chose.
Numbers travel as base64 of 32-bit floats and of whole steps, which plotly reads as they are.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltakd.report.run import Run
from deltakd.report.sweeps import Response
from deltakd.report.thin import Curve, Floats

PHASES = {
    "wait": "waiting for batches and teachers",
    "forward_backward": "forward and backward",
    "update": "update",
    "rollouts": "writing its own batches",
    "validation": "validation",
}


@dataclass(frozen=True)
class Plan:
    """One chart of curves: which value, what it is called, and what its axis says."""

    id: str
    title: str
    unit: str
    format: str = ".4g"
    about: str = ""
    log: bool = False  # whether a logarithmic axis tells more
    single: bool = True  # whether single steps tell more than their means


TRAINING = (
    Plan(
        "loss", "Loss", "per supervised token", about="What is minimised: not comparable between objectives.", log=True
    ),
    Plan(
        "cross_entropy",
        "Cross-entropy",
        "nats per token",
        about="On the training tokens, whatever the objective.",
        log=True,
    ),
    Plan("kl_to_target", "KL to target", "nats per token", about="KL(target, student).", log=True),
    Plan("grad_norm", "Gradient norm", "", about="Before it is clipped.", log=True),
    Plan("learning_rate", "Learning rate", "", ".3g", log=True),
    Plan("alpha", "Alpha", "", ".3g", about="How much of the teacher's shift the target takes."),
    Plan("policy", "Policy loss", "per token", about="Of tokens that the student drew."),
    Plan("reward", "Reward", "", about="Mean over tokens that the student drew."),
    Plan("corpus", "Plain text", "nats per token", about="Cross-entropy of plain text beside the task."),
    Plan("student_entropy", "Student's entropy", "nats per token", about="Near 0 it says one thing only."),
)
VALIDATION = (
    Plan("loss", "Loss on held-out rows", "per supervised token"),
    Plan("cross_entropy", "Cross-entropy on held-out rows", "nats per token"),
    Plan("kl_to_target", "KL to target on held-out rows", "nats per token"),
    Plan("rougeL", "ROUGE-L of answers", "F1", ".3f"),
)
RATES = (
    Plan("tokens_per_s", "Tokens per second", "of a step, all ranks", ",.0f", single=False),
    Plan("waiting", "Share of a step that waits", "", ".1%", single=False),
)
WRITING = (
    Plan("answer_tokens", "Tokens per answer", "that the student wrote", ".1f"),
    Plan("on_policy", "On-policy fraction", "of the batches", ".0%"),
)
MEMORY = (Plan("memory", "Memory of the first student", "GiB, resident", ".2f"),)


def plotly_source() -> str:
    """Return plotly.js whole."""
    from plotly.offline import get_plotlyjs

    source: str = get_plotlyjs()
    return source


def charts(runs: Sequence[Run], found: Sequence[Response] = ()) -> dict[str, list[dict[str, Any]]]:
    """Return every chart that there is something to show in, by the page's section."""
    return {
        "training": [_of_curves(plan, runs) for plan in TRAINING if _known(plan, runs)],
        "validation": [_validated(plan, runs) for plan in VALIDATION if _validated_at_all(plan, runs)],
        "time": [*_phases(runs), *(_of_curves(plan, runs) for plan in RATES if _known(plan, runs))],
        "writing": [_of_curves(plan, runs) for plan in WRITING if _known(plan, runs)],
        "sweeps": [_response(one) for one in found],
        "memory": [_of_curves(plan, runs) for plan in MEMORY if _known(plan, runs)],
    }


def packed(values: NDArray[Any] | Floats) -> dict[str, str]:
    """Return an array as plotly reads it: `u2` or `u4` for whole numbers, `f4` for others."""
    kind = "f4"
    if len(values) and (values >= 0).all() and (values == np.round(values)).all() and values.max() < 2**32:
        kind = "u2" if values.max() < 2**16 else "u4"
    return {"dtype": kind, "bdata": base64.b64encode(values.astype(f"<{kind}").tobytes()).decode()}


def _curve_of(plan: Plan, run: Run) -> Curve | None:
    if plan.id == "alpha" and "kl_to_target" not in run.curves:
        return None  # there is no target that it could move
    return run.curves.get(plan.id)


def _known(plan: Plan, runs: Sequence[Run]) -> bool:
    return any(_curve_of(plan, run) is not None for run in runs)


def _of_curves(plan: Plan, runs: Sequence[Run]) -> dict[str, Any]:
    traces = []
    for index, run in enumerate(runs):
        curve = _curve_of(plan, run)
        if curve is None:
            continue
        is_short = len(curve.mean_x) == len(curve.x)
        if plan.single and not is_short:
            traces.append(_line(index, "raw", curve.x, curve.y) | {"hoverinfo": "skip"})
        x, y = (curve.x, curve.y) if is_short else (curve.mean_x, curve.mean_y)
        traces.append(_line(index, "mean", np.round(x), y) | {"hovertemplate": _hover(run.name, plan)})
    return _chart(plan, traces)


def _line(run: int, kind: str, x: Floats, y: Floats) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "x": packed(x), "y": packed(y), "meta": {"run": run, "kind": kind}}


def _hover(name: str, plan: Plan) -> str:
    return f"<b>{escaped(name)}</b><br>step %{{x:,.0f}}: %{{y:{plan.format}}}<extra></extra>"


def _chart(plan: Plan, traces: list[dict[str, Any]], prefix: str = "") -> dict[str, Any]:
    axes: dict[str, Any] = {
        "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": plan.unit}},
    }
    if plan.format.endswith("%"):
        axes["yaxis"]["tickformat"] = ".2~%"  # whole percents alone would name several ticks alike
    return _described(plan, traces, axes, prefix)


def _described(plan: Plan, traces: list[dict[str, Any]], layout: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    words = {"id": prefix + plan.id, "title": plan.title, "about": plan.about, "log": plan.log}
    return words | {"data": traces, "layout": layout}


def _validated_at_all(plan: Plan, runs: Sequence[Run]) -> bool:
    return any(value is not None for run in runs for value in run.validated.get(plan.id, ()))


def _validated(plan: Plan, runs: Sequence[Run]) -> dict[str, Any]:
    traces = []
    for index, run in enumerate(runs):
        pairs = zip(run.validated.get("step", ()), run.validated.get(plan.id, ()), strict=True)
        points = [(step, value) for step, value in pairs if step is not None and value is not None]
        if points:
            x, y = np.array(points, np.float64).T
            line = _line(index, "mean", x, y) | {"mode": "lines+markers", "hovertemplate": _hover(run.name, plan)}
            traces.append(line)
    return _chart(plan, traces, "validation_")


def _response(one: Response) -> dict[str, Any]:
    """Return one metric over a setting: means over seeds, and from the lowest to the highest seed."""
    traces = []
    for index, (name, points) in enumerate(one.lines.items()):
        x, y, low, high, words = (list(part) for part in zip(*points, strict=True))
        down, up = ([abs(end - at) for at, end in zip(y, ends, strict=True)] for ends in (low, high))
        hover = f"<b>{escaped(name)}</b><br>{escaped(one.setting)} %{{x}}: %{{y:.4g}}<br>%{{text}}<extra></extra>"
        trace = {
            "type": "scatter",
            "mode": "lines+markers",
            "x": x,
            "y": y,
            "name": escaped(name),
            "error_y": {"type": "data", "symmetric": False, "arrayminus": down, "array": up},
            "text": [escaped(word) for word in words],
            "hovertemplate": hover,
            "meta": {"kind": "response", "line": index, "legend": len(one.lines) > 1},
        }
        traces.append(trace)
    plan = Plan(one.id, one.title, "", about="Means over seeds; bars from the lowest to the highest seed.")
    layout = {"xaxis": {"title": {"text": escaped(one.setting)}}, "yaxis": {"title": {"text": ""}}}
    return _described(plan, traces, layout)


def _phases(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return where a step's time goes, and how it shares out: one bar per run."""
    timed = [(index, run) for index, run in enumerate(runs) if run.steps and run.seconds.get("step")]
    if not timed:
        return []
    phases = [phase for phase in PHASES if any(run.seconds.get(phase) for _, run in timed)]
    spent = {phase: [run.seconds.get(phase, 0.0) for _, run in timed] for phase in phases}
    whole = [sum(values) or 1.0 for values in zip(*spent.values(), strict=True)]
    per_step = {
        phase: [1000 * value / run.steps for value, (_, run) in zip(values, timed, strict=True)]
        for phase, values in spent.items()
    }
    shares = {
        phase: [value / all_of_it for value, all_of_it in zip(spent[phase], whole, strict=True)] for phase in phases
    }
    where = Plan(
        "phases", "Where a step's time goes", "ms", ",.1f", "Mean per step. A student's own writing comes between."
    )
    share = Plan("shares", "The same as shares", "", ".1%", "Of the time in which a run trained.")
    return [_bars(where, timed, per_step), _bars(share, timed, shares)]


def _bars(plan: Plan, timed: Sequence[tuple[int, Run]], values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": PHASES[phase],
            "x": list(numbers),
            "y": [escaped(run.name) for _, run in timed],
            "meta": {"phase": phase, "runs": [index for index, _ in timed]},
            "hovertemplate": f"<b>%{{y}}</b><br>{PHASES[phase]}: %{{x:{plan.format}}} {plan.unit}<extra></extra>",
        }
        for phase, numbers in values.items()
    ]
    x: dict[str, Any] = {"title": {"text": plan.unit}}
    if plan.format.endswith("%"):
        x |= {"tickformat": ".0%", "range": [0, 1]}
    layout = {"barmode": "stack", "xaxis": x, "yaxis": {"autorange": "reversed", "showgrid": False}}
    return _described(plan, traces, layout)


def escaped(text: str) -> str:
    """Write a name so that plotly, which reads some tags in texts, shows it as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
