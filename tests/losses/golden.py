"""What the golden tests of methods share: settings with no trick on, draws from a seed, and how near is equal."""

import torch
from torch import Tensor

from deltakd.losses import objective
from deltakd.losses.objectives import Objective

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
