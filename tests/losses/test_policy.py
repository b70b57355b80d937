"""Golden numbers of a policy gradient's parts, as MiniLLM (Gu et al., 2306.08543) writes them.

Rewards, returns, whitening and the clipped loss, one at a time. Every expected number is worked here from the paper's
formula in float64; nothing of deltakd computes one. Where a mistake is known from other projects, its number stands
beside the right one and must be far from it. All of them together: test_minillm.py.
"""

import math

import pytest
import torch
from torch import Tensor

from deltakd.losses import objective
from deltakd.losses.policy import Draws, returns, rewards, whiten
from tests.losses.golden import FAR, PLAIN, assert_equal, drawn, kl, policy, worked_returns


def block(**changes):
    return policy(**changes).settings.policy_gradient


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class TestRewards:
    """r = (log p(y) - log q(y)) / 0.5, clipped to +-100."""

    LOG_P, LOG_Q = numbers(-0.5, -3.0, -120.0, -0.1, -80.0), numbers(-1.5, -0.25, -1.0, -99.0, -20.0)

    def test_they_are_scaled_first_and_clipped_then(self):
        found = rewards({"teacher": self.LOG_P, "student": self.LOG_Q}, block(reward_scale=2.0, reward_clip=100.0))
        assert_equal(found, numbers(2.0, -5.5, -100.0, 100.0, -100.0))
        clipped_first = [2 * max(-100.0, min(100.0, p - q)) for p, q in zip(self.LOG_P, self.LOG_Q, strict=True)]
        assert abs(found[2] - clipped_first[2]) > FAR and abs(found[4] - clipped_first[4]) > FAR
        assert abs(found[0] - (self.LOG_P - self.LOG_Q)[0] / 2) > FAR  # divided by what multiplies
        whole = rewards({"teacher": self.LOG_P, "student": self.LOG_Q}, block(reward_scale=2.0))
        assert_equal(whole, numbers(2.0, -5.5, -238.0, 197.8, -120.0))

    def test_they_take_any_weights_of_any_models(self):
        names = ("teacher", "teacher_raw", "student_raw", "student")
        logs = {name: -drawn(seed, 7).abs() for seed, name in enumerate(names)}
        weights = {"teacher": 1.25, "teacher_raw": -1.25, "student_raw": 1.0, "student": -1.0}
        expected = [
            0.5 * sum(weight * logs[name][token].item() for name, weight in weights.items()) for token in range(7)
        ]
        assert_equal(rewards(logs, block(reward=weights, reward_scale=0.5)), numbers(*expected))

    def test_logits_without_their_normaliser_give_other_returns(self):
        """At one token the normaliser is a constant that no gradient sees; in a sum over later tokens it is not."""
        z, ids = {"teacher": drawn(1, 4, 6), "student": 2 * drawn(2, 4, 6)}, torch.tensor([5, 0, 3, 2])
        settings, lengths = block(discount=1.0), torch.tensor([4])
        logs, raw = (
            {name: rows[range(4), ids] for name, rows in part.items()}
            for part in ({name: rows - rows.exp().sum(-1, keepdim=True).log() for name, rows in z.items()}, z)
        )
        found = returns(rewards(logs, settings), lengths, settings)
        one_by_one = [(logs["teacher"][t] - logs["student"][t]).item() for t in range(4)]
        assert_equal(found, numbers(*(sum(one_by_one[t:]) for t in range(4))))
        assert ((found - returns(rewards(raw, settings), lengths, settings)).abs() > FAR).all()


class TestReturns:
    REWARDS = (0.7, -1.2, 2.5, 0.4, -3.1, 1.6, 0.9, -0.8)

    @pytest.mark.parametrize("lengths", [[8], [3, 1, 4], [1, 1, 6]])
    @pytest.mark.parametrize("discount", [0.0, 0.5, 0.95, 1.0])
    @pytest.mark.parametrize("own", [True, False])
    @pytest.mark.parametrize("normalised", [True, False])
    def test_they_are_the_discounted_sums_within_each_answer(self, lengths, discount, own, normalised):
        settings = block(discount=discount, own_reward=own, length_normalised=normalised)
        found = returns(numbers(*self.REWARDS), torch.tensor(lengths), settings)
        assert_equal(found, numbers(*worked_returns(list(self.REWARDS), lengths, discount, own, normalised)))

    @pytest.mark.parametrize(
        "own, normalised, expected",
        [
            (True, False, (3.0, 4.0, 4.0)),  # 1 + 2/2 + 4/4, 2 + 4/2, 4
            (True, True, (1.0, 2.0, 4.0)),  # over 3, 2, 1
            (False, False, (4.0, 4.0, 0.0)),  # 2 + 4/2, 4, nothing
            (False, True, (2.0, 4.0, 0.0)),  # over 2, 1, and never 0
        ],
    )
    def test_by_hand(self, own, normalised, expected):
        settings = block(discount=0.5, own_reward=own, length_normalised=normalised)
        found = returns(numbers(1.0, 2.0, 4.0), torch.tensor([3]), settings)
        assert_equal(found, numbers(*expected))
        # The power of a token's place in the answer, where that of its distance belongs.
        first = 0 if own else 1
        by_place = [sum(0.5**later * (1.0, 2.0, 4.0)[later] for later in range(t + first, 3)) for t in range(3)]
        assert normalised or (found - numbers(*by_place)).abs().max() > FAR
        whole_length = numbers(3.0, 4.0, 4.0) / 3  # the answer's length, where what remains of it belongs
        assert (found - whole_length).abs().max() > FAR

    @pytest.mark.parametrize("own", [True, False])
    def test_an_answer_does_not_reach_its_neighbours(self, own):
        settings = block(discount=0.95, own_reward=own)
        first, other = numbers(0.3, -0.6, 1.1), numbers(5.0, 7.0)
        both = returns(torch.cat([first, other]), torch.tensor([3, 2]), settings)
        assert_equal(both[:3], returns(first, torch.tensor([3]), settings))
        assert_equal(both[3:], returns(other, torch.tensor([2]), settings))
        leaking = numbers(*worked_returns([0.3, -0.6, 1.1, 5.0, 7.0], [5], 0.95, own, False))
        assert ((both - leaking)[:3].abs() > FAR).all()
        swapped = returns(torch.cat([other, first]), torch.tensor([2, 3]), settings)
        assert_equal(swapped, torch.cat([both[3:], both[:3]]))


