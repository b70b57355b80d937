"""MiniLLM (Gu et al., 2306.08543) as a whole: the laws that its gradient obeys, and one step with every trick.

The laws sum over every answer at its probability, so that they have no noise. Every expected number is worked here from
the paper's formula in float64; nothing of deltakd computes one. The parts one by one: test_policy.py.
"""

import math

import pytest
import torch
from torch import Tensor

from deltakd.losses import linear_loss
from deltakd.losses.policy import Draws, log_probs_of, returns, rewards, whiten
from tests.losses.golden import FAR, assert_equal, drawn, kl, policy, worked_returns


class TestSequences:
    """All nine answers of two tokens over a vocabulary of three, each at its probability: KL of whole sequences."""

    def setup_method(self):
        self.first, self.second = drawn(6, 3).requires_grad_(), drawn(7, 3, 3).requires_grad_()
        self.of_teacher = drawn(8, 3), drawn(9, 3, 3)
        self.answers = torch.tensor([(a, b) for a in range(3) for b in range(3)])

    def rows(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits of each token of each answer, one answer behind the other."""
        return torch.stack([first.expand(9, 3), second[self.answers[:, 0]]], 1).flatten(0, 1)

    def logs(self, rows: Tensor) -> Tensor:
        return rows.log_softmax(-1).gather(-1, self.answers.flatten()[:, None])[:, 0]

    def exact(self) -> tuple[Tensor, ...]:
        student, teacher = (
            self.logs(self.rows(*part)).view(9, 2).sum(-1) for part in ((self.first, self.second), self.of_teacher)
        )
        return torch.autograd.grad((student.exp() * (student - teacher)).sum(), (self.first, self.second))

    def sampled(self, share: float = 0.0, **changes) -> tuple[Tensor, ...]:
        """The mean of the loss over answers; a share of every token's draws is the teacher's."""
        z = {"student": self.rows(self.first, self.second), "teacher": self.rows(*self.of_teacher)}
        logs = {name: self.logs(rows).detach() for name, rows in z.items()}
        loss = policy(**changes)
        settings = loss.settings.policy_gradient
        advantages = returns(rewards(logs, settings), torch.full((9,), 2), settings)
        mixed = (1 - share) * logs["student"].exp() + share * logs["teacher"].exp()
        draws = Draws(log_probs=logs["student"], weights=logs["student"].exp() / mixed, advantages=advantages)
        per_token = loss.per_token(z, self.answers.flatten(), draws=draws)
        probabilities = mixed.view(9, 2).prod(-1).repeat_interleave(2)
        return torch.autograd.grad((probabilities * per_token).sum(), (self.first, self.second))

    def distance(self, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
        return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))

    def test_undiscounted_returns_give_the_gradient_of_the_sequences_kl(self):
        for mine, expected in zip(self.sampled(discount=1.0), self.exact(), strict=True):
            assert_equal(mine, expected)
        assert self.distance(self.sampled(discount=0.0), self.exact()) > FAR

    def test_so_do_later_rewards_alone_beside_the_exact_single_step(self):
        """The paper's decomposition; with the own reward in both, the single step counts twice."""
        decomposed = self.sampled(discount=1.0, own_reward=False, divergence_weight=1.0)
        for mine, expected in zip(decomposed, self.exact(), strict=True):
            assert_equal(mine, expected)
        assert self.distance(self.sampled(discount=1.0, divergence_weight=1.0), self.exact()) > FAR
        assert self.distance(self.sampled(discount=1.0, own_reward=False), self.exact()) > FAR

    def test_draws_mixed_with_the_teacher_s_are_weighed_back(self):
        """Exact for the reward of a token itself: the weight is of this token's draw, not of those before and after."""
        z = [self.rows(self.first, self.second).detach().requires_grad_(), self.rows(*self.of_teacher)]
        ids = torch.arange(3).repeat(6)
        rows = [part[:6].repeat_interleave(3, 0) for part in z]  # six places, each with all three tokens
        logs = [part.log_softmax(-1).gather(-1, ids[:, None])[:, 0].detach() for part in rows]
        mixed = 0.8 * logs[0].exp() + 0.2 * logs[1].exp()
        draws = Draws(log_probs=logs[0], weights=logs[0].exp() / mixed, advantages=logs[1] - logs[0])
        (expected,) = torch.autograd.grad(kl(z[0][:6].log_softmax(-1), z[1][:6].log_softmax(-1)).sum(), z[0])
        for weighted in (True, False):
            loss = policy(importance_weights=weighted)
            per_token = loss.per_token({"student": rows[0], "teacher": rows[1]}, ids, draws=draws)
            (grad,) = torch.autograd.grad((mixed * per_token).sum(), z[0], retain_graph=True)
            if weighted:
                assert_equal(grad, expected)
            else:
                assert (grad - expected).abs().max() > FAR


class TestWholeStep:
    """Two answers of three and two tokens, drawn from the mixture by a student that has moved since."""

    LENGTHS = (3, 2)
    IDS = (2, 0, 3, 1, 2)

    def worked(self, old: Tensor, new: Tensor, teacher: Tensor, own: bool, padded: bool = False) -> Tensor:
        log_old, log_new, log_p = (z.log_softmax(-1) for z in (old, new, teacher))
        at = [(token, id_) for token, id_ in enumerate(self.IDS)]
        r = [max(-100.0, min(100.0, (log_p[place] - log_old[place]).item() / 0.5)) for place in at]
        plain = worked_returns(r, list(self.LENGTHS), 0.95, own, True)
        over = [*plain, 0.0] if padded else plain
        mean = sum(over) / len(over)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in over) / len(over) + 1e-8)
        losses = []
        for place, value in zip(at, plain, strict=True):
            q_old, p = log_old[place].exp(), log_p[place].exp()
            ratio = (log_new[place] - log_old[place]).exp() * q_old / (0.8 * q_old + 0.2 * p)
            advantage = (value - mean) / deviation
            losses.append(torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)))
        return torch.stack(losses) + kl(log_new, log_p)

    @pytest.mark.parametrize("own", [True, False], ids=["as its code", "as its paper"])
    def test_every_trick_at_once(self, own):
        old, teacher = drawn(10, 5, 4), 1.5 * drawn(11, 5, 4)
        new = (old + 0.2 * drawn(12, 5, 4)).requires_grad_()
        tricks = {"reward_scale": 2.0, "reward_clip": 100.0, "discount": 0.95, "own_reward": own, "whiten": True}
        loss = policy(**tricks, length_normalised=True, ratio_clip=0.2, divergence_weight=1.0)
        settings = loss.settings.policy_gradient
        ids = torch.tensor(self.IDS)
        log_q, log_p = (z.log_softmax(-1)[range(5), ids] for z in (old, teacher))
        plain = returns(rewards({"teacher": log_p, "student": log_q}, settings), torch.tensor(self.LENGTHS), settings)
        advantages = whiten(plain, plain.mean().item(), plain.var(correction=0).item())
        weights = log_q.exp() / (0.8 * log_q.exp() + 0.2 * log_p.exp())
        draws = Draws(log_probs=log_q, weights=weights, advantages=advantages)
        found = loss.per_token({"student": new, "teacher": teacher}, ids, draws=draws)
        expected = self.worked(old, new, teacher, own)
        assert_equal(found.detach(), expected.detach())
        (grad,), (slope,) = (torch.autograd.grad(part.sum(), new) for part in (found, expected))
        assert_equal(grad, slope)
        for mistake in (
            self.worked(old, new, teacher, own, padded=True),
            self.worked(old, new, teacher, not own),
        ):
            assert (found - mistake).abs().max() > FAR


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_the_chunked_loss_of_drawn_tokens_is_that_of_whole_logits(weight, chunk):
    hidden, head = drawn(20, 12, 4).requires_grad_(), drawn(21, 9, 4).requires_grad_()
    states, frozen = drawn(22, 12, 5), drawn(23, 11, 5)
    draws = Draws(-drawn(24, 12).abs(), 0.5 + drawn(25, 12).abs(), drawn(26, 12))
    labels = torch.arange(12) % 9
    loss = policy(ratio_clip=0.2, divergence_weight=weight)
    found = linear_loss(hidden, head, {"teacher": (states, frozen)}, labels, loss, chunk, draws)
    z = {"student": hidden @ head.T, "teacher": states @ frozen[:9].T}
    plain = loss.per_token(z, labels, draws=draws)
    assert_equal(found.total, plain.sum())
    for mine, other in zip(
        torch.autograd.grad(found.total, (hidden, head)), torch.autograd.grad(plain.sum(), (hidden, head)), strict=True
    ):
        assert_equal(mine, other)


def test_a_frozen_model_s_log_probabilities_are_of_its_labels_over_the_shared_vocabulary_in_any_chunk():
    states, frozen = drawn(30, 1200, 5), drawn(31, 14, 5)  # three more rows than are shared
    labels = torch.arange(1200) * 7 % 11
    logits = states @ frozen.T
    expected = logits[:, :11].log_softmax(-1)[torch.arange(1200), labels]
    for reference in ((states, frozen), logits):
        assert_equal(log_probs_of(labels, reference, 11), expected)
