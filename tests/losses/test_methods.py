"""Golden numbers of the published methods that compare whole distributions: GKD, DistiLLM, TAID, AKL.

Every expected number is worked here from the paper's formula, token by token in float64; gradients are autograd's
through that formula. Nothing of deltakd computes one. Where a mistake is known from other projects, its number stands
beside the right one and must be far from it. Methods that
draw: test_minillm.py, test_opd.py.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deltakd.losses import objective
from deltakd.losses.schedules import TaidAlpha
from deltakd.losses.settings import TaidTarget
from tests.losses.golden import COEFFICIENTS, FAR, LOGITS

Formula = Callable[[int, Tensor], Tensor]  # (token, the student's logits [V] there) -> its loss


def logits() -> dict[str, Tensor]:
    found = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in LOGITS.items()}
    found["student"].requires_grad_()
    return found


def softmax(z: Tensor) -> Tensor:
    """The definition, one token of the vocabulary at a time."""
    weights = [value.exp() for value in z]
    return torch.stack([weight / sum(weights) for weight in weights])


def frozen(name: str, token: int) -> Tensor:
    return softmax(torch.tensor(LOGITS[name][token], dtype=torch.float64))


def kl(a: Tensor, b: Tensor) -> Tensor:
    return sum((x * (x.log() - y.log()) for x, y in zip(a, b, strict=True)), start=torch.zeros((), dtype=a.dtype))


def entropy(a: Tensor) -> Tensor:
    return -sum((x * x.log() for x in a), start=torch.zeros((), dtype=a.dtype))


def mix(a: Tensor, b: Tensor, share: float) -> Tensor:
    return torch.stack([share * x + (1 - share) * y for x, y in zip(a, b, strict=True)])


def worked(formula: Formula) -> tuple[Tensor, Tensor]:
    """The loss of each token by the formula, and its gradient for the student's logits, tokens weighed apart."""
    student = logits()["student"]
    values = torch.stack([formula(token, row) for token, row in enumerate(student)])
    (grad,) = torch.autograd.grad((COEFFICIENTS * values).sum(), student)
    return values.detach(), grad


def computed(block: dict, t: float | None = None) -> tuple[Tensor, Tensor]:
    """The same two of the project's objective."""
    z = logits()
    loss = objective(block)
    values = (loss if t is None else loss.at(t)).per_token(z)
    (grad,) = torch.autograd.grad((COEFFICIENTS * values).sum(), z["student"])
    return values.detach(), grad


def assert_golden(found: tuple[Tensor, Tensor], formula: Formula) -> None:
    for mine, expected in zip(found, worked(formula), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-13)


def assert_far(found: tuple[Tensor, Tensor], mistake: Formula, value: bool = True) -> None:
    """The mistake would show in the gradient and, unless it leaves values alone, in the values."""
    values, grad = worked(mistake)
    assert not value or (found[0] - values).abs().max() > FAR
    assert (found[1] - grad).abs().max() > FAR


class TestGkd:
    """Agarwal et al., 2306.13649: D = beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q, p the teacher."""

    @staticmethod
    def formula(beta: float) -> Formula:
        def jsd(token: int, z: Tensor) -> Tensor:
            p, q = frozen("teacher", token), softmax(z)
            m = mix(p, q, beta)
            return beta * kl(p, m) + (1 - beta) * kl(q, m)

        return jsd

    @pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
    def test_it_is_the_generalised_jsd(self, beta):
        found = computed({"divergence": {"name": "jsd", "beta": beta}})
        assert_golden(found, self.formula(beta))

    def test_beta_is_the_teacher_s_share_and_not_the_student_s(self):
        assert_far(computed({"divergence": {"name": "jsd", "beta": 0.1}}), self.formula(0.9))

    def test_over_beta_it_goes_to_forward_kl_and_over_one_minus_beta_to_reverse_kl(self):
        """The paper's limits; what is left at 1e-6 from either end is of that order."""
        low, high = (computed({"divergence": {"name": "jsd", "beta": beta}}) for beta in (1e-6, 1 - 1e-6))
        forward = worked(lambda token, z: kl(frozen("teacher", token), softmax(z)))
        reverse = worked(lambda token, z: kl(softmax(z), frozen("teacher", token)))
        for mine, expected in zip(low + high, forward + reverse, strict=True):
            torch.testing.assert_close(mine / 1e-6, expected, rtol=1e-4, atol=1e-5)

    def test_with_a_share_of_cross_entropy_both_are_weighed(self):
        z, labels = logits(), torch.tensor([4, 0, 2])
        values = objective({"divergence": {"name": "jsd", "beta": 0.3}, "sft_weight": 0.25}).per_token(z, labels)
        (grad,) = torch.autograd.grad((COEFFICIENTS * values).sum(), z["student"])

        def both(token: int, row: Tensor) -> Tensor:
            return -0.25 * softmax(row)[labels[token]].log() + 0.75 * self.formula(0.3)(token, row)

        assert_golden((values.detach(), grad), both)


