"""Trained tokenizers are ordinary folders, the same for the same rows, and exact for the text they are meant for."""

import shutil
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltakd.base.errors import ModelError
from deltakd.data.families import CHATML
from deltakd.data.settings import TokenizerSettings
from deltakd.data.template import ChatTemplate
from deltakd.data.tokenizer import digest, load_tokenizer, train_tokenizer

TEXT = [{"text": "the cat sat on the mat , the dog did not"}, {"text": "a cat and a dog"}]
KINDS = ["words", "byte_bpe"]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_same_rows_train_the_same_files_and_nothing_lies_beside_them(write, tmp_path):
    settings_ = TokenizerSettings(files=[str(write("rows.jsonl", TEXT))], vocab_size=300)
    for name in ("one", "two", "two"):  # the third replaces the second
        train_tokenizer(settings_, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "rows.jsonl", "two"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_tokenizer_speaks_chatml_and_stops_at_the_end_of_a_turn(tokenizer_folders, kind):
    tokenizer = load_tokenizer(str(tokenizer_folders[kind]))
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_token_id == ChatTemplate(tokenizer).end_of_turn_id
    assert tokenizer.pad_token == "<|endoftext|>" != tokenizer.eos_token


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30).filter(lambda text: "<|" not in text and unicodedata.is_normalized("NFC", text)))
def test_byte_bpe_gives_back_any_text(byte_bpe, text):
    assert byte_bpe.decode(byte_bpe(text)["input_ids"]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_means_the_same_beside_the_weights_of_any_architecture(tokenizer_folders, tmp_path, kind):
    """transformers replaces how text is split when it sees a config.json of type qwen2 in the same folder."""
    from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

    plain = load_tokenizer(str(tokenizer_folders[kind]))
    loaders = [lambda path: load_tokenizer(str(path))]
    if kind == "byte_bpe":  # what is trained here means the same to those who load it without us
        loaders.append(AutoTokenizer.from_pretrained)
    text = "person 12 DON'T live\n\n in town 1 ."
    for config in (Qwen2Config(), LlamaConfig()):
        folder = tmp_path / config.model_type
        shutil.copytree(tokenizer_folders[kind], folder)
        config.save_pretrained(folder)
        beside = load_tokenizer(str(folder))
        beside.save_pretrained(folder)  # as training does with its final weights
        for other in (beside, *(load(folder) for load in loaders)):
            assert other(text)["input_ids"] == plain(text)["input_ids"]
            assert digest(other) == digest(plain)


def test_a_digest_covers_the_template_and_not_the_last_call(tokenizer_folders):
    tokenizer = load_tokenizer(str(tokenizer_folders["words"]))
    before = digest(tokenizer)
    tokenizer(["soup", "soup , gladly"], padding=True, truncation=True, max_length=2)
    assert digest(tokenizer) == before
    tokenizer.chat_template = CHATML + " "
    assert digest(tokenizer) != before


def test_a_vocabulary_too_small_for_bytes_is_refused_and_leaves_the_old_folder(write, tmp_path):
    file = str(write("rows.jsonl", TEXT))
    train_tokenizer(TokenizerSettings(files=[file], vocab_size=300), tmp_path / "bpe")
    before = contents(tmp_path / "bpe")
    with pytest.raises(ModelError, match=r"tokenizer.vocab_size: 100 tokens do not hold the 259 .*Write 259 or more"):
        train_tokenizer(TokenizerSettings(files=[file], vocab_size=100), tmp_path / "bpe")
    assert contents(tmp_path / "bpe") == before


def test_a_folder_without_a_tokenizer_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds no usable tokenizer \(.*\)\. Write a folder with tokenizer\.json\.$"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match=r"does not exist\. Write the folder of a tokenizer, or a hub id"):
        load_tokenizer(str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"Qwen/Qwen2.5-7B: not a local path, and the hub cannot be reached"):
        load_tokenizer("Qwen/Qwen2.5-7B")
