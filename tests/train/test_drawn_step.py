"""One step on drawn tokens and plain text, against a loss and a gradient worked by plain autograd in the test."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from deltakd.base.ranks import SoloWorld
from deltakd.data.examples import Example
from deltakd.data.packing import pack
from deltakd.engine.protocol import Optimizer, StudentModule
from deltakd.engine.single import SingleEngine
from deltakd.losses import objective
from deltakd.losses.schedules import ScheduledAlpha
from deltakd.models.load import load_model
from deltakd.models.settings import ModelsSettings, WeightsSettings
from deltakd.train.advantages import Advantages
from deltakd.train.step import train_step

VOCAB, TEMPERATURE = 300, 1.7
SETTINGS = {
    "divergence": "reverse_kl",
    "temperature": TEMPERATURE,
    "temperature_squared": True,
    "policy_gradient": {
        "reward": {"teacher": 1, "student": -1},
        "reward_scale": 2,
        "discount": 0.9,
        "whiten": True,
        "ratio_clip": 0.3,
        "divergence_weight": 0.6,
    },
}
CORPUS_WEIGHT = 0.3


def rows(seed, *sizes):
    """Examples of a prompt and an answer, with the probabilities that a student drew them with."""
    draw = np.random.default_rng(seed)
    made = []
    for prompt, length in sizes:
        tokens = draw.integers(0, VOCAB, prompt + length).astype(np.int32)
        known = np.float32(np.stack([-4 - 2 * draw.random(length), 0.7 + 0.6 * draw.random(length)]))
        made.append(Example(tokens, np.arange(len(tokens)) >= prompt, known))
    return made


@pytest.fixture
def student(lab):
    settings = ModelsSettings(student=WeightsSettings(weights="x"), dtype="float32")
    return load_model("student", lab.folder / "student", settings)


def worked(student, drawn, teachers, plain):
    """The step's loss, differentiable, from whole logits: PPO's loss, the exact KL, and the text's cross-entropy."""
    said, numbers = [], []
    for batch, teacher in zip(drawn, teachers, strict=True):
        begins = batch.starts.tolist()
        logits = torch.cat([student(batch.tokens[a:b][None]).logits[0, :, :VOCAB] for a, b in pairwise(begins)])
        z = logits[batch.supervised]
        log_q, log_p = z.log_softmax(-1), teacher.log_softmax(-1)
        at = torch.arange(len(z)), batch.labels
        reward = 2 * (log_p[at] - batch.draws[0])
        document = torch.searchsorted(batch.starts, batch.supervised, right=True)
        follow = [
            sum(0.9 ** (j - i) * reward[j] for j in range(i, len(z)) if document[j] == document[i])
            for i in range(len(z))
        ]
        numbers.append((log_q[at], batch.draws, torch.stack(follow), reward))
        tempered = (z / TEMPERATURE).log_softmax(-1)
        kl = (tempered.exp() * (tempered - (teacher / TEMPERATURE).log_softmax(-1))).sum(-1)
        said.append(kl)
    every = torch.cat([follow for *_, follow, _ in numbers])
    mean, spread = every.mean(), every.var(correction=0)
    policy = []
    for log_q, draws, follow, _ in numbers:
        worth = ((follow - mean) / (spread + 1e-8).sqrt()).detach()
        ratio = (log_q - draws[0]).exp() * draws[1]
        policy.append(torch.maximum(-worth * ratio, -worth * ratio.clamp(0.7, 1.3)))
    own = torch.cat(policy) + 0.6 * TEMPERATURE**2 * torch.cat(said)
    text = student(plain.tokens[None]).logits[0, :, :VOCAB].log_softmax(-1)[plain.supervised]
    crossed = -text[torch.arange(len(text)), plain.labels]
    reward = torch.cat([reward for *_, reward in numbers]).mean()
    return own.mean() + CORPUS_WEIGHT * crossed.mean(), torch.cat(policy).mean(), crossed.mean(), reward


def test_a_step_on_drawn_tokens_beside_plain_text_is_the_loss_and_gradient_of_plain_autograd(student):
    drawn = [pack(rows(1, (4, 6), (3, 2))), pack(rows(2, (5, 9)))]
    length = 7
    text = np.random.default_rng(3).integers(0, VOCAB, length).astype(np.int32)
    plain = pack([Example(text, np.arange(length) > 0)])
    plain = type(plain)(**vars(plain) | {"corpus_weight": CORPUS_WEIGHT})
    generator = torch.Generator().manual_seed(4)
    teachers = [2 * torch.randn(batch.num_supervised, VOCAB, generator=generator) for batch in drawn]
    loss, policy, corpus, reward = worked(student, drawn, teachers, plain)
    parameters = dict(student.named_parameters())
    expected = dict(
        zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True)
    )

    module = StudentModule(student, objective(SETTINGS), "packed", VOCAB)
    engine = SingleEngine(module, Optimizer(0.1, (0.9, 0.95), 0.0, 1e9), "cpu")
    seen = {}
    engine.update = lambda rate, norm: seen.update({n: p.grad.clone() for n, p in student.named_parameters()})
    slots = [teacher.clone() for teacher in teachers]

    def asked():
        for index, batch in enumerate(drawn):
            if index:
                slots[index - 1].fill_(torch.nan)  # a slot is taken again once the next payload is asked for
            yield batch, {"teacher": slots[index]}
        yield plain, {}

    weigher = Advantages(objective(SETTINGS).settings.policy_gradient, SoloWorld(), VOCAB)
    still = ScheduledAlpha(0.0, None, 1)
    record = train_step(engine, SoloWorld(), lambda _: 0.01, still, [*drawn, plain], asked(), 1, weigher)
    for found, wanted in (
        (record.loss, loss),
        (record.policy, policy),
        (record.corpus, corpus),
        (record.reward, reward),
    ):
        assert found == pytest.approx(wanted.item(), rel=2e-4, abs=1e-6)
    own = sum(batch.num_supervised for batch in drawn)
    assert record.num_supervised == own + length - 1 and record.cross_entropy > 0 and record.student_entropy > 0
    for name, grad in seen.items():
        torch.testing.assert_close(grad, expected[name], rtol=2e-3, atol=2e-6, msg=name)


def test_drawn_tokens_that_learn_by_rewards_alone_have_no_divergence(student):
    settings = {"policy_gradient": {"reward": {"teacher": 1, "teacher_raw": 0, "student": -1}}}
    module = StudentModule(student, objective(settings), "packed", VOCAB)
    engine = SingleEngine(module, Optimizer(0.1, (0.9, 0.95), 0.0, 1.0), "cpu")
    (batch,) = [pack(rows(1, (4, 6)))]
    asked = iter([(batch, {"teacher": torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))})])
    observed = []
    still = ScheduledAlpha(0.0, None, 1)
    still.observe = observed.append
    weigher = Advantages(objective(settings).settings.policy_gradient, SoloWorld(), VOCAB)
    record = train_step(engine, SoloWorld(), lambda _: 0.01, still, [batch], asked, 1, weigher)
    assert record.divergence is None and record.kl_to_target is None and record.reward is not None and not observed
