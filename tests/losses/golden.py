"""What the golden tests of methods share: settings with no trick on, draws from a seed, and how near is equal."""

import torch
from torch import Tensor

from deltakd.losses import objective
from deltakd.losses.objectives import Objective

# Three tokens over a vocabulary of five; no row is sorted, and no model agrees with another on its order.
LOGITS = {
    "student": [[0.3, -1.1, 0.8, 0.0, -0.4], [1.2, 0.5, -0.7, -2.0, 0.9], [-0.6, 0.1, 0.4, 1.5, -1.3]],
    "teacher": [[-0.9, 1.4, 0.2, 1.1, 0.5], [0.1, -1.6, 2.2, 0.4, -0.3], [0.7, -0.2, -1.8, 0.9, 1.3]],
    "teacher_raw": [[0.6, 0.3, -0.5, 0.9, -1.2], [-0.8, 0.2, 1.0, 0.7, 0.1], [1.1, -1.4, 0.3, -0.1, 0.8]],
    "student_raw": [[-0.2, 0.4, 1.3, -0.7, 0.6], [0.9, 1.1, -0.3, 0.0, -1.5], [0.2, -0.9, 1.6, 0.5, -0.4]],
}
# Weighs the tokens' gradients apart, so that one token's cannot stand in for another's.
COEFFICIENTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
FAR = 1e-3  # a mistaken number differs at least so much from the right one
# No trick is on; every test names its own.
PLAIN = {
    "reward": {"teacher": 1.0, "student": -1.0},
    "reward_scale": 1.0,
    "reward_clip": None,
    "discount": 0.0,
    "own_reward": True,
    "length_normalised": False,
    "whiten": False,
    "ratio_clip": None,
    "importance_weights": True,
    "divergence_weight": 0.0,
}


def policy(**changes) -> Objective:
    return objective({"target": "teacher", "divergence": "reverse_kl", "policy_gradient": PLAIN | changes})


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def worked_returns(r: list[float], lengths: list[int], discount: float, own: bool, normalised: bool) -> list[float]:
    """R_t = sum over t' >= first of discount^(t' - first) r_t', first being t, or t + 1 without the own reward."""
    found, start = [], 0
    for length in lengths:
        for t in range(length):
            first = t if own else t + 1
            total = 0.0
            for later in range(first, length):
                total += discount ** (later - first) * r[start + later]  # 0.0 ** 0 is 1
            found.append(total / max(1, length - first) if normalised else total)
        start += length
    return found
