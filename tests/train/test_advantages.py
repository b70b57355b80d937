"""What drawn tokens are worth does not depend on how a step is cut into micro-batches and ranks."""

import threading

import numpy as np
import pytest
import torch

from deltakd.base.ranks import SoloWorld
from deltakd.data.examples import Example
from deltakd.data.packing import pack
from deltakd.losses import objective
from deltakd.train.advantages import Advantages, answer_lengths

VOCAB, HIDDEN = 11, 4
MINILLM = {
    "reward": {"teacher": 1, "student": -1},
    "reward_scale": 2,
    "discount": 0.95,
    "length_normalised": True,
    "whiten": True,
}


class Meeting(SoloWorld):
    """Ranks that are threads."""

    def __init__(self, size, rank=0, shared=None):
        self.size, self.rank = size, rank
        self.shared = shared or {"said": [None] * size, "all": threading.Barrier(size)}

    def other(self, rank):
        return Meeting(self.size, rank, self.shared)

    def sum(self, values):
        self.shared["said"][self.rank] = values
        self.shared["all"].wait(20)
        told = list(self.shared["said"])
        self.shared["all"].wait(20)
        return [float(sum(parts)) for parts in zip(*told, strict=True)]


def answers():
    draw = np.random.default_rng(0)
    made = []
    for prompt, length in ((3, 5), (2, 1), (4, 7), (1, 3), (2, 2)):
        tokens = draw.integers(0, VOCAB, prompt + length).astype(np.int32)
        known = np.float32(np.stack([-draw.random(length), 1 + draw.random(length)]))
        made.append(Example(tokens, np.arange(len(tokens)) >= prompt, known))
    return made


HEAD = torch.randn(VOCAB + 3, HIDDEN, generator=torch.Generator().manual_seed(1))
STATES = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(2))  # a teacher that knows a token's label


def payload(batch):
    return {"teacher": (STATES[batch.labels].clone(), HEAD)}


def weigh(batches, settings, world=None):
    """Advantages by drawn label's place; a payload's slot is taken again as soon as the next one is asked for."""
    slots = []

    def asked():
        for batch in batches:
            for slot in slots:
                slot["teacher"][0].fill_(torch.nan)
            slots.append(payload(batch) if batch.num_supervised else {})
            yield batch, slots[-1]

    part = Advantages(settings, world or SoloWorld(), VOCAB)
    return list(part.weigh(asked())), part.mean_reward


def by_answer(weighed):
    found = {}
    for batch, _ in weighed:
        for row in torch.cat([batch.labels[None].float(), batch.draws]).T.split(answer_lengths(batch)):
            found[tuple(row[:, :3].flatten().tolist())] = row[:, 3]
    return found


@pytest.mark.parametrize("whiten", [True, False])
def test_cutting_a_step_differently_changes_no_advantage(whiten):
    settings = objective({"policy_gradient": MINILLM | {"whiten": whiten}}).settings.policy_gradient
    made = answers()
    whole, reward = weigh([pack(made)], settings)
    expected = by_answer(whole)
    assert len(expected) == 5 and reward is not None
    cut, again = weigh([pack(made[:2]), pack(made[2:3]), pack(made[3:])], settings)
    assert again == pytest.approx(reward)
    world, told = Meeting(2), {}

    def rank(number, batches):
        told[number] = weigh(batches, settings, world.other(number))

    threads = [
        threading.Thread(target=rank, args=(0, [pack(made[:1]), pack(made[1:3])])),
        threading.Thread(target=rank, args=(1, [pack(made[3:4]), pack(made[4:])])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    both = by_answer(told[0][0]) | by_answer(told[1][0])
    for found in (by_answer(cut), both):
        assert found.keys() == expected.keys()
        for key, worth in expected.items():
            torch.testing.assert_close(found[key], worth, rtol=1e-5, atol=1e-6)
    assert told[0][1] == told[1][1] == pytest.approx(reward)
    if whiten:
        every = torch.cat(list(expected.values()))
        assert abs(float(every.mean())) < 1e-6 and float(every.var(correction=0)) == pytest.approx(1, abs=1e-4)


def test_a_reward_is_the_models_log_probabilities_of_the_very_token_that_was_drawn():
    settings = objective({"policy_gradient": {"reward": {"teacher": 1.0, "student": -1.0}}}).settings.policy_gradient
    made = answers()
    (pair,), _ = weigh([pack(made)], settings)
    batch = pair[0]
    log_p = torch.log_softmax(STATES[batch.labels].double() @ HEAD[:VOCAB].double().T, -1)  # beyond V: no mass
    said = log_p[torch.arange(len(batch.labels)), batch.labels]
    drawn = np.concatenate([one.tokens[one.supervised] for one in made])
    assert batch.labels.tolist() == drawn.tolist()
    known = torch.from_numpy(np.concatenate([one.draws for one in made], axis=1))
    torch.testing.assert_close(batch.draws[:2], known)
    torch.testing.assert_close(batch.draws[2].double(), said - known[0].double(), rtol=1e-5, atol=1e-5)


def test_tokens_that_nobody_drew_pass_through():
    settings = objective({"policy_gradient": MINILLM}).settings.policy_gradient
    data = pack([Example(np.arange(6, dtype=np.int32), np.arange(6) > 2)])
    (pair,), reward = weigh([data], settings)
    assert pair[0] is data and reward is None