class TestWhitening:
    def test_it_takes_off_the_mean_and_divides_by_the_deviation_of_the_valid_tokens(self):
        values = (2.0, -1.0, 0.5, 3.0, 1.5)  # an answer of three tokens and one of two
        mean = sum(values) / 5
        variance = sum((value - mean) ** 2 for value in values) / 5
        found = whiten(numbers(*values), mean, variance)
        assert_equal(found, numbers(*((value - 1.2) / math.sqrt(1.86 + 1e-8) for value in values)))
        # Two rows of three with a 0 for padding; the sample's variance; each answer for itself.
        padded_mean = sum(values) / 6
        padded_variance = (sum((value - padded_mean) ** 2 for value in values) + padded_mean**2) / 6
        assert abs(found[0] - (2.0 - padded_mean) / math.sqrt(padded_variance)) > FAR
        assert abs(found[0] - (2.0 - mean) / math.sqrt(variance * 5 / 4)) > FAR
        assert abs(found[0] - (2.0 - 0.5) / math.sqrt(1.5)) > FAR

    def test_equal_returns_are_no_division_by_zero(self):
        assert_equal(whiten(numbers(0.5, 0.5), 0.5, 0.0), numbers(0.0, 0.0))
        assert_equal(whiten(numbers(0.5, 0.5), 0.0, 0.0), numbers(5e3, 5e3))  # 1e-8 stands under the root


# log q - log q_old, w, A: below, inside and above the clip for both signs, some of them only by w.
STEPS = (
    (-0.5, 1.0, 1.3),
    (-0.5, 1.0, -1.3),
    (0.05, 1.0, 0.8),
    (-0.02, 1.0, -0.8),
    (0.4, 1.0, 2.0),
    (0.4, 1.0, -2.0),
    (0.0, 0.5, 1.7),
    (0.0, 0.5, -1.7),
    (0.0, 1.5, 0.6),
    (0.0, 1.5, -0.6),
    (0.4, 0.7, 1.1),
    (-0.5, 1.6, -0.9),
)


