"""One table of models on the same held-out prompts: ROUGE, cross-entropy, what each kept, and paired differences.

Rows of every model are kept (`predictions/<label>.jsonl`), so that any other score can be taken later without a model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltakd.base.rundir import write_json, write_text
from deltakd.evaluate.scores import ROUGE, Interval, paired_difference

CROSS_ENTROPY = "cross_entropy"
TITLES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", CROSS_ENTROPY: "cross-entropy"}


@dataclass(frozen=True)
class ModelScores:
    """One model's scores, row by row: ROUGE between 0 and 1, cross-entropy in nats per token of each reference.

    `kept` maps a name to the model's mean cross-entropy on that text. `cross_entropy` is the mean over all supervised
    tokens of the references, of which longer rows hold more.
    """

    label: str
    weights: str
    identity: str
    rows: Mapping[str, Sequence[float]]
    cross_entropy: float
    kept: Mapping[str, float]
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
            for metric in (*ROUGE, CROSS_ENTROPY)
        }
        for model in models
        if model.label != baseline
    }
    warnings = []
    if teacher is not None and teacher != baseline:
        gain = differences[teacher]
        if not (gain["rougeL"].low > 0 and gain[CROSS_ENTROPY].high < 0):
            warnings.append(
                f"{teacher} is not clearly better than {baseline} (ROUGE-L {_signed(gain['rougeL'], 100)}, "
                f"cross-entropy {_signed(gain[CROSS_ENTROPY])}): there is little to distil. "
                "Train the teacher longer or make it larger."
            )
    return Comparison(models, baseline, differences, warnings)


def markdown_table(comparison: Comparison) -> str:
    """Return the table: means with the paired 95% interval of the difference to the baseline; ROUGE times 100."""
    kept = list(comparison.models[0].kept)
    titles = ["model", *(TITLES[metric] for metric in (*ROUGE, CROSS_ENTROPY)), *(f"kept: {name}" for name in kept)]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for model in comparison.models:
        cells = [model.label]
        for metric in (*ROUGE, CROSS_ENTROPY):
            factor = 1 if metric == CROSS_ENTROPY else 100
            mean = f"{model.cross_entropy:.3f}" if metric == CROSS_ENTROPY else f"{factor * model.mean(metric):.1f}"
            difference = comparison.differences.get(model.label, {}).get(metric)
            cells.append(mean + (f" ({_signed(difference, factor)})" if difference else ""))
        lines.append("| " + " | ".join([*cells, *(f"{model.kept[name]:.3f}" for name in kept)]) + " |")
    num_prompts = len(comparison.models[0].rows[CROSS_ENTROPY])
    lines += [
        "",
        f"{num_prompts} held-out prompts. ROUGE: F1 x 100, rouge-score with its stemmer. Cross-entropy: nats per token "
        "of the references, lower is better; `kept` likewise, on text outside the fine-tuning data. In brackets: mean "
        f"difference per prompt to {comparison.baseline} with its paired 95% bootstrap interval.",
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
                **{metric: model.mean(metric) for metric in ROUGE},
                CROSS_ENTROPY: model.cross_entropy,
                "kept": dict(model.kept),
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


def _signed(interval: Interval, factor: float = 1) -> str:
    digits = 1 if factor == 100 else 3
    mean, low, high = (f"{factor * value:+.{digits}f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"
