"""One table of models on the same prompts: ROUGE, answers, cross-entropy, KL, what each kept, paired differences.

Rows of every model are kept beside it (predictions.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deltakd.base.errors import DataError
from deltakd.base.files import write_json, write_text
from deltakd.evaluate.scores import ROUGE, Difference, Interval, mean_interval, paired_difference

ANSWER = "answer"
CROSS_ENTROPY = "cross_entropy"
KL_TO_TEACHER = "kl_to_teacher"
KL_TO_TARGET = "kl_to_target"
NUM_TOKENS = "num_tokens"
KEPT = "kept: "
TITLES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", ANSWER: "answer, %"}
TITLES |= {CROSS_ENTROPY: "cross-entropy", KL_TO_TEACHER: "KL to teacher", KL_TO_TARGET: "KL to target"}


@dataclass(frozen=True)
class ModelScores:
    """One model's scores by metric, row by row; where a prompt is answered several times, the mean of its answers.

    ROUGE lies between 0 and 1, and so does `answer`, of those rows alone that have a final answer. `cross_entropy` is
    in nats per token of each row's reference; `kept: NAME` likewise on the rows of another text, of which there may be
    more or fewer. `kl_to_teacher`, where a teacher was named, is KL(teacher, model) in nats per token of the same
    references; `kl_to_target` likewise for the recipe's target.
    """

    label: str
    weights: str
    identity: str
    rows: Mapping[str, Sequence[float]]
    num_truncated: int  # answers that reached max_new_tokens
    num_tokens: Sequence[float] = ()  # of the answers, by prompt

    def mean(self, metric: str) -> float:
        """Return a metric's mean over rows."""
        return float(np.mean(self.rows[metric]))


@dataclass(frozen=True)
class Comparison:
    """Several models on the same prompts, with differences to a baseline."""

    models: Sequence[ModelScores]
    baseline: str
    differences: Mapping[str, Mapping[str, Difference]]  # label -> metric -> label minus baseline
    warnings: Sequence[str]
    teacher: str | None = None
    intervals: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)  # label -> metric -> mean
    before: ModelScores | None = None  # the raw student, of which `kept` alone is read
    changes: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)  # label -> kept -> minus before

    @property
    def kept_before(self) -> dict[str, float]:
        """The raw student's means of what is kept."""
        before = self.before
        return {} if before is None else {name: before.mean(name) for name in before.rows if name.startswith(KEPT)}

    def retained(self, label: str) -> float | None:
        """Return a model's ROUGE-L as a share of the teacher's; None where there is no teacher, or it has none."""
        means = {model.label: model.mean("rougeL") for model in self.models}
        return means[label] / means[self.teacher] if self.teacher is not None and means[self.teacher] else None


def compare(
    models: Sequence[ModelScores],
    baseline: str,
    teacher: str | None,
    num_resamples: int,
    seed: int,
    before: ModelScores | None = None,
) -> Comparison:
    """Take every model's paired difference to the baseline and check that the teacher is better than it.

    `before` is what the students were before any training. Raises DataError if a label is missing or rows do not match.
    """
    by_label = {model.label: model for model in models}
    for label in {baseline, teacher} - {None}:
        if label not in by_label:
            raise DataError(f"evaluation: {label} is none of the models {', '.join(by_label)}. Write one of them.")

    def minus(model: ModelScores, other: ModelScores, metrics: Sequence[str]) -> dict[str, Difference]:
        pairs = {metric: (model.rows[metric], other.rows.get(metric, ())) for metric in metrics}
        return {metric: paired_difference(*pair, num_resamples, seed) for metric, pair in pairs.items()}

    differences = {one.label: minus(one, by_label[baseline], [*one.rows]) for one in models if one.label != baseline}
    intervals = {
        model.label: {
            metric: mean_interval(rows, num_resamples, seed)
            for metric, rows in (*model.rows.items(), (NUM_TOKENS, model.num_tokens))
            if len(rows) or metric != NUM_TOKENS
        }
        for model in models
    }
    changes = {}
    if before is not None:
        changes = {one.label: minus(one, before, [m for m in one.rows if m.startswith(KEPT)]) for one in models}
    warnings = _warn_of_teacher(teacher, baseline, differences[teacher]) if teacher not in (None, baseline) else []
    return Comparison(models, baseline, differences, warnings, teacher, intervals, before, changes)


def _warn_of_teacher(teacher: str | None, baseline: str, gain: Mapping[str, Difference]) -> list[str]:
    if gain["rougeL"].low > 0 and gain[CROSS_ENTROPY].high < 0:
        return []
    return [
        f"{teacher} is not clearly better than {baseline} (ROUGE-L {signed(gain['rougeL'], 'rougeL')}, "
        f"cross-entropy {signed(gain[CROSS_ENTROPY], CROSS_ENTROPY)}): there is little to distil. "
        "Train the teacher longer or make it larger."
    ]


