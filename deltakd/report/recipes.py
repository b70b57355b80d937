"""The recipes of several runs: the settings in which they differ, and nothing else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltakd.report.run import Run

APART = frozenset({"run", "pipeline"})  # a run's own name; the stage that it was, which is laid over the rest


@dataclass(frozen=True)
class Differences:
    """`values[key][run]`, as text; None where a recipe has no such key."""

    keys: Sequence[str]
    runs: Sequence[str]
    values: Mapping[str, Sequence[str | None]]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return a recipe's settings by their whole keys; a list is one value."""
    if not isinstance(tree, dict) or (not tree and prefix):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def differences(runs: Sequence[Run]) -> Differences:
    """Return the settings in which the runs' recipes differ."""
    trees = [flat({key: value for key, value in run.recipe.items() if key not in APART}) for run in runs if run.recipe]
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    texts = {key: [_text(tree[key]) if key in tree else None for tree in trees] for key in keys}
    differing = [key for key in keys if len(set(texts[key])) > 1]
    return Differences(differing, [run.name for run in runs if run.recipe], {key: texts[key] for key in differing})


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
