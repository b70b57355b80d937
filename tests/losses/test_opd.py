"""Golden numbers of on-policy distillation: G-OPD with ExOPD (2602.12125) and OPD^2 (2607.15161), exact and sampled.

A sampled form is summed over every token of the vocabulary at its probability, so that it has no noise, and compared
with the gradient of what the paper maximises, worked here by autograd in float64; nothing of deltakd computes that.
Where a mistake is near at hand, its gradient stands beside the right one and must be far from it.
"""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from deltakd.losses import objective
from deltakd.losses.policy import Draws, returns, rewards
from tests.losses.golden import COEFFICIENTS, FAR, LOGITS, PLAIN

VOCAB = 5
LAMBDAS = [0.5, 1.0, 1.25, 2.0]
Weights = Mapping[str, float]
SHIFT = {"teacher": 1.0, "teacher_raw": -1.0}


def logits() -> dict[str, Tensor]:
    found = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in LOGITS.items()}
    found["student"].requires_grad_()
    return found


def log_probs(z: Tensor) -> Tensor:
    return z - z.exp().sum(-1, keepdim=True).log()


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def is_far(found: Tensor, mistake: Tensor) -> bool:
    return (found - mistake).abs().max().item() > FAR


def expectation(weights: Weights, kept: str | None = None) -> tuple[Tensor, Tensor]:
    """Minus E_q[sum of weights * log-probabilities], plus KL(q, kept): value per token, and gradient."""
    z = logits()
    log_q = log_probs(z["student"])
    values = -(log_q.exp() * sum(weight * log_probs(z[name]) for name, weight in weights.items())).sum(-1)
    if kept is not None:
        values = values + (log_q.exp() * (log_q - log_probs(z[kept]))).sum(-1)
    return values.detach(), torch.autograd.grad((COEFFICIENTS * values).sum(), z["student"])[0]


def log_normaliser(weights: Weights) -> Tensor:
    """Of a point whose log-probabilities are summed, per token."""
    z = logits()
    return sum(weight * log_probs(z[name]) for name, weight in weights.items()).exp().sum(-1).log()


def exact(target: dict, divergence: str, **block) -> tuple[Tensor, Tensor]:
    z = logits()
    values = objective({"target": target, "divergence": divergence, **block}).per_token(z)
    return values.detach(), torch.autograd.grad((COEFFICIENTS * values).sum(), z["student"])[0]


def mixture(**weights: float) -> dict:
    return {"name": "mixture", "weights": weights}


def sampled(
    reward: Weights, scale: float = 1.0, constant: float = 0.0, target: dict | None = None, weight: float = 0.0
) -> Tensor:
    """The gradient of the sampled form, every token of the vocabulary being drawn at its probability."""
    block = PLAIN | {"reward": dict(reward), "reward_scale": scale, "divergence_weight": weight}
    divergence = {"target": target or "teacher", "divergence": "reverse_kl"}
    loss = objective({**divergence, "policy_gradient": block})
    settings = loss.settings.policy_gradient
    z = logits()
    rows = {name: values.repeat_interleave(VOCAB, 0) for name, values in z.items()}
    ids = torch.arange(VOCAB).repeat(3)
    drawn = {name: log_probs(values)[range(3 * VOCAB), ids].detach() for name, values in rows.items()}
    # One answer of fifteen tokens: without a discount none reaches another.
    earned = rewards({name: drawn[name] for name in reward}, settings)
    advantages = returns(earned, torch.tensor([3 * VOCAB]), settings)
    assert_equal(advantages, scale * sum(share * drawn[name] for name, share in reward.items()))
    draws = Draws(log_probs=drawn["student"], weights=torch.ones_like(earned), advantages=advantages + constant)
    per_token = loss.per_token(rows, ids, draws=draws)
    mean = (COEFFICIENTS.repeat_interleave(VOCAB) * drawn["student"].exp() * per_token).sum()
    return torch.autograd.grad(mean, z["student"])[0]


