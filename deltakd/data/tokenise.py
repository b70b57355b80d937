"""Rows to examples, tokenised once and kept on disk for every rank and every restart.

Longer examples than `max_tokens` are dropped or cut, and counted; an example of which nothing is learnt is dropped, and
counted. With a cache folder the arrays are memory mapped (5 bytes per token on disk) under a name that covers all that
they depend on. The first process that needs them writes them; any number may try at once. Without one, the set stays in
this process's memory. A few hundred chats per second; tokenising uses all cores, rendering one.
"""

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from deltakd.base.errors import DataError
from deltakd.data.conversation import Conversation, Document
from deltakd.data.examples import Example, ExampleCounts, ExampleSet
from deltakd.data.formats import read_row
from deltakd.data.settings import DataSettings, SourceSettings
from deltakd.data.sources import Rows, identity, load_rows
from deltakd.data.template import ChatTemplate
from deltakd.data.tokenizer import digest as tokenizer_digest

RULES_VERSION = 1  # raise it when the same rows would give other examples; caches of other versions are not read
ROWS_AT_ONCE = 256  # tokenised together: enough for the tokenizer's threads, little memory


def build_examples(
    settings: DataSettings, source: SourceSettings, tokenizer: Any, cache_folder: Path | None, progress: bool
) -> ExampleSet:
    """Read, render and tokenise a source, or load what an earlier call with the same inputs kept in `cache_folder`.

    Raises DataError for rows that do not fit the format, and where nothing is left to learn from.
    """
    template = ChatTemplate(tokenizer)
    if cache_folder is None:
        return _tokenise(settings, source, template, progress)
    inputs = {
        "rules_version": RULES_VERSION,
        "rows": identity(source),
        "source": source.model_dump(),
        "format": settings.format,
        "supervise": settings.supervise,
        "max_tokens": settings.max_tokens,
        "over_long": settings.over_long,
        "tokenizer": tokenizer_digest(tokenizer),
    }
    folder = cache_folder / hashlib.blake2b(json.dumps(inputs).encode(), digest_size=12).hexdigest()
    if not folder.exists():
        _write(_tokenise(settings, source, template, progress), inputs, folder)
    return _read(folder)


def _tokenise(settings: DataSettings, source: SourceSettings, template: ChatTemplate, progress: bool) -> ExampleSet:
    rows = load_rows(source)
    counts: Counter[str] = Counter()
    kept: list[Example] = []
    for example in _encode_rows(rows, settings.format, template, f"Tokenising {source.path}", progress):
        counts["rows"] += 1
        if settings.supervise == "all":
            example = Example(example.tokens, np.arange(len(example.tokens)) > 0)
        if len(example.tokens) > settings.max_tokens:
            if settings.over_long == "drop":
                counts["dropped_over_long"] += 1
                continue
            counts["truncated"] += 1
            example = Example(example.tokens[: settings.max_tokens], example.supervised[: settings.max_tokens])
        if example.supervised.any():
            kept.append(example)
        else:
            counts["dropped_unsupervised"] += 1
    if not kept:
        raise DataError(
            f"{source.path}: nothing to learn from in {counts['rows']:,} rows: {counts['dropped_over_long']:,} are "
            f"longer than data.max_tokens {settings.max_tokens:,}, {counts['dropped_unsupervised']:,} hold no "
            "supervised token within it. Write a larger data.max_tokens, or other rows."
        )
    lengths = np.array([len(example.tokens) for example in kept], dtype=np.int64)
    tokens = np.concatenate([example.tokens for example in kept])
    supervised = np.concatenate([example.supervised for example in kept])
    counts.update(tokens=len(tokens), supervised_tokens=int(supervised.sum()))
    return ExampleSet(tokens, supervised, np.cumsum(lengths) - lengths, lengths, ExampleCounts(**counts))


def _encode_rows(rows: Rows, format: str, template: ChatTemplate, title: str, progress: bool) -> Iterator[Example]:
    shown = track(rows, title, total=len(rows), console=Console(stderr=True), disable=not progress, update_period=0.5)
    read = (read_row(row, format, where) for where, row in shown)
    while batch := list(islice(read, ROWS_AT_ONCE)):
        yield from _encode(batch, template)


def _encode(batch: Sequence[Conversation | Document], template: ChatTemplate) -> list[Example]:
    documents = [row for row in batch if isinstance(row, Document)]
    if documents:  # a format gives one kind, so a batch holds one kind
        return template.encode_documents(documents)
    return template.encode([row for row in batch if isinstance(row, Conversation)])


def _write(examples: ExampleSet, inputs: dict[str, Any], folder: Path) -> None:
    """Write beside the folder and rename: readers see all of it or nothing, and of several writers the first stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        np.save(scratch / "tokens.npy", examples.tokens)
        np.save(scratch / "supervised.npy", examples.supervised)
        np.save(scratch / "lengths.npy", examples.lengths)
        manifest = {"inputs": inputs, "counts": asdict(examples.counts)}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        scratch.chmod(0o755)  # mkdtemp makes it private
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read(folder: Path) -> ExampleSet:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        tokens, supervised, lengths = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "supervised", "lengths")
        )
        counts = ExampleCounts(**manifest["counts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: a damaged cache of examples ({error}). Delete the folder.") from error
    if not len(tokens) == len(supervised) == int(lengths.sum()) == counts.tokens:
        raise DataError(f"{folder}: a damaged cache of examples (sizes disagree). Delete the folder.")
    return ExampleSet(tokens, supervised, np.cumsum(lengths) - lengths, np.asarray(lengths), counts)