class TestDistillm:
    """Ko et al., 2402.03898: skew KL(p, lam p + (1 - lam) q), skew reverse KL(q, lam q + (1 - lam) p), lam 0.1."""

    @staticmethod
    def skew(lam: float) -> Formula:
        return lambda token, z: kl(frozen("teacher", token), mix(frozen("teacher", token), softmax(z), lam))

    @staticmethod
    def skew_reverse(lam: float) -> Formula:
        return lambda token, z: kl(softmax(z), mix(softmax(z), frozen("teacher", token), lam))

    @pytest.mark.parametrize("lam", [0.1, 0.35])
    def test_both_skews(self, lam):
        assert_golden(computed({"divergence": {"name": "skew_kl", "lam": lam}}), self.skew(lam))
        assert_golden(computed({"divergence": {"name": "skew_reverse_kl", "lam": lam}}), self.skew_reverse(lam))

    def test_a_tenth_is_the_default(self):
        assert_golden(computed({"divergence": "skew_kl"}), self.skew(0.1))
        assert_golden(computed({"divergence": "skew_reverse_kl"}), self.skew_reverse(0.1))

    def test_the_skew_is_the_first_argument_s_and_the_two_directions_differ(self):
        forward, reverse = (computed({"divergence": name}) for name in ("skew_kl", "skew_reverse_kl"))
        assert_far(forward, self.skew(0.9))
        assert_far(reverse, self.skew_reverse(0.9))
        assert_far(forward, self.skew_reverse(0.1))

    def test_the_student_inside_the_skew_of_reverse_kl_carries_gradient(self):
        """DistiLLM-2 holds it fixed there; DistiLLM does not. The value is the same."""

        def held(token: int, z: Tensor) -> Tensor:
            return kl(softmax(z), mix(softmax(z).detach(), frozen("teacher", token), 0.1))

        assert_far(computed({"divergence": "skew_reverse_kl"}), held, value=False)

    def test_its_code_reports_the_cross_entropy_form_which_is_larger_by_the_teacher_s_entropy(self):
        def cross_entropy(token: int, z: Tensor) -> Tensor:
            p = frozen("teacher", token)
            m = mix(p, softmax(z), 0.1)
            return -sum((x * y.log() for x, y in zip(p, m, strict=True)), start=torch.zeros((), dtype=p.dtype))

        (values, grad), (reported, same) = computed({"divergence": "skew_kl"}), worked(cross_entropy)
        entropies = torch.stack([entropy(frozen("teacher", token)) for token in range(3)])
        torch.testing.assert_close(values + entropies, reported, rtol=1e-10, atol=0)
        torch.testing.assert_close(grad, same, rtol=1e-10, atol=1e-13)


class TestTaid:
    """Shing et al., 2501.16937: KL(p_t, q), p_t = softmax((1 - t) sg(z_student) + t z_teacher); t follows the loss."""

    @staticmethod
    def formula(t: float, held: bool = True) -> Formula:
        def taid(token: int, z: Tensor) -> Tensor:
            own = z.detach() if held else z
            teacher = torch.tensor(LOGITS["teacher"][token], dtype=torch.float64)
            return kl(
                softmax(torch.stack([(1 - t) * x + t * y for x, y in zip(own, teacher, strict=True)])), softmax(z)
            )

        return taid

    @pytest.mark.parametrize("t", [0.0, 0.4, 0.73, 1.0])
    def test_the_target_lies_between_the_student_s_logits_and_the_teacher_s(self, t):
        assert_golden(computed({"target": "taid"}, t), self.formula(t))

    def test_t_starts_at_two_fifths(self):
        assert_golden(computed({"target": "taid"}), self.formula(0.4))

    def test_the_student_in_the_target_carries_no_gradient(self):
        assert_far(computed({"target": "taid"}, 0.4), self.formula(0.4, held=False), value=False)

    def test_logits_are_interpolated_and_not_probabilities(self):
        def probabilities(token: int, z: Tensor) -> Tensor:
            return kl(mix(softmax(z).detach(), frozen("teacher", token), 1 - 0.4), softmax(z))

        assert_far(computed({"target": "taid"}, 0.4), probabilities)

    LOSSES = (2.0, 1.5, 1.8, 0.6, 0.55, 0.3, 0.31, 0.1)

    def run(self, start: float, end: float, rate: float, momentum: float, num_steps: int) -> list[float]:
        target = TaidTarget(name="taid", start=start, end=end, rate=rate, momentum=momentum)
        alpha, found = TaidAlpha(target, num_steps), []
        for step, loss in enumerate(self.LOSSES, start=1):
            found.append(alpha.at(step))
            alpha.observe(loss)
        return found

    def worked_schedule(self, start: float, end: float, rate: float, momentum: float, num_steps: int) -> list[float]:
        """The paper's update after every step but the first, which has nothing to compare its loss with."""
        t, average, found = start, 0.0, []
        for step, loss in enumerate(self.LOSSES, start=1):
            line = start + (end - start) * (step - 1) / (num_steps - 1)
            if step > 2:
                before, last = self.LOSSES[step - 3], self.LOSSES[step - 2]
                average = momentum * average + (1 - momentum) * (before - last) / before
                t += rate / (1 + math.exp(-average)) * (1 - t)
            t = min(end, max(line, t))
            found.append(t)
            assert loss > 0
        return found

    @pytest.mark.parametrize(
        "start, end, rate, momentum, num_steps",
        [
            (0.4, 1.0, 0.3, 0.9, 1000),  # the loss is ahead of the line
            (0.2, 0.9, 0.01, 0.5, 8),  # the line is ahead of the loss
            (0.1, 0.9, 0.22, 0.0, 10),  # now the one, now the other
            (0.3, 0.6, 0.5, 0.99, 50),  # the end is reached and kept
        ],
    )
    def test_t_follows_the_loss_and_is_never_below_the_line(self, start, end, rate, momentum, num_steps):
        setup = (start, end, rate, momentum, num_steps)
        found = self.run(*setup)
        assert found == pytest.approx(self.worked_schedule(*setup), rel=1e-10, abs=0)
        assert found == sorted(found) and found[-1] <= end

    def test_the_relative_fall_is_averaged_and_what_is_left_of_the_way_counts(self):
        # So many steps that the line stays at 0.4; after two changes, a fall of 1/4 and a rise of 1/5.
        found = self.run(0.4, 1.0, 0.3, 0.9, 10**12)[3]
        average = 0.9 * 0.1 * 0.25 - 0.1 * 0.2
        second = 0.4 + 0.3 / (1 + math.exp(-0.1 * 0.25)) * 0.6
        assert found == pytest.approx(second + 0.3 / (1 + math.exp(-average)) * (1 - second), rel=1e-10)
        assert abs(found - (second + 0.3 / (1 + math.exp(0.2)) * (1 - second))) > FAR  # the last change alone
        assert abs(found - (second + 0.3 / (1 + math.exp(-average)))) > FAR  # without what is left of the way


