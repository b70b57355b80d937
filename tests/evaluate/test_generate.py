"""Answers depend on the prompt, the settings and the seed, not on what else is in the batch."""

import pytest

from deltakd.data.tokenizer import load_tokenizer
from deltakd.evaluate.generate import generate
from deltakd.evaluate.settings import EvaluationSettings
from deltakd.models.load import load_model
from deltakd.models.settings import ModelsSettings, WeightsSettings


@pytest.fixture(scope="module")
def speak(lab):
    """Answer prompts with the lab's teacher and given settings."""
    settings = ModelsSettings(student=WeightsSettings(weights="x"), dtype="float32")
    model = load_model("teacher", lab.folder / "teacher", settings)
    tokenizer = load_tokenizer(str(lab.folder / "tokenizer"))
    prompts = [tokenizer(text)["input_ids"] for text in ("what has anna", "a", "number 7 ? the drum", "carl has")]

    def answer(chosen=slice(None), end_id=1, **changes):
        given = {"max_new_tokens": 12, "batch_size": 3, **changes}
        return generate(model, tokenizer, prompts[chosen], end_id, EvaluationSettings(**given))

    return answer


def test_a_greedy_answer_does_not_depend_on_its_batch(speak):
    together = speak(batch_size=4)
    assert together == speak(batch_size=1) == speak(batch_size=3)
    assert together == [speak(slice(i, i + 1))[0] for i in range(4)]
    assert len(set(together)) > 1


def test_sampled_answers_come_from_the_seed(speak):
    assert speak(temperature=1.0, seed=3) == speak(temperature=1.0, seed=3)
    assert speak(temperature=1.0, seed=3) != speak(temperature=1.0, seed=4)


def test_an_answer_ends_at_the_end_of_turn_and_does_not_hold_it(speak):
    """Greedy answers do not know which token ends them: any token that one writes may be taken for it."""
    whole = speak(slice(0, 1))[0]
    assert not whole.ended
    cut = [speak(slice(0, 1), end_id=token)[0] for token in range(3, 300, 7)]
    ended = [answer for answer in cut if answer.ended]
    assert ended and all(len(answer.text) < len(whole.text) for answer in ended)
    assert all(answer == whole for answer in cut if not answer.ended)