class TestOpd:
    """Plain on-policy distillation: reward log p - log q of the drawn token."""

    def test_the_sampled_form_has_the_gradient_of_reverse_kl(self):
        found = sampled({"teacher": 1.0, "student": -1.0})
        assert is_far(found, expectation({"teacher": 1.0})[1])  # the entropy is gone without the student's own reward
        values, grad = expectation({"teacher": 1.0, "student": -1.0})
        assert_equal(found, grad)
        mine, slope = exact({"name": "teacher"}, "reverse_kl")
        assert_equal(mine, values)
        assert_equal(slope, grad)

    def test_a_constant_reward_teaches_nothing(self):
        """E_q of the gradient of log q is 0: why no normaliser matters where no return sums several tokens."""
        reward = {"teacher": 1.0, "student": -1.0}
        assert_equal(sampled(reward, constant=7.0), sampled(reward))


# How the target is written, by lam; the reference of the reward; that of the KL.
CASES = {
    "two references": (
        lambda lam: {"name": "delta", "anchor": "student", "alpha": lam},
        "teacher_raw",
        "student_raw",
    ),
    "raw student": (lambda lam: mixture(student_raw=1 - lam, teacher=lam), "student_raw", "student_raw"),
    "raw teacher": (lambda lam: mixture(teacher_raw=1 - lam, teacher=lam), "teacher_raw", "teacher_raw"),
}


class TestGOpd:
    """Maximise lam E_q[log t* - log ref] - KL(q, ref'); lam above 1 is ExOPD. Its optimum is ref' (t* / ref)^lam."""

    @pytest.mark.parametrize("lam", LAMBDAS)
    @pytest.mark.parametrize("case", CASES)
    def test_the_exact_form_is_reverse_kl_to_the_optimum_up_to_a_constant(self, case, lam):
        target, ref, kept = CASES[case]
        values, grad = exact(target(lam), "reverse_kl")
        expected, slope = expectation({"teacher": lam, ref: -lam}, kept)
        optimum = {"teacher": lam, ref: 1 - lam} if ref == kept else {"teacher": lam, ref: -lam, kept: 1.0}
        assert_equal(values, expected + log_normaliser(optimum))
        assert_equal(grad, slope)

    @pytest.mark.parametrize("lam", LAMBDAS)
    @pytest.mark.parametrize("case", CASES)
    def test_the_sampled_form_has_its_gradient(self, case, lam):
        target, ref, kept = CASES[case]
        if ref == kept:
            reward = {"teacher": lam, ref: 1 - lam, "student": -1.0}
        else:
            reward = {"teacher": lam, ref: -lam, kept: 1.0, "student": -1.0}
        found = sampled(reward)
        assert_equal(found, expectation({"teacher": lam, ref: -lam}, kept)[1])
        assert_equal(found, exact(target(lam), "reverse_kl")[1])

    def test_at_lambda_one_with_one_reference_it_is_plain_distillation(self):
        plain = expectation({"teacher": 1.0, "student": -1.0})[1]
        for case in ("raw student", "raw teacher"):
            assert_equal(exact(CASES[case][0](1.0), "reverse_kl")[1], plain)

    def test_lambda_scales_the_reward_alone_and_the_references_are_not_each_other(self):
        right = sampled({"teacher": 1.25, "teacher_raw": -1.25, "student_raw": 1.0, "student": -1.0})
        assert is_far(right, expectation(SHIFT, "student_raw")[1])  # lambda left out
        assert is_far(right, 1.25 * expectation(SHIFT, "student_raw")[1])  # on the KL too
        raw_student, raw_teacher = ({"teacher": 1.25, name: -1.25} for name in ("student_raw", "teacher_raw"))
        assert is_far(right, expectation(raw_student, "student_raw")[1])
        assert is_far(right, expectation(raw_teacher, "teacher_raw")[1])
        assert is_far(right, expectation(raw_student, "teacher_raw")[1])


