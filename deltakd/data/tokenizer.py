"""Tokenizers: load one, name it by what it does, or train a small one on local rows.

A trained tokenizer is an ordinary Hugging Face folder. Its end of sequence is <|im_end|>, so that every generator stops
where an assistant turn ends; <|endoftext|> closes plain texts and pads. It is byte-level BPE, split as Qwen2 splits:
exact for any text in Unicode's NFC form. Training takes about a second per 10 MB and gives the same files for the same
rows.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from deltakd.base.errors import ModelError
from deltakd.base.hub import could_be_hub_id, refuse_unreachable
from deltakd.data.families import CHATML, IM_END, IM_START
from deltakd.data.formats import ROLES, texts_of
from deltakd.data.settings import SourceSettings, TokenizerSettings
from deltakd.data.sources import load_rows
from deltakd.data.template import END_OF_TEXT

GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)


def load_tokenizer(path: str, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Load a tokenizer from a folder or a hub id. Raises ModelError in one sentence if there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(path).expanduser()
    if not folder.exists():
        if not could_be_hub_id(path):
            raise ModelError(f"{path}: does not exist. Write the folder of a tokenizer, or a hub id.")
        refuse_unreachable("model", path, revision, ModelError)
    elif folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        # transformers would make an empty one of the model's family, without a word.
        raise ModelError(f"{path}: holds no tokenizer. Write a folder with tokenizer.json, or copy one there.")
    try:
        if _is_generic(folder):
            return PreTrainedTokenizerFast.from_pretrained(str(folder))
        return AutoTokenizer.from_pretrained(
            str(folder) if folder.exists() else path,
            trust_remote_code=trust_remote_code,
            revision=revision or "main",
        )
    except Exception as error:  # transformers and tokenizers raise anything, bare Exception too, for a broken folder
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150].rstrip(". ")
        raise ModelError(
            f"{path}: holds no usable tokenizer ({reason}). Write a folder with tokenizer.json."
        ) from error


def _is_generic(folder: Path) -> bool:
    """Tell whether a local folder says that its tokenizer.json is all there is.

    AutoTokenizer overrules that beside a config.json of type qwen2: it keeps the vocabulary and replaces the splitting.
    """
    config = folder / "tokenizer_config.json"
    if not config.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    return json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") in GENERIC_CLASSES


def digest(tokenizer: Any) -> str:
    """Name everything that decides the tokens of a text: the whole tokenizer and its chat template."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("truncation", "padding"):  # set by the last call, not part of what a tokenizer is
        state.pop(passing, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([state, tokenizer.chat_template, special], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def train_tokenizer(settings: TokenizerSettings, folder: Path) -> None:
    """Train a tokenizer on the rows of `settings.files` and write it to `folder`, whole or not at all."""
    from transformers import Qwen2Tokenizer

    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
    if settings.vocab_size < smallest:
        raise ModelError(
            f"tokenizer.vocab_size: {settings.vocab_size:,} tokens do not hold the {smallest} that byte-level BPE "
            f"starts from. Write {smallest} or more."
        )
    # The family's own class: a generic one beside a config.json of type qwen2 is loaded as this one, in silence, and
    # would then split otherwise than it was trained.
    untrained = Qwen2Tokenizer(
        eos_token=IM_END, pad_token=END_OF_TEXT, unk_token=END_OF_TEXT, extra_special_tokens=[IM_START]
    )
    tokenizer = untrained.train_new_from_iterator(_texts(settings), settings.vocab_size, show_progress=False)
    tokenizer.chat_template = CHATML
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer.save_pretrained(str(scratch))
        scratch.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _texts(settings: TokenizerSettings) -> Iterator[str]:
    for file in settings.files or ():
        for where, row in load_rows(SourceSettings(path=file, num_rows=settings.num_rows)):
            yield from (*ROLES, *texts_of(row, where))  # the template writes the roles into every row
