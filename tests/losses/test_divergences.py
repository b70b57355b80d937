"""Laws of every divergence: zero at equality, never negative, finite, and its gradient's bound where it has one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltakd.losses import objective
from deltakd.losses.divergences import DIVERGENCES, Points, nucleus

DEFAULTS = {
    name: objective({"divergence": {"name": name}}).settings.divergence.model_dump(exclude={"name"})
    for name in DIVERGENCES
}
NO_DIVERGENCE = "reverse_cross_entropy"  # which is the student's entropy where the points are equal
# The largest absolute sum of a token's gradient over the vocabulary, from the formulas of docs/objectives.md.
BOUNDS = {
    "forward_kl": 2.0,
    "jsd": 2 * 0.5 * math.log(2),
    "skew_kl": 2 * 0.9 / 0.1,
    "tvd": 1.0,
}


def divergence(name: str, z_p: Tensor, z_q: Tensor) -> tuple[Tensor, Tensor]:
    log_q = z_q.log_softmax(-1)
    return DIVERGENCES[name](Points(z_p.log_softmax(-1), log_q, log_q.exp()), **DEFAULTS[name])


def draw(seed: int, scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, 6, 11, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DIVERGENCES)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
@settings(max_examples=30, deadline=None)
def test_zero_at_equality_never_negative_and_finite_at_huge_logits(name, dtype, seed, scale):
    p, q = draw(seed, scale, dtype)
    value, grad = divergence(name, p, q)
    assert torch.isfinite(value).all() and torch.isfinite(grad).all()
    assert (value >= -10 * torch.finfo(dtype).eps * (1 + scale)).all()  # a sum of terms of size `scale`
    # The gradient sums to 0 over the vocabulary: a shift of all logits changes no distribution.
    assert (grad.sum(-1).abs() <= 1e3 * torch.finfo(dtype).eps * (1 + scale) * (1 + grad.abs().sum(-1))).all()
    if name == NO_DIVERGENCE:
        return
    same, grad_same = divergence(name, p, p)
    # Mixtures of equal distributions are equal to the last bits only.
    assert (same.abs() <= 10 * torch.finfo(dtype).eps).all()
    assert (grad_same.abs() <= 10 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=20, deadline=None)
def test_the_gradient_is_the_slope_of_the_value(name, seed, scale):
    """Central differences along a random direction; adaptive_kl's weights are held fixed, so it is left to autograd."""
    if name == "adaptive_kl":
        return
    p, q = draw(seed, scale)
    direction = draw(seed + 1, 1.0)[0]
    _, grad = divergence(name, p, q)
    step = 1e-6
    slope = (divergence(name, p, q + step * direction)[0] - divergence(name, p, q - step * direction)[0]) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(-1), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", BOUNDS)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1.0, 10.0, 1e3]))
@settings(max_examples=30, deadline=None)
def test_a_bounded_gradient_keeps_its_bound(name, seed, scale):
    p, q = draw(seed, scale)
    _, grad = divergence(name, p, q)
    assert (grad.abs().sum(-1) <= BOUNDS[name] + 1e-9).all()


def test_the_skew_of_reverse_kl_bounds_its_gradient_and_reverse_kl_has_none():
    """P has almost no mass where half of Q is: log q/p is 200."""
    z_p, z_q = torch.tensor([[0.0, -200.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    assert divergence("reverse_kl", z_p, z_q)[1].abs().max() > 40
    assert divergence("skew_reverse_kl", z_p, z_q)[1].abs().max() < math.log(10)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_one_hot_points_are_no_special_case(name):
    """Each point all on one token, the same or another one: 1e4 apart, far below the smallest float."""
    hot = 1e4 * torch.eye(5, dtype=torch.float64)
    for z_q in (hot, hot.roll(1, 0)):
        value, grad = divergence(name, hot, z_q)
        assert torch.isfinite(value).all() and torch.isfinite(grad).all() and (value > -1e-15).all()
    assert (divergence(name, hot, hot)[0].abs() < 1e-15).all()  # an entropy of 0 as well


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_a_nucleus_is_the_smallest_set_that_holds_its_mass(spread):
    """A flat distribution needs two thirds of its 3,000 tokens, far more than are looked at first; a peaked one few."""
    z = spread * torch.randn(2, 3000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = z.softmax(-1)
    kept = nucleus(p, 2 / 3 - 1e-6)
    least_inside = torch.where(kept, p, 1.0).amin(-1)
    assert (torch.where(kept, 0.0, p).amax(-1) <= least_inside).all()
    held = torch.where(kept, p, 0.0).sum(-1)
    assert (held >= 2 / 3 - 1e-6).all() and (held - least_inside < 2 / 3 - 1e-6).all()