class TestOpdSquared:
    """Maximise E_q[log t* - log t]: the shift itself is the reward, and nothing holds the student."""

    def test_the_exact_form_is_reverse_cross_entropy_to_the_shift_up_to_a_constant(self):
        values, grad = exact(mixture(**SHIFT), "reverse_cross_entropy")
        expected, slope = expectation(SHIFT)
        assert_equal(values, expected + log_normaliser(SHIFT))
        assert_equal(grad, slope)

    def test_the_sampled_form_has_its_gradient(self):
        found = sampled(SHIFT)
        assert_equal(found, expectation(SHIFT)[1])
        assert_equal(found, exact(mixture(**SHIFT), "reverse_cross_entropy")[1])

    def test_reverse_kl_to_the_shift_is_another_objective(self):
        """It holds the student's entropy as well; the reward of the student's own log-probability is what adds it."""
        found = sampled(SHIFT)
        with_entropy = exact(mixture(**SHIFT), "reverse_kl")[1]
        assert is_far(found, with_entropy)
        assert_equal(sampled({**SHIFT, "student": -1.0}), with_entropy)

    @pytest.mark.parametrize("lam", LAMBDAS)
    def test_with_kl_to_the_raw_student_it_is_g_opd(self, lam):
        """The divergence beside the policy loss is exact; the reward's scale is lambda."""
        found = sampled(SHIFT, scale=lam, target=mixture(student_raw=1.0), weight=1.0)
        delta = {"name": "delta", "anchor": "student", "alpha": lam}
        assert_equal(found, exact(delta, "reverse_kl")[1])
        half = sampled(SHIFT, scale=lam, target=mixture(student_raw=1.0), weight=0.5)
        assert is_far(half, found)


class TestReverseCrossEntropy:
    """D = -sum q log P."""

    @staticmethod
    def worked(temperature: float) -> tuple[Tensor, Tensor]:
        z = logits()
        log_p, log_q = (log_probs(z[name] / temperature) for name in ("teacher", "student"))
        values = []
        for q_row, p_row in zip(log_q.exp(), log_p, strict=True):
            values.append(-sum(q * log_p for q, log_p in zip(q_row, p_row, strict=True)))
        per_token = torch.stack(values)
        return per_token.detach(), torch.autograd.grad((COEFFICIENTS * per_token).sum(), z["student"])[0]

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_value_and_gradient(self, temperature):
        found = exact({"name": "teacher"}, "reverse_cross_entropy", temperature=temperature)
        for mine, expected in zip(found, self.worked(temperature), strict=True):
            assert_equal(mine, expected)

    def test_it_is_reverse_kl_plus_the_student_s_entropy_and_not_the_cross_entropy_from_the_target(self):
        log_q, log_p = (log_probs(logits()[name]).detach() for name in ("student", "teacher"))
        values, grad = exact({"name": "teacher"}, "reverse_cross_entropy")
        reverse, slope = exact({"name": "teacher"}, "reverse_kl")
        assert_equal(values, reverse - (log_q.exp() * log_q).sum(-1))
        assert is_far(grad, slope)
        assert is_far(values, -(log_p.exp() * log_q).sum(-1))

    def test_at_equality_it_is_the_entropy_and_its_gradient_sharpens_the_student(self):
        z = logits()
        z["teacher"] = z["student"].detach().clone()
        values = objective({"divergence": "reverse_cross_entropy"}).per_token(z)
        (grad,) = torch.autograd.grad(values.sum(), z["student"])
        log_q = log_probs(z["student"]).detach()
        entropy = -(log_q.exp() * log_q).sum(-1)
        assert_equal(values.detach(), entropy)
        assert_equal(grad, -log_q.exp() * (log_q + entropy[:, None]))
        assert (grad.argmin(-1) == log_q.argmax(-1)).all() and is_far(grad, torch.zeros_like(grad))