class TestAkl:
    """Wu et al., 2404.02657: forward and reverse KL by the gap |p - q| on the head and the tail of the teacher."""

    # One token, written as probabilities; the most probable come second and fourth.
    P = (0.05, 0.40, 0.10, 0.30, 0.15)
    Q = (0.30, 0.20, 0.25, 0.15, 0.10)

    def found(self, mu: float) -> tuple[float, Tensor]:
        student = torch.tensor([self.Q], dtype=torch.float64).log().requires_grad_()
        teacher = torch.tensor([self.P], dtype=torch.float64).log()
        loss = objective({"divergence": {"name": "adaptive_kl", "mu": mu}})
        value = loss.per_token({"student": student, "teacher": teacher})
        (grad,) = torch.autograd.grad(value.sum(), student)
        return value.item(), grad[0]

    def expected(self, head: set[int], attached: bool = False) -> tuple[float, Tensor]:
        z = torch.tensor(self.Q, dtype=torch.float64).log().requires_grad_()
        p, q = torch.tensor(self.P, dtype=torch.float64), softmax(z)
        gaps = [(x - y).abs() if attached else (x - y).abs().detach() for x, y in zip(p, q, strict=True)]
        on_head = sum(gap for token, gap in enumerate(gaps) if token in head)
        on_tail = sum(gap for token, gap in enumerate(gaps) if token not in head)
        value = (on_head * kl(p, q) + on_tail * kl(q, p)) / (on_head + on_tail)
        (grad,) = torch.autograd.grad(value, z)
        return value.item(), grad

    # 0.40 < 0.5 <= 0.70; 0.70 < 0.8 <= 0.85; 0.3 <= 0.40
    @pytest.mark.parametrize("mu, head", [(0.3, {1}), (0.5, {1, 3}), (0.8, {1, 3, 4}), (0.9, {1, 2, 3, 4})])
    def test_the_head_is_the_fewest_tokens_of_the_teacher_that_hold_mu(self, mu, head):
        value, grad = self.found(mu)
        expected, slope = self.expected(head)
        assert value == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(grad, slope, rtol=1e-10, atol=1e-13)

    def test_by_hand(self):
        """Gaps 0.25, 0.2, 0.15, 0.15, 0.05: 0.35 on the head, 0.45 on the tail."""
        forward = sum(p * math.log(p / q) for p, q in zip(self.P, self.Q, strict=True))
        reverse = sum(q * math.log(q / p) for p, q in zip(self.P, self.Q, strict=True))
        assert self.found(0.5)[0] == pytest.approx((0.35 * forward + 0.45 * reverse) / 0.8, rel=1e-10)
        # A mask made in the sorted order and laid over unsorted gaps takes the first two tokens for the head.
        assert abs(self.found(0.5)[0] - (0.45 * forward + 0.35 * reverse) / 0.8) > FAR
        assert self.expected({0, 1})[0] == pytest.approx((0.45 * forward + 0.35 * reverse) / 0.8, rel=1e-10)

    def test_the_gaps_carry_no_gradient(self):
        value, slope = self.expected({1, 3}, attached=True)
        found, grad = self.found(0.5)
        assert found == pytest.approx(value, rel=1e-10) and (grad - slope).abs().max() > FAR
