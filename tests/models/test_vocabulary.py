"""One vocabulary for all models of a run: the smallest head, one tokenizer, and the sentence that says otherwise."""

import json

import pytest
import torch

from deltakd.base.errors import ModelError
from deltakd.data.settings import TokenizerSettings
from deltakd.data.tokenizer import load_tokenizer, train_tokenizer
from deltakd.losses import linear_loss, objective
from deltakd.models.vocabulary import refuse_foreign, shared_vocabulary


def test_the_shared_vocabulary_is_the_smallest_head():
    """The heads of Qwen2.5 1.5B and 7B, and their tokenizer."""
    assert shared_vocabulary({"student": 151_936, "teacher": 152_064}, 151_665) == 151_936


def test_a_head_that_does_not_cover_the_tokenizer_is_refused_with_both_numbers():
    with pytest.raises(ModelError, match=r"models\.teacher: its head has 151,000 rows, the tokenizer 151,665 tokens"):
        shared_vocabulary({"student": 151_936, "teacher": 151_000}, 151_665)


def test_rows_beyond_the_shared_vocabulary_change_nothing():
    """They are cut before anything is normalised: a large logit there would otherwise take mass."""
    torch.manual_seed(0)
    hidden, head, labels = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    teacher_hidden, teacher_head = torch.randn(5, 6), torch.randn(14, 6)
    teacher_head[11:] = 100
    loss = objective({"target": {"name": "teacher"}})
    whole = linear_loss(hidden, head, {"teacher": (teacher_hidden, teacher_head)}, labels, loss).total
    cut = linear_loss(hidden, head, {"teacher": (teacher_hidden, teacher_head[:11])}, labels, loss).total
    assert torch.equal(whole, cut)


def test_a_foreign_tokenizer_is_refused_with_the_first_differing_id_and_both_tokens(tmp_path):
    for name, text in (("one", "anna bela carl"), ("two", "anna dora carl")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
        train_tokenizer(TokenizerSettings(files=[str(tmp_path / f"{name}.jsonl")], vocab_size=270), tmp_path / name)
    one, two = (load_tokenizer(str(tmp_path / name)) for name in ("one", "two"))
    refuse_foreign("models.teacher", one, one)
    with pytest.raises(ModelError, match=r"id \d+ is '.+' for the student and '.+' here"):
        refuse_foreign("models.teacher", one, two)
