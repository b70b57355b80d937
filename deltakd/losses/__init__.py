"""Objectives on next-token distributions: pure tensor maths, usable without a recipe or a process.

    objective(settings)    a mapping as in a recipe's `objective:` block -> Objective
    linear_loss(...)       the chunked loss from hidden states and a head, with closed-form gradients
    TopK, Sampled          estimates of the target, as linear_loss takes them

All load torch on first use, so that settings can be checked without it.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "LinearLoss": "linear",
    "linear_loss": "linear",
    "Objective": "objectives",
    "objective": "objectives",
    "Sampled": "points",
    "TopK": "points",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"deltakd.losses.{_HOMES[name]}"), name)
