"""Policy gradients on tokens that the student drew itself: from log-probabilities to rewards, returns and a loss.

The reward of a drawn token is any weighted sum of log-probabilities of the models; what follows it in the same answer
may count as well. The loss is PPO's, with its gradient in closed form like every other: it only moves log q(y), so
dL/dz_student = dL/dlog q(y) * (one_hot(y) - q). Sources: MiniLLM, 2306.08543; G-OPD, 2602.12125; docs/objectives.md.

Shapes: N supervised tokens, D answers that lie one behind the other, n tokens of a chunk, V shared vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltakd.losses.points import widen
from deltakd.losses.policy_settings import PolicyGradient

_VARIANCE_FLOOR = 1e-8
_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Draws:
    """What is known of N tokens since they were drawn.

    log_probs [N] are the student's when it drew them, advantages [N] what they were worth; weights [N] are
    q / ((1 - a) q + a p) where a share `a` of the distribution that was drawn from is the teacher's, 1 where none is.
    """

    log_probs: Tensor
    weights: Tensor
    advantages: Tensor

    def __getitem__(self, rows: slice) -> "Draws":
        return Draws(self.log_probs[rows], self.weights[rows], self.advantages[rows])


def rewards(log_probs: Mapping[str, Tensor], settings: PolicyGradient) -> Tensor:
    """Return each token's reward [N]: the models' log-probabilities of it, summed by weight, scaled and clipped."""
    names = [name for name, weight in settings.reward.items() if weight]
    total = torch.stack([settings.reward[name] * log_probs[name].detach() for name in names]).sum(0)
    total = settings.reward_scale * total
    return total if settings.reward_clip is None else total.clamp(-settings.reward_clip, settings.reward_clip)


def returns(rewards: Tensor, lengths: Tensor | Sequence[int], settings: PolicyGradient) -> Tensor:
    """Return what each token and those behind it in its answer earn [N], by rewards [N] and answers' lengths [D].

    R_t = sum over t' >= t (t' > t without `own_reward`) of discount^(t' - first) * r_t', `first` being where the sum
    begins; with `length_normalised` divided by the number of its terms. Each answer ends on its own.
    """
    answers = []
    for answer in rewards.split([int(length) for length in lengths]):
        following = torch.zeros((), dtype=answer.dtype, device=answer.device)
        backwards = []
        for index in range(len(answer) - 1, -1, -1):
            whole = answer[index] + settings.discount * following
            backwards.append(whole if settings.own_reward else following)
            following = whole
        summed = torch.stack(backwards[::-1]) if backwards else answer
        if settings.length_normalised:
            terms = torch.arange(len(answer), 0, -1, device=answer.device) - (0 if settings.own_reward else 1)
            summed = summed / terms.clamp_min(1)
        answers.append(summed)
    return torch.cat(answers) if answers else rewards


def whiten(returns: Tensor, mean: float, variance: float) -> Tensor:
    """Return (R - mean) / sqrt(variance + 1e-8) [N], both taken over all drawn tokens of a step."""
    return (returns - mean) / (variance + _VARIANCE_FLOOR) ** 0.5


def policy_loss(log_q: Tensor, draws: Draws, settings: PolicyGradient) -> tuple[Tensor, Tensor]:
    """Return PPO's loss max(-A ratio, -A clip(ratio)) [n] and its derivative for log q(y) [n].

    ratio = q(y) / q_when_drawn(y) * w, the importance weight w inside the clip.
    """
    advantages = draws.advantages.detach().to(log_q.dtype)
    ratio = (log_q - draws.log_probs.detach().to(log_q.dtype)).exp()
    if settings.importance_weights:
        ratio = ratio * draws.weights.detach().to(log_q.dtype)
    plain = -advantages * ratio
    if settings.ratio_clip is None:
        return plain, plain
    clipped = -advantages * ratio.clamp(1 - settings.ratio_clip, 1 + settings.ratio_clip)
    return torch.maximum(plain, clipped), torch.where(plain >= clipped, plain, 0)


@torch.no_grad()
def log_probs_of(labels: Tensor, reference: Tensor | tuple[Tensor, Tensor], vocab_size: int) -> Tensor:
    """Return a frozen model's log-probability of each label [N], float32, normalised over the shared vocabulary.

    `reference` is its logits [N, >= V], or hidden states [N, H_m] and head [>= V, H_m].
    """
    found = []
    for start in range(0, len(labels), _CHUNK_TOKENS):
        rows = slice(start, start + _CHUNK_TOKENS)
        if isinstance(reference, tuple):
            hidden, head = reference
            logits = hidden[rows].to(head.dtype) @ head[:vocab_size].T
        else:
            logits = reference[rows, :vocab_size]
        log_p = torch.log_softmax(widen(logits), dim=-1)
        found.append(log_p.gather(-1, labels[rows, None])[:, 0])
    return torch.cat(found) if found else torch.empty(0, device=labels.device)
