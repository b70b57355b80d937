"""Top k and draws: what they are exact for, which way they err, and that their gradients are those of what they say."""

import pytest
import torch
from torch import Tensor

from deltakd.losses import Sampled, TopK, linear_loss, objective
from deltakd.losses.divergences import DIVERGENCES

NUM_TOKENS, HIDDEN, VOCAB = 20, 8, 50


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head, and the target's log-probabilities."""
    generator = torch.Generator().manual_seed(1)
    draw = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((NUM_TOKENS, HIDDEN), (VOCAB, HIDDEN))
    ]
    log_p = (2 * torch.randn(NUM_TOKENS, VOCAB, generator=generator, dtype=torch.float64)).log_softmax(-1)
    return draw[0].requires_grad_(), draw[1].requires_grad_(), log_p


def top_k(log_p: Tensor, k: int, tail: bool = True) -> TopK:
    values, ids = log_p.topk(k)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return TopK(ids, values, rest if tail else None)


def buckets(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Plain autograd's k + 1 outcomes."""
    inside = log_probs.gather(-1, ids)
    return torch.cat([inside, (1 - inside.exp().sum(-1, keepdim=True)).log()], -1)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("k", [1, 5])
def test_top_k_with_a_tail_is_the_divergence_over_k_and_one_outcomes(case, divergence, k):
    hidden, head, log_p = case
    payload = top_k(log_p, k)
    loss = objective({"divergence": divergence})
    result = linear_loss(hidden, head, {"target": payload}, None, loss, 7)
    student = torch.log_softmax(hidden @ head.T, -1)
    plain = loss.per_token({"teacher": buckets(log_p, payload.ids), "student": buckets(student, payload.ids)}).sum()
    torch.testing.assert_close(result.total, plain, rtol=1e-10, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(result.total, (hidden, head)), torch.autograd.grad(plain, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
    masses = result.token("target_top_k"), result.token("student_top_k")
    for mass, logs in zip(masses, (log_p, student.detach()), strict=True):
        torch.testing.assert_close(mass, logs.gather(-1, payload.ids).exp().sum(-1))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl"])
def test_top_k_with_a_tail_never_exceeds_the_whole_divergence_and_grows_with_k(case, divergence):
    hidden, head, log_p = case
    loss = objective({"divergence": divergence})
    values = [
        linear_loss(hidden, head, {"target": top_k(log_p, k)}, None, loss).total.item()
        for k in (1, 2, 8, 32, VOCAB - 1)
    ]
    whole = linear_loss(hidden, head, {"target": log_p}, None, loss).total.item()
    assert values == sorted(values) and values[-1] == pytest.approx(whole, rel=1e-10)


def test_a_target_without_mass_outside_its_top_k_and_a_student_without_any_there_stay_finite(case):
    hidden, head, log_p = case
    certain = top_k(log_p, 4)
    certain = TopK(certain.ids, certain.log_probs.log_softmax(-1), torch.full((NUM_TOKENS,), -torch.inf))
    renormalised = TopK(certain.ids, certain.log_probs)
    sure = head * 0
    sure[:4] = 1e4 * torch.eye(4, HIDDEN, dtype=torch.float64)  # the student is sure of one of the first four tokens
    four = TopK(torch.arange(4).expand(NUM_TOKENS, 4), certain.log_probs, torch.full((NUM_TOKENS,), -3.0))
    for divergence in DIVERGENCES:
        loss = objective({"divergence": divergence})
        one, other = (linear_loss(hidden, head, {"target": part}, None, loss).total for part in (certain, renormalised))
        assert torch.isfinite(one) and one.item() == pytest.approx(other.item(), rel=1e-12)
        far = linear_loss(
            hidden.detach().abs().requires_grad_(), sure.detach().requires_grad_(), {"target": four}, None, loss
        )
        assert torch.isfinite(far.total)
        far.total.backward()


def test_a_student_equal_to_the_target_is_at_zero_whatever_the_k(case):
    hidden, head, _ = case
    log_p = torch.log_softmax(hidden @ head.T, -1).detach()
    for divergence in set(DIVERGENCES) - {"reverse_cross_entropy"}:  # that is an entropy there
        result = linear_loss(hidden, head, {"target": top_k(log_p, 4)}, None, objective({"divergence": divergence}))
        grads = torch.autograd.grad(result.total, (hidden, head))
        assert abs(result.total.item()) < 1e-12
        # The slope of |p - q| jumps at p = q: the last bit of a sum decides its sign there.
        assert divergence == "tvd" or all(grad.abs().max() < 1e-12 for grad in grads)


def test_a_renormalised_top_k_pulls_all_mass_onto_its_tokens(case):
    hidden, head, log_p = case
    payload = top_k(log_p, 5, tail=False)
    result = linear_loss(hidden, head, {"target": payload}, None, objective({}))
    student = torch.log_softmax(hidden @ head.T, -1)
    inside = payload.log_probs.log_softmax(-1)
    plain = (inside.exp() * (inside - student.gather(-1, payload.ids))).sum()
    torch.testing.assert_close(result.total, plain, rtol=1e-10, atol=0)
    (mine,), (other,) = torch.autograd.grad(result.total, hidden), torch.autograd.grad(plain, hidden)
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


def expected_again(case):
    hidden, head, log_p = case
    return linear_loss(hidden, head, {"target": log_p}, None, objective({}))


def test_draws_estimate_the_gradient_of_forward_kl_without_bias(case):
    """All tokens at their probabilities are the expectation; a share of draws is what its counts say."""
    hidden, head, log_p = case
    ids = torch.arange(VOCAB).expand(NUM_TOKENS, VOCAB)
    expected = linear_loss(hidden, head, {"target": log_p}, None, objective({}))
    mean = linear_loss(hidden, head, {"target": Sampled(ids, log_p.exp())}, None, objective({}), 7)
    for mine, other in zip(
        torch.autograd.grad(mean.total, (hidden, head)),
        torch.autograd.grad(expected.total, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
    doubled = linear_loss(hidden, head, {"target": Sampled(ids, 2 * log_p.exp())}, None, objective({}))
    (twice,), (once,) = (torch.autograd.grad(loss.total, hidden) for loss in (doubled, expected_again(case)))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-9, atol=1e-11)
    draws = torch.multinomial(log_p.exp(), 6, replacement=True, generator=torch.Generator().manual_seed(2))
    result = linear_loss(hidden, head, {"target": Sampled(draws)}, None, objective({}))
    plain = -torch.log_softmax(hidden @ head.T, -1).gather(-1, draws).mean(-1).sum()
    torch.testing.assert_close(result.total, plain, rtol=1e-10, atol=0)
    (mine,), (other,) = torch.autograd.grad(result.total, hidden), torch.autograd.grad(plain, hidden)
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