def markdown_table(comparison: Comparison) -> str:
    """Return means with the paired 95% interval of the difference to the baseline, and a second table beside them."""
    metrics = list(comparison.models[0].rows)
    lines = [["model", *(TITLES.get(metric, metric) for metric in metrics)]]
    for model in comparison.models:
        cells = [model.label]
        for metric in metrics:
            mean = shown(model.mean(metric), metric)
            difference = comparison.differences.get(model.label, {}).get(metric)
            cells.append(f"{mean} ({signed(difference, metric)})" if difference else mean)
        lines.append(cells)
    return "\n".join([*_table(lines), "", *_table(_beside(comparison)), "", _legend(comparison, metrics)]) + "\n"


def _beside(comparison: Comparison) -> list[list[str]]:
    """Return what is no score: the share of the teacher's, lengths, and what was kept, before and after."""
    kept = comparison.kept_before
    lines = [["model", "of the teacher's ROUGE-L", "tokens", "cut off", *(f"{one}, before -> after" for one in kept)]]
    for model in comparison.models:
        share = comparison.retained(model.label)
        tokens = f"{np.mean(model.num_tokens):.1f}" if len(model.num_tokens) else "-"
        cells = [model.label, "-" if share is None else f"{100 * share:.0f}%", tokens, f"{model.num_truncated:,}"]
        for one in kept:
            change = signed(comparison.changes[model.label][one], one)
            cells.append(f"{kept[one]:.3f} -> {model.mean(one):.3f} ({change})")
        lines.append(cells)
    return lines


def _table(lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return [rows[0], "|" + "---|" * len(lines[0]), *rows[1:]]


def _legend(comparison: Comparison, metrics: Sequence[str]) -> str:
    num_prompts = len(comparison.models[0].rows[CROSS_ENTROPY])
    what = f"{num_prompts} held-out prompts. ROUGE: F1 x 100, rouge-score with its stemmer. "
    if ANSWER in metrics:
        num_answers = len(comparison.models[0].rows[ANSWER])
        what += f"Answer: how many of {num_answers} final answers are right, by math-verify. "
    what += (
        "Cross-entropy: nats per token of the references, lower is better; `kept` likewise, on text outside the "
        "fine-tuning data. "
    )
    if KL_TO_TEACHER in metrics:
        what += "KL to teacher: KL(teacher, model), nats per token of the references. "
    if KL_TO_TARGET in metrics:
        what += "KL to target: KL(the recipe's target, model), likewise. "
    what += f"In brackets: mean difference per row to {comparison.baseline} with its paired 95% bootstrap interval. "
    what += "Tokens: the mean length of an answer; cut off: answers that reached the limit."
    if comparison.before is not None:
        what += f" Before: {comparison.before.label}, and in brackets the difference to it."
    return what


def write_comparison(comparison: Comparison, facts: Mapping[str, Any], folder: Path) -> None:
    """Write results.json and table.md; `facts` name the protocol."""
    write_json(folder / "results.json", results_of(comparison, facts))
    write_text(folder / "table.md", f"{markdown_table(comparison)}\nProtocol: {facts['protocol']}.\n")


def results_of(comparison: Comparison, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what results.json holds."""
    return {
        **facts,
        "baseline": comparison.baseline,
        "teacher": comparison.teacher,
        "kept_before": comparison.kept_before,
        "models": {model.label: _result(comparison, model) for model in comparison.models},
        "warnings": list(comparison.warnings),
    }


def _result(comparison: Comparison, model: ModelScores) -> dict[str, Any]:
    def plain(given: Mapping[str, Mapping[str, Interval]]) -> dict[str, Any]:
        return {metric: asdict(interval) for metric, interval in given.get(model.label, {}).items()}

    return {
        "weights": model.weights,
        "identity": model.identity,
        **{metric: model.mean(metric) for metric in model.rows},
        "intervals": plain(comparison.intervals),
        "num_truncated": model.num_truncated,
        "mean_tokens": float(np.mean(model.num_tokens)) if len(model.num_tokens) else None,
        "retained": comparison.retained(model.label),
        "difference": plain(comparison.differences),
        "kept_change": plain(comparison.changes),
    }


def shown(value: float, metric: str) -> str:
    """Write a metric's value: ROUGE and answers times 100, nats as they are."""
    return f"{100 * value:.1f}" if metric in (*ROUGE, ANSWER) else f"{value:.3f}"


def signed(interval: Interval, metric: str) -> str:
    """Write a difference with its interval: `+0.3 [-0.1, +0.7]`, ROUGE and answers times 100."""
    factor, digits = (100, 1) if metric in (*ROUGE, ANSWER) else (1, 3)
    mean, low, high = (f"{factor * value:+.{digits}f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"
