"""Answers depend on the prompt, the settings and the seed, not on what else is in the batch."""

import pytest
import torch

from deltakd.data.tokenizer import load_tokenizer
from deltakd.evaluate.generate import Answer, generate
from deltakd.evaluate.settings import EvaluationSettings
from deltakd.models.load import load_model
from deltakd.models.settings import ModelsSettings, WeightsSettings

PROMPTS = ("what has anna", "a", "number 7 ? the drum", "carl has")


@pytest.fixture(scope="module")
def teacher(lab):
    settings = ModelsSettings(student=WeightsSettings(weights="x"), dtype="float32")
    return load_model("teacher", lab.folder / "teacher", settings)


@pytest.fixture(scope="module")
def speak(lab, teacher):
    """Answer prompts with the lab's teacher and given settings."""
    tokenizer = load_tokenizer(str(lab.folder / "tokenizer"))
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]

    def answer(chosen=slice(None), end_id=1, **changes):
        given = {"max_new_tokens": 12, "batch_size": 3, **changes}
        return generate(teacher, tokenizer, prompts[chosen], end_id, EvaluationSettings(**given))

    return answer


def test_a_greedy_answer_does_not_depend_on_its_batch(speak):
    together = speak(batch_size=4)
    assert together == speak(batch_size=1) == speak(batch_size=3)
    assert together == [speak(slice(i, i + 1))[0] for i in range(4)]
    assert len(set(together)) > 1


def test_sampled_answers_come_from_the_seed(speak):
    assert speak(temperature=1.0, seed=3) == speak(temperature=1.0, seed=3)
    assert speak(temperature=1.0, seed=3) != speak(temperature=1.0, seed=4)


def test_an_answer_ends_at_the_end_of_turn_and_does_not_hold_it(lab, teacher, speak):
    """Greedy decoding does not know which token ends an answer: the fourth that it writes is taken for it."""
    tokenizer = load_tokenizer(str(lab.folder / "tokenizer"))
    prompt = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    written = teacher.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    first = written.index(written[3])
    (answer,) = speak(slice(0, 1), end_id=written[3])
    assert answer == Answer(tokenizer.decode(written[:first], skip_special_tokens=True).strip(), True, first)
    assert not speak(slice(0, 1), end_id=299 if 299 not in written else 298)[0].ended
