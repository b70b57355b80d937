"""The eight variants as formulas in papers are written, in probabilities: where inf and NaN come from.

`p = teacher * (student_raw / teacher_raw)^alpha`, normalised by its sum, and `sum p log(p / q)`. Here they are computed
that way on real logits, in 16 and 32 bits, and beside them the same objectives in log space.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deltakd.bench.words import first_words
from deltakd.losses.objectives import Objective, objective
from deltakd.losses.settings import VARIANTS

ALPHAS = (0.25, 0.5, 1.0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Half a unit of the student's logits: a student that has begun to move, where the points are not equal.
NOISE = 0.5


def faults(name: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Return, by variant, alpha and precision, the share of tokens whose loss or gradient is inf or NaN."""
    z = logits(name, overrides)
    found = []
    for variant in VARIANTS:
        for alpha in ALPHAS:
            loss = objective({"target": {"name": "parallelogram", "variant": variant, "alpha": alpha}})
            for dtype in DTYPES:
                given = {model: values.to(dtype) for model, values in z.items()}
                point = {"variant": variant, "alpha": alpha, "dtype": str(dtype).removeprefix("torch.")}
                in_probabilities = _bad(given["student"], partial(plain, given=given, loss=loss))
                in_logs = _bad(given["student"], partial(_in_logs, given=given, loss=loss))
                found.append(point | {"bad_in_probabilities": in_probabilities, "bad_in_logs": in_logs})
    return found


def _in_logs(student: Tensor, given: dict[str, Tensor], loss: Objective) -> Tensor:
    return loss.per_token(given | {"student": student})


def plain(student: Tensor, given: dict[str, Tensor], loss: Objective) -> Tensor:
    """Return the loss per token from powers and ratios of probabilities, in the precision of the logits."""
    probabilities = {name: values.softmax(-1) for name, values in (given | {"student": student}).items()}
    points = []
    for point in loss.weights:
        product = torch.ones_like(student)
        for name, weight in point.items():
            product = product * probabilities[name] ** weight
        points.append(product / product.sum(-1, keepdim=True))
    p, q = points if loss.settings.divergence.name == "forward_kl" else reversed(points)
    return (p * (p / q).log()).sum(-1)


def _bad(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> float:
    student = logits.clone().requires_grad_()
    value = loss(student)
    (grad,) = torch.autograd.grad(value.sum(), student)
    return float((~(torch.isfinite(value) & torch.isfinite(grad).all(-1))).float().mean())


def logits(name: str, overrides: Sequence[str]) -> dict[str, Tensor]:
    """Return all four models' float32 logits [n, V]; the student's with noise."""
    z = {role: hidden @ head.T for role, (hidden, head) in first_words(name, overrides).items()}
    generator = torch.Generator().manual_seed(0)
    z["student"] = z["student_raw"] + NOISE * torch.randn(z["student_raw"].shape, generator=generator)
    return z
