"""What is known of drawn tokens is what both models say of them in one plain forward."""

import pytest
import torch

from deltakd.data.tokenizer import load_tokenizer
from deltakd.evaluate.drawing import Drawing
from deltakd.evaluate.generate import draw_tokens, write_tokens
from deltakd.evaluate.settings import SamplingSettings
from deltakd.models.load import load_model
from deltakd.models.settings import ModelsSettings, WeightsSettings

SAMPLED = SamplingSettings(max_new_tokens=10, batch_size=3, temperature=1.0, seed=5)
VOCAB = 280  # fewer than the tokenizer has: what is beyond must never be drawn


@pytest.fixture(scope="module")
def models(lab):
    settings = ModelsSettings(student=WeightsSettings(weights="x"), dtype="float32")
    return [load_model(name, lab.folder / name, settings).eval() for name in ("student", "teacher")]


@pytest.fixture(scope="module")
def prompts(lab):
    tokenizer = load_tokenizer(str(lab.folder / "tokenizer"))
    return [tokenizer(text)["input_ids"] for text in ("what has anna", "a", "number 7 ? the drum", "carl has")]


def log_probs(model, prompt, answer):
    """Of every token of an answer, by one forward over prompt and answer, nothing cached and nothing padded."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1, :VOCAB]
    return torch.log_softmax(logits.float(), -1)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
def test_log_probabilities_and_weights_are_those_of_a_plain_forward(models, prompts, share):
    student, teacher = models

    def observe(mask):
        return Drawing(mask, VOCAB, teacher, share)

    drawn = draw_tokens(student, prompts, 1, SAMPLED, observe=observe)
    assert drawn[0][0] != drawn[1][0]
    for prompt, (answer, known) in zip(prompts, drawn, strict=True):
        assert max(answer) < VOCAB and known.shape == (2, len(answer))
        q, p = (log_probs(model, prompt, answer).exp() for model in (student, teacher))
        at = torch.arange(len(answer)), torch.tensor(answer)
        torch.testing.assert_close(known[0], q[at].log(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(known[1], (q / ((1 - share) * q + share * p))[at], rtol=1e-4, atol=1e-5)


def test_tokens_are_drawn_from_the_mixture(models, prompts):
    """The first token of many answers: its shares are those of the mixture, not of either model."""
    student, teacher = models
    many = SAMPLED.model_copy(update={"max_new_tokens": 1, "batch_size": 4000})
    drawn = draw_tokens(student, prompts[:1] * 4000, 1, many, observe=lambda mask: Drawing(mask, VOCAB, teacher, 0.5))
    counts = torch.bincount(torch.tensor([answer[0] for answer, _ in drawn]), minlength=VOCAB) / 4000
    q, p = (log_probs(model, prompts[0], [0])[0].exp() for model in (student, teacher))
    far = (q - p).abs().sum() / 2
    assert far > 0.2  # or nothing could be told
    for wrong in (q, p):
        assert (counts - (q + p) / 2).abs().sum() < (counts - wrong).abs().sum()


def test_a_student_that_is_watched_draws_what_it_draws_alone(models, prompts):
    student, _ = models
    alone = write_tokens(student, prompts, 1, SAMPLED)
    assert max(map(max, alone)) < 10**6
    whole = len(student.get_output_embeddings().weight)
    watched = draw_tokens(student, prompts, 1, SAMPLED, observe=lambda mask: Drawing(mask, whole))
    assert [answer for answer, _ in watched] == alone
