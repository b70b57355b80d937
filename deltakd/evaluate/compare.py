"""One table of models on the same held-out prompts: ROUGE, cross-entropy, KL, what each kept, and paired differences.

Rows of every model are kept (`predictions/<label>.jsonl`), so that any other score can be taken later without a model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltakd.base.files import write_json, write_text
from deltakd.evaluate.scores import ROUGE, Interval, paired_difference

CROSS_ENTROPY = "cross_entropy"
KL_TO_TEACHER = "kl_to_teacher"
KEPT = "kept: "
TITLES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
TITLES |= {CROSS_ENTROPY: "cross-entropy", KL_TO_TEACHER: "KL to teacher"}


@dataclass(frozen=True)
class ModelScores:
    """One model's scores by metric, row by row.

    ROUGE lies between 0 and 1. `cross_entropy` is in nats per token of each row's reference; `kept: NAME` likewise on
    the rows of another text, of which there may be more or fewer. `kl_to_teacher`, where a teacher was named, is
    KL(teacher, model) in nats per token of the same references.
    """

    label: str
    weights: str
    identity: str
    rows: Mapping[str, Sequence[float]]
    num_truncated: int  # answers that reached max_new_tokens

    def mean(self, metric: str) -> float:
        """Return a metric's mean over rows."""
        return float(np.mean(self.rows[metric]))


@dataclass(frozen=True)
class Comparison:
    """Several models on the same prompts, with differences to a baseline."""

    models: Sequence[ModelScores]
    baseline: str
    differences: Mapping[str, Mapping[str, Interval]]  # label -> metric -> label minus baseline
    warnings: Sequence[str]


def compare(
    models: Sequence[ModelScores], baseline: str, teacher: str | None, num_resamples: int, seed: int
) -> Comparison:
    """Take every model's paired difference to the baseline and check that the teacher is better than it."""
    by_label = {model.label: model for model in models}
    differences = {
        model.label: {
            metric: paired_difference(model.rows[metric], by_label[baseline].rows[metric], num_resamples, seed)
            for metric in model.rows
        }
        for model in models
        if model.label != baseline
    }
    warnings = []
    if teacher is not None and teacher != baseline:
        gain = differences[teacher]
        if not (gain["rougeL"].low > 0 and gain[CROSS_ENTROPY].high < 0):
            warnings.append(
                f"{teacher} is not clearly better than {baseline} (ROUGE-L {signed(gain['rougeL'], 'rougeL')}, "
                f"cross-entropy {signed(gain[CROSS_ENTROPY], CROSS_ENTROPY)}): there is little to distil. "
                "Train the teacher longer or make it larger."
            )
    return Comparison(models, baseline, differences, warnings)


def markdown_table(comparison: Comparison) -> str:
    """Return the table: means with the paired 95% interval of the difference to the baseline; ROUGE times 100."""
    metrics = list(comparison.models[0].rows)
    titles = ["model", *(TITLES.get(metric, metric) for metric in metrics)]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for model in comparison.models:
        cells = [model.label]
        for metric in metrics:
            mean = shown(model.mean(metric), metric)
            difference = comparison.differences.get(model.label, {}).get(metric)
            cells.append(f"{mean} ({signed(difference, metric)})" if difference else mean)
        lines.append("| " + " | ".join(cells) + " |")
    num_prompts = len(comparison.models[0].rows[CROSS_ENTROPY])
    kl = "KL to teacher: KL(teacher, model), nats per token of the references. " if KL_TO_TEACHER in metrics else ""
    lines += [
        "",
        f"{num_prompts} held-out prompts. ROUGE: F1 x 100, rouge-score with its stemmer. Cross-entropy: nats per token "
        "of the references, lower is better; `kept` likewise, on text outside the fine-tuning data. "
        f"{kl}In brackets: mean difference per row to {comparison.baseline} with its paired 95% bootstrap interval.",
    ]
    return "\n".join(lines) + "\n"


def write_comparison(comparison: Comparison, facts: Mapping[str, Any], folder: Path) -> None:
    """Write results.json and table.md."""
    result = {
        **facts,
        "baseline": comparison.baseline,
        "models": {
            model.label: {
                "weights": model.weights,
                "identity": model.identity,
                **{metric: model.mean(metric) for metric in model.rows},
                "num_truncated": model.num_truncated,
                "difference": {m: asdict(i) for m, i in comparison.differences.get(model.label, {}).items()},
            }
            for model in comparison.models
        },
        "warnings": list(comparison.warnings),
    }
    write_json(folder / "results.json", result)
    write_text(folder / "table.md", markdown_table(comparison))


def write_predictions(folder: Path, label: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Keep one model's answers, a line per prompt with its scores."""
    write_text(folder / "predictions" / f"{label}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def shown(value: float, metric: str) -> str:
    """Write a metric's value: ROUGE times 100, nats as they are."""
    return f"{100 * value:.1f}" if metric in ROUGE else f"{value:.3f}"


def signed(interval: Interval, metric: str) -> str:
    """Write a difference with its interval: `+0.3 [-0.1, +0.7]`, ROUGE times 100."""
    factor, digits = (100, 1) if metric in ROUGE else (1, 3)
    mean, low, high = (f"{factor * value:+.{digits}f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"
