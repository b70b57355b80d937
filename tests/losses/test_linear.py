"""Objectives against plain float64 autograd, and the laws of the specification (docs/objectives.md)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltakd.losses import linear_loss, objective
from deltakd.losses.divergences import DIVERGENCES
from deltakd.losses.points import Point, delta_point

NUM_TOKENS, HIDDEN, VOCAB = 50, 16, 97
FROZEN = ("teacher", "teacher_raw", "student_raw")
NAMES = sorted(DIVERGENCES)


def plain_divergence(name: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The definitions, written with autograd in mind and nothing else."""
    return {
        "forward_kl": lambda: (log_p.exp() * (log_p - log_q)).sum(-1),
        "reverse_kl": lambda: (log_q.exp() * (log_q - log_p)).sum(-1),
    }[name]()


class Case:
    """Random float64 hidden states, heads and labels; frozen heads have more rows than the student's."""

    def __init__(self, seed: int, num_tokens: int = NUM_TOKENS) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = draw(num_tokens, HIDDEN).requires_grad_()
        self.head = draw(VOCAB, HIDDEN).requires_grad_()
        self.pairs = {name: (draw(num_tokens, 8), draw(VOCAB + 3, 8)) for name in FROZEN}
        self.labels = torch.randint(0, VOCAB, (num_tokens,), generator=generator)

    def frozen_logits(self) -> dict[str, Tensor]:
        return {name: hidden @ head[:VOCAB].T for name, (hidden, head) in self.pairs.items()}


