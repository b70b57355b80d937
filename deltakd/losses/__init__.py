"""Objectives on next-token distributions: pure tensor maths, usable without a recipe or a process.

    objective(settings)    a mapping as in a recipe's `objective:` block -> Objective
    linear_loss(...)       the chunked loss from hidden states and a head, with closed-form gradients

Both load torch on first use, so that settings can be checked without it.
"""

from typing import Any

__all__ = ["LinearLoss", "Objective", "linear_loss", "objective"]


def __getattr__(name: str) -> Any:
    if name in ("Objective", "objective"):
        from deltakd.losses import objectives

        return getattr(objectives, name)
    if name in ("LinearLoss", "linear_loss"):
        from deltakd.losses import linear

        return getattr(linear, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
