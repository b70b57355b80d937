"""Models that were trained alike from several seeds, as one row of results.json: what a report shows of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltakd.base.files import write_json
from deltakd.evaluate.compare import ModelScores

RESULTS = "results.json"
Differences = Mapping[str, Mapping[str, float]]  # metric -> mean, low, high


def write_groups(
    folder: Path,
    groups: Mapping[str, Sequence[ModelScores]],
    baseline: str,
    differences: Mapping[str, Differences],
    facts: Mapping[str, Any],
) -> None:
    """Write means over prompts and seeds of each group, a comparison of them with `baseline`, and whom each is made of.

    What `differences` holds of a group was taken before, paired by prompt and seed. A group of one is a model alone.
    """
    models = {label: _of_group(runs, differences.get(label, {})) for label, runs in groups.items()}
    write_json(folder / RESULTS, {**facts, "baseline": baseline, "models": models, "warnings": []})


def _of_group(runs: Sequence[ModelScores], differences: Differences) -> dict[str, Any]:
    return {
        "weights": runs[0].weights,
        "identity": runs[0].identity,
        **{metric: float(np.mean([run.mean(metric) for run in runs])) for metric in runs[0].rows},
        "num_truncated": round(float(np.mean([run.num_truncated for run in runs]))),
        "difference": dict(differences),
        "runs": {run.label: run.weights for run in runs},
    }