@pytest.mark.parametrize("as_logits", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [{"name": "teacher"}, {"name": "delta", "alpha": 0.5}])
def test_value_and_gradients_equal_plain_autograd_at_any_chunk_size(name, target, chunk_tokens, as_logits):
    """50 tokens: chunk 7 leaves a ragged last chunk, 64 is a single one."""
    case = Case(seed=3)
    block = {"target": target, "divergence": {"name": name}, "sft_weight": 0.3, "temperature": 2.0}
    loss = objective({**block, "temperature_squared": True})
    z = case.frozen_logits()
    student = case.hidden @ case.head.T
    point = z["teacher"]
    if target["name"] == "delta":
        point = point + 0.5 * (z["student_raw"] - z["teacher_raw"])
    divergence = plain_divergence(name, torch.log_softmax(point / 2, -1), torch.log_softmax(student / 2, -1)).sum()
    cross_entropy = torch.nn.functional.cross_entropy(student, case.labels, reduction="sum")
    expected = 0.3 * cross_entropy + 0.7 * 4 * divergence

    references = {name_: case.frozen_logits()[name_] if as_logits else case.pairs[name_] for name_ in loss.needs}
    result = linear_loss(case.hidden, case.head, references, case.labels, loss, chunk_tokens)

    # float64 sums in another order: a few ulps per token, nothing that looks like a scale error.
    torch.testing.assert_close(result.total, expected, rtol=1e-12, atol=0)
    assert result.cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=1e-12)
    assert result.divergence.item() == pytest.approx(divergence.item(), rel=1e-11)
    ours = torch.autograd.grad(3 * result.total, (case.hidden, case.head))
    plain = torch.autograd.grad(3 * expected, (case.hidden, case.head))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_per_token_is_the_chunked_loss_token_by_token(name):
    case = Case(seed=4)
    loss = objective({"target": {"name": "delta", "alpha": -0.7}, "divergence": {"name": name}, "sft_weight": 0.2})
    student = (case.hidden @ case.head.T).detach().requires_grad_()
    rows = loss.per_token({**case.frozen_logits(), "student": student}, case.labels)
    result = linear_loss(case.hidden, case.head, case.pairs, case.labels, loss)

    torch.testing.assert_close(rows.sum(), result.total, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(rows.sum(), student)
    (grad_hidden,) = torch.autograd.grad(result.total, case.hidden)
    torch.testing.assert_close(grad @ case.head, grad_hidden, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
@settings(max_examples=30, deadline=None)
def test_a_divergence_is_zero_at_equality_never_negative_and_finite_at_huge_logits(name, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    p, q = (scale * torch.randn(2, 6, 11, generator=generator, dtype=torch.float64)).log_softmax(-1)
    value, grad = DIVERGENCES[name](p, q)
    assert torch.isfinite(value).all() and torch.isfinite(grad).all()
    assert (value >= -1e-12 * scale).all()  # a difference of sums of size `scale`
    same, grad_same = DIVERGENCES[name](p, p)
    assert (same == 0).all()
    assert (grad_same == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_token_without_mass_in_both_points_changes_nothing(name):
    """Frozen models may rule a token out with -inf; the student may underflow to it."""
    p, q = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    wall = torch.full((5, 1), -torch.inf, dtype=torch.float64)
    value, grad = DIVERGENCES[name](p.log_softmax(-1), q.log_softmax(-1))
    walled = [torch.cat([z, wall], -1).log_softmax(-1) for z in (p, q)]
    value_walled, grad_walled = DIVERGENCES[name](*walled)
    torch.testing.assert_close(value_walled, value)
    torch.testing.assert_close(grad_walled[:, :-1], grad)
    assert (grad_walled[:, -1] == 0).all()


def test_delta_at_alpha_zero_is_the_teacher_bit_for_bit_and_needs_nothing_else():
    case = Case(seed=5)
    student = {"student": (case.hidden @ case.head.T).detach()}
    plain = objective({"target": {"name": "teacher"}})
    delta = objective({"target": {"name": "delta", "alpha": 0.0}})
    assert delta.needs == plain.needs == {"teacher"}
    logits = {**student, **case.frozen_logits()}
    assert torch.equal(delta.per_token(logits), plain.per_token(logits))


def test_the_anchors_agree_at_alpha_one_and_differ_elsewhere():
    logits = Case(seed=6).frozen_logits()
    ones = [delta_point(1.0, anchor).log_probabilities(logits, 1.0) for anchor in ("teacher", "student")]
    halves = [delta_point(0.5, anchor).log_probabilities(logits, 1.0) for anchor in ("teacher", "student")]
    torch.testing.assert_close(*ones, rtol=1e-12, atol=1e-12)
    assert (halves[0] - halves[1]).abs().max() > 0.1


def test_without_a_shift_the_target_is_the_raw_student():
    logits = Case(seed=7).frozen_logits()
    logits["teacher_raw"] = logits["teacher"]
    raw = Point({"student_raw": 1.0}).log_probabilities(logits, 1.0)
    for point in (delta_point(1.0, "teacher"), delta_point(0.3, "student")):
        torch.testing.assert_close(point.log_probabilities(logits, 1.0), raw, rtol=1e-12, atol=1e-12)


def test_no_supervised_token_gives_zero_loss_and_zero_gradients():
    case = Case(seed=8, num_tokens=0)
    result = linear_loss(case.hidden, case.head, case.pairs, case.labels, objective({"target": {"name": "teacher"}}))
    grads = torch.autograd.grad(result.total, (case.hidden, case.head))
    assert result.total == 0 and grads[0].shape == (0, HIDDEN) and (grads[1] == 0).all()


def test_sixteen_bit_inputs_give_the_float32_loss_within_their_rounding():
    """bf16 keeps 8 bits: products of 16 terms are off by about 1%, their mean over 50 tokens by less."""
    case = Case(seed=9)
    loss = objective({"target": {"name": "teacher"}})
    pair = {"teacher": case.pairs["teacher"]}
    exact = linear_loss(case.hidden, case.head, pair, case.labels, loss).total
    short = {"teacher": tuple(part.bfloat16() for part in case.pairs["teacher"])}
    rounded = linear_loss(case.hidden.bfloat16(), case.head.bfloat16(), short, case.labels, loss).total
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
