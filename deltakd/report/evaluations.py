"""Evaluations as tables of methods: each model's means with 95% intervals, and its paired differences to a baseline.

The differences are those that the evaluation took. The interval of a mean is a bootstrap over the rows that lie beside
it in scores/; where they are missing, so is the interval. Evaluations of the same baseline with the same scores are
one table.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltakd.evaluate.compare import ANSWER, CROSS_ENTROPY, KEPT, KL_TO_TEACHER, TITLES
from deltakd.evaluate.scores import ROUGE, Interval
from deltakd.report.find import RESULTS

NUM_RESAMPLES = 2000
RETAINED, LENGTH = "retained", "mean_tokens"
SHARES = (*ROUGE, ANSWER, RETAINED)  # more is better; but for a length all other metrics are nats, less is better
TITLES_HERE = {**TITLES, RETAINED: "of the teacher's ROUGE-L, %", LENGTH: "tokens", "answer_correct": "correct"}
NOT_METRICS = frozenset({"weights", "identity", "num_truncated", "difference"})


@dataclass(frozen=True)
class Cell:
    """One metric of one model, as the evaluation has it: not yet times 100."""

    mean: float
    low: float | None
    high: float | None
    difference: Interval | None

    def verdict(self, metric: str) -> str:
        """Say whether the difference to the baseline is `better`, `worse` or, if its interval holds 0, ``."""
        if self.difference is None or not self.difference.excludes_zero:
            return ""
        return "better" if (self.difference.mean > 0) == (metric in SHARES) else "worse"


@dataclass(frozen=True)
class Row:
    """A model of a table."""

    label: str
    weights: str
    identity: str
    evaluation: str
    num_truncated: int | None
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Table:
    """Models that answered the same prompts, compared with one baseline."""

    baseline: str
    rows: Sequence[Row]
    metrics: Sequence[str]
    num_prompts: int | None
    evaluations: Sequence[str]
    warnings: Sequence[str]
    against: str  # in words: the baseline, or what of it is fixed where rows have one each
    protocols: Sequence[str] = ()  # of which the answers were drawn

    @property
    def num_models(self) -> int:
        return len(self.rows)

    def best(self, metric: str) -> float | None:
        """Return a metric's best mean; None where no length is better than another."""
        means = [row.cells[metric].mean for row in self.rows if metric in row.cells and better(metric)]
        return None if not means else max(means) if metric in SHARES else min(means)


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation's folder holds."""

    name: str
    path: Path
    facts: Mapping[str, Any]
    baseline: str
    models: Mapping[str, Mapping[str, Any]]
    scored: Sequence[str]  # models with scores of their own, in the table or not yet
    notes: Sequence[str]

    def members(self, label: str) -> dict[str, str]:
        """Return the runs that a row is made of, by label, with their weights: from several seeds, or one alone."""
        facts = self.models.get(label, {})
        runs = facts.get("runs")
        return (
            {str(name): str(weights) for name, weights in runs.items()}
            if isinstance(runs, dict) and runs
            else {label: str(facts.get("weights", ""))}
        )

    def rows(self, label: str) -> dict[str, list[float]]:
        """Return a row's scores prompt by prompt, means over its runs; {} if they are not there."""
        runs = [self._rows(name) for name in self.members(label)]
        common = [metric for metric in runs[0] if len({len(run.get(metric, [])) for run in runs}) == 1]
        return {
            metric: [fmean(values) for values in zip(*(run[metric] for run in runs), strict=True)] for metric in common
        }

    def _rows(self, label: str) -> dict[str, list[float]]:
        try:
            stored = json.loads((self.path / "scores" / f"{label}.json").read_text())["scores"]["rows"]
            return {str(metric): [float(value) for value in values] for metric, values in stored.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def read_evaluation(name: str, path: Path) -> Evaluation:
    """Read an evaluation's folder; one whose results cannot be read says so in its notes."""
    scored = sorted(file.stem for file in (path / "scores").glob("*.json"))
    try:
        results = json.loads((path / RESULTS).read_text())
        models = {str(label): dict(facts) for label, facts in results["models"].items()}
        baseline = str(results["baseline"])
        facts = {key: value for key, value in results.items() if key != "models"}
        return Evaluation(name, path, facts, baseline, models, scored, [])
    except FileNotFoundError:
        note = f"no {RESULTS}: {len(scored)} models are scored ({', '.join(scored[:12])}), and not compared yet"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        note = f"{RESULTS} cannot be read ({type(error).__name__})"
    return Evaluation(name, path, {}, "", {}, scored, [note])


def tables(evaluations: Iterable[Evaluation]) -> list[Table]:
    """Return the tables of methods, those of the same baseline in one."""
    grouped: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        if evaluation.baseline in evaluation.models:
            scores = evaluation.models[evaluation.baseline]
            grouped.setdefault(json.dumps([evaluation.baseline, scores], sort_keys=True), []).append(evaluation)
    groups = sorted(grouped.values(), key=lambda group: -sum(len(one.models) for one in group))
    return [_table(sorted(group, key=lambda one: str(one.facts.get("started", "")))) for group in groups]


def _table(group: Sequence[Evaluation]) -> Table:
    rows: dict[tuple[str, str], Row] = {}
    metrics: dict[str, None] = {}
    num_prompts = None
    for evaluation in group:
        for label, facts in evaluation.models.items():
            identity = str(facts.get("identity", ""))
            if (label, identity) in rows:
                continue
            scores = evaluation.rows(label)
            num_prompts = num_prompts or len(scores.get(CROSS_ENTROPY, [])) or None
            cells = _cells(facts, scores)
            metrics |= dict.fromkeys(cells)
            truncated = facts.get("num_truncated")
            rows[label, identity] = Row(
                label, str(facts.get("weights", "")), identity, evaluation.name, truncated, cells
            )
    warnings = dict.fromkeys(str(text) for one in group for text in one.facts.get("warnings", []))
    ordered = sorted(metrics, key=_place)
    names = [one.name for one in group]
    against = str(group[0].facts.get("against", group[0].baseline))
    protocols = dict.fromkeys(str(one.facts["protocol"]) for one in group if one.facts.get("protocol"))
    return Table(
        group[0].baseline, list(rows.values()), ordered, num_prompts, names, [*warnings], against, [*protocols]
    )


def _place(metric: str) -> int:
    known = [*SHARES, CROSS_ENTROPY, KL_TO_TEACHER]
    return known.index(metric) if metric in known else len(known)


def _cells(facts: Mapping[str, Any], scores: Mapping[str, Sequence[float]]) -> dict[str, Cell]:
    cells = {}
    for metric, mean in facts.items():
        if metric in NOT_METRICS or isinstance(mean, bool) or not isinstance(mean, int | float):
            continue
        low, high = interval_of_mean(scores[metric]) if scores.get(metric) else (None, None)
        taken = facts.get("difference", {}).get(metric)
        difference = Interval(*(float(taken[key]) for key in ("mean", "low", "high"))) if taken else None
        cells[metric] = Cell(float(mean), low, high, difference)
    return cells


def interval_of_mean(rows: Sequence[float]) -> tuple[float, float]:
    """Return the 95% bootstrap interval of a mean over rows; the same resamples for every model of as many rows."""
    low, high = np.quantile(_resamples(len(rows)) @ np.asarray(rows, np.float64), [0.025, 0.975])
    return float(low), float(high)


@cache
def _resamples(num_rows: int) -> NDArray[np.float64]:
    draws = np.random.default_rng(0).multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=NUM_RESAMPLES)
    return draws / num_rows


def title(metric: str) -> str:
    """Return what a metric is called in a table."""
    return TITLES_HERE.get(metric, f"kept: {metric.removeprefix(KEPT)}" if metric.startswith(KEPT) else metric)


def better(metric: str) -> str:
    """Say which way a metric is better: `more`, `less`, or `` of a length."""
    return "" if metric == LENGTH else "more" if metric in SHARES else "less"


def number(value: float, metric: str, sign: str = "") -> str:
    """Write a metric's value: shares times 100, nats as they are."""
    factor, digits = (100, 1) if metric in SHARES else (1, 1 if metric == LENGTH else 3)
    text = f"{factor * value:{sign}.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if sign else text