class TestPolicyLoss:
    """max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)), ratio = q / q_old * w: the weight is inside the clip."""

    VOCAB = 6

    def case(self) -> tuple[dict[str, Tensor], Tensor, Draws]:
        z = {"student": drawn(3, len(STEPS), self.VOCAB).requires_grad_(), "teacher": drawn(4, len(STEPS), self.VOCAB)}
        labels = torch.tensor([0, 3, 5, 1, 1, 2, 4, 0, 5, 3, 2, 4])
        log_q = self.log_q(z["student"], labels).detach()
        steps, weights, advantages = (numbers(*column) for column in zip(*STEPS, strict=True))
        return z, labels, Draws(log_probs=log_q - steps, weights=weights, advantages=advantages)

    @staticmethod
    def log_q(z: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([row[label] - row.exp().sum().log() for row, label in zip(z, labels.tolist(), strict=True)])

    @staticmethod
    def worked(clip: float | None, weighted: bool = True) -> list[float]:
        found = []
        for step, weight, advantage in STEPS:
            ratio = math.exp(step) * (weight if weighted else 1.0)
            inside = ratio if clip is None else min(max(ratio, 1 - clip), 1 + clip)
            found.append(max(-advantage * ratio, -advantage * inside))
        return found

    def slope(self, z: dict[str, Tensor], labels: Tensor, draws: Draws, clip: float | None, weighted: bool) -> Tensor:
        ratio = (self.log_q(z["student"], labels) - draws.log_probs).exp() * (draws.weights if weighted else 1.0)
        loss = -draws.advantages * ratio
        if clip is not None:
            loss = torch.maximum(loss, -draws.advantages * ratio.clamp(1 - clip, 1 + clip))
        return torch.autograd.grad((torch.arange(1, 13) * loss).sum(), z["student"])[0]

    @pytest.mark.parametrize("clip", [0.2, 0.1, None])
    @pytest.mark.parametrize("weighted", [True, False])
    def test_value_and_gradient(self, clip, weighted):
        z, labels, draws = self.case()
        loss = policy(ratio_clip=clip, importance_weights=weighted).per_token(z, labels, draws=draws)
        assert_equal(loss.detach(), numbers(*self.worked(clip, weighted)))
        (grad,) = torch.autograd.grad((torch.arange(1, 13) * loss).sum(), z["student"])
        assert_equal(grad, self.slope(z, labels, draws, clip, weighted))
        assert (grad - self.slope(z, labels, draws, clip, not weighted)).abs().max() > FAR

    def test_a_clipped_token_teaches_nothing_and_one_that_went_the_wrong_way_does(self):
        z, labels, draws = self.case()
        loss = policy(ratio_clip=0.2).per_token(z, labels, draws=draws)
        sizes = torch.autograd.grad(loss.sum(), z["student"])[0].abs().amax(-1)
        for size, (step, weight, advantage) in zip(sizes, STEPS, strict=True):
            ratio = math.exp(step) * weight
            assert (size == 0) == (ratio > 1.2 if advantage > 0 else ratio < 0.8), (step, weight, advantage)

    def test_the_weight_is_inside_the_clip(self):
        outside = []
        for step, weight, advantage in STEPS:
            ratio = math.exp(step)
            outside.append(weight * max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2)))
        z, labels, draws = self.case()
        found = policy(ratio_clip=0.2).per_token(z, labels, draws=draws).detach()
        assert found[8].item() == pytest.approx(-0.6 * 1.2, rel=1e-10) and outside[8] == pytest.approx(-0.6 * 1.5)
        assert found[7].item() == pytest.approx(1.7 * 0.8, rel=1e-10) and outside[7] == pytest.approx(1.7 * 0.5)
        assert int(((found - numbers(*outside)).abs() > FAR).sum()) == 4

    def test_nothing_of_the_draws_carries_gradient(self):
        """Not even if they ask for it, as an advantage made from the student's own logits does."""
        z, labels, plain = self.case()
        log_q = self.log_q(z["student"], labels)
        attached = self.log_q(z["teacher"], labels) - log_q
        leaves = [plain.log_probs.clone().requires_grad_(), plain.weights.clone().requires_grad_(), attached]
        draws = Draws(log_probs=leaves[0], weights=leaves[1], advantages=attached)
        loss = policy(ratio_clip=0.2).per_token(z, labels, draws=draws)
        grads = torch.autograd.grad(loss.sum(), [z["student"], *leaves], allow_unused=True, retain_graph=True)
        assert grads[1:] == (None, None, None)
        held = Draws(log_probs=plain.log_probs, weights=plain.weights, advantages=attached.detach())
        expected = policy(ratio_clip=0.2).per_token(z, labels, draws=held)
        assert_equal(grads[0], torch.autograd.grad(expected.sum(), z["student"])[0])
        ratio = (log_q - plain.log_probs).exp() * plain.weights
        mistaken = torch.maximum(-attached * ratio, -attached * ratio.clamp(0.8, 1.2))
        assert_equal(mistaken.detach(), loss.detach())  # the value does not show it
        assert (grads[0] - torch.autograd.grad(mistaken.sum(), z["student"])[0]).abs().max() > FAR

    def test_it_is_of_the_drawn_token_and_of_its_probability(self):
        """Tokens one place on are others; a shift of a row's logits changes no probability."""
        z, labels, draws = self.case()
        found = policy().per_token(z, labels, draws=draws).detach()
        moved = policy().per_token(z, labels.roll(1), draws=draws).detach()
        assert (found - moved).abs().max() > FAR
        shifts = 3 * drawn(5, len(STEPS), 1)
        shifted = {"student": z["student"] + shifts, "teacher": z["teacher"]}
        assert_equal(policy().per_token(shifted, labels, draws=draws).detach(), found)

    def test_the_exact_single_step_is_added_with_its_weight(self):
        z, labels, draws = self.case()
        log_q, log_p = (z[name].log_softmax(-1) for name in ("student", "teacher"))
        exact = kl(log_q, log_p)
        found = policy(ratio_clip=0.2, divergence_weight=0.7).per_token(z, labels, draws=draws)
        assert_equal(found.detach(), numbers(*self.worked(0.2)) + 0.7 * exact.detach())
        (grad,) = torch.autograd.grad((torch.arange(1, 13) * found).sum(), z["student"])
        (single,) = torch.autograd.grad((torch.arange(1, 13) * exact).sum(), z["student"])
        assert_equal(grad, self.slope(z, labels, draws, 0.2, True) + 0.7 * single)

    def test_without_draws_the_block_changes_nothing(self):
        z, labels, _ = self.case()
        shared = {"divergence": {"name": "jsd", "beta": 0.3}}
        with_block = objective(shared | {"policy_gradient": PLAIN | {"divergence_weight": 0.5}})
        assert torch.equal(with_block.per_token(z, labels), objective(shared).per_token(z, labels))
