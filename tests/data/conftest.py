"""Tiny rows, tokenizers trained on them, and a cache of the `datasets` library that ends with the tests."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltakd.data.families import CHATML
from deltakd.data.settings import TokenizerSettings
from deltakd.data.tokenizer import load_tokenizer, train_tokenizer

Write = Callable[[str, Sequence[Mapping[str, Any]]], Path]

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"where does person {number} live ?"},
            {"role": "assistant", "content": f"person {number} lives in town {number % 3} ."},
            {"role": "user", "content": "and what does she eat ?"},
            {"role": "assistant", "content": "soup\n\ngladly ."},
        ]
    }
    for number in range(20)
]


@pytest.fixture(scope="session", autouse=True)
def rows_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the library's Arrow copies out of the home folder; it is imported later, inside the first test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows to a .jsonl of that name."""
    return lambda name, rows: write_jsonl(tmp_path / name, rows)


@pytest.fixture(scope="session")
def tokenizer_folders(rows_cache: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer trained here, and one as others bring it: whole words, unknown ones, offsets without white space."""
    folder = tmp_path_factory.mktemp("tokenizers")
    file = write_jsonl(folder / "chats.jsonl", CHATS)
    train_tokenizer(TokenizerSettings(files=[str(file)], vocab_size=400), folder / "byte_bpe")
    write_words(folder / "words")
    return {kind: folder / kind for kind in ("words", "byte_bpe")}


def write_words(folder: Path) -> None:
    """Write a word-level tokenizer that knows the words of CHATS, in the generic class of transformers."""
    texts = [message["content"] for row in CHATS for message in row["messages"]]
    words = dict.fromkeys(word for text in texts for word in text.split())
    known = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "system", "user", "assistant", *words]
    tokenizer = Tokenizer(models.WordLevel({token: id_ for id_, token in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(known[:4])
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    whole.chat_template = CHATML
    whole.save_pretrained(folder)


@pytest.fixture(scope="session")
def words(tokenizer_folders: dict[str, Path]) -> Any:
    return load_tokenizer(str(tokenizer_folders["words"]))


@pytest.fixture(scope="session")
def byte_bpe(tokenizer_folders: dict[str, Path]) -> Any:
    return load_tokenizer(str(tokenizer_folders["byte_bpe"]))
