"""Responses that a model writes for many prompts, in chunks: which process writes a chunk, and when, changes nothing.

FOLDER/question.json     what is asked of whom: model, prompts, sampling
FOLDER/chunks/00012.jsonl    the responses to one chunk of prompts, whole or not there
FOLDER/responses.jsonl   all of them in the prompts' order, once the last chunk is there: rows of the format messages
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltakd.base.files import remove, write_text
from deltakd.data.conversation import Conversation, as_messages
from deltakd.evaluate.generate import Answer
from deltakd.evaluate.settings import GenerationSettings

CHUNK = 64  # prompts: what a kill costs at most, and enough of them that those of a batch are alike in length
ROWS = "responses.jsonl"
Write = Callable[[list[list[int]], int], Sequence[Answer]]  # prompts and a seed to their answers


@dataclass(frozen=True)
class Counts:
    """What became of the responses."""

    rows: int
    empty: int  # left out: there is nothing to learn from them
    unended: int  # that max_new_tokens cut off
    dropped: int  # of these, left out
    too_long: int  # prompts that leave no room for an answer

    def describe(self) -> str:
        """One line for people."""
        unended = (
            f", {self.unended:,} were cut off by max_new_tokens ({self.dropped:,} left out)" if self.unended else ""
        )
        empty = f", {self.empty:,} were empty and are left out" if self.empty else ""
        too_long = f", {self.too_long:,} prompts are too long to be answered" if self.too_long else ""
        return f"{self.rows:,} rows{unended}{empty}{too_long}"


def num_chunks(conversations: Sequence[Conversation]) -> int:
    """Return into how many chunks these prompts are cut."""
    return -(-len(conversations) // CHUNK)


def write_chunks(
    folder: Path,
    conversations: Sequence[Conversation],
    encode: Callable[[Conversation], list[int]],
    write: Write,
    settings: GenerationSettings,
    longest: int,
    numbers: Sequence[int],
    advance: Callable[[int], object],
) -> None:
    """Write those of the numbered chunks that are not there; `advance` hears of the prompts of each.

    A prompt of more than `longest` tokens is not answered.
    """
    for number in numbers:
        chosen = conversations[number * CHUNK : (number + 1) * CHUNK]
        path = _path(folder, number)
        if not path.exists():
            prompts = [(one, encode(one)) for one in chosen]
            asked = [pair for pair in prompts if len(pair[1]) <= longest for _ in range(settings.per_prompt)]
            answers = write([tokens for _, tokens in asked], chunk_seed(settings.seed, number)) if asked else []
            rows = [_row(one, answer) for (one, _), answer in zip(asked, answers, strict=True)]
            rows += [
                {"prompt_from": one.where, "too_long": len(tokens)} for one, tokens in prompts if len(tokens) > longest
            ]
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        advance(len(chosen))


def chunk_seed(seed: int, number: int) -> int:
    """Return what a chunk's draws begin with: its own, so that no other chunk must have been written before it."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def there(folder: Path, number: int) -> bool:
    """Tell whether a chunk has been written."""
    return _path(folder, number).exists()


def gather(folder: Path, count: int, unended: str) -> Counts:
    """Make one file of all chunks, leave out what cannot be learnt from, and remove the chunks."""
    counts = dict.fromkeys(("rows", "empty", "unended", "dropped", "too_long"), 0)

    def lines() -> Iterator[str]:
        for number in range(count):
            for line in _path(folder, number).read_text(encoding="utf-8").splitlines(keepends=True):
                row = json.loads(line)
                if "too_long" in row:
                    counts["too_long"] += 1
                    continue
                dropped = not row["ended"] and unended == "drop"
                counts["unended"] += not row["ended"]
                counts["dropped"] += dropped
                empty = not dropped and not row["messages"][-1]["content"]
                counts["empty"] += empty
                if not (dropped or empty):
                    counts["rows"] += 1
                    yield line

    write_text(folder / ROWS, "".join(lines()))
    remove(folder / "chunks")
    return Counts(**counts)


def _path(folder: Path, number: int) -> Path:
    return folder / "chunks" / f"{number:05}.jsonl"


def _row(conversation: Conversation, answer: Answer) -> dict[str, object]:
    said = [*as_messages(conversation.prompt), {"role": "assistant", "content": answer.text}]
    stated = {} if conversation.answer is None else {"expected_answer": conversation.answer}
    return {"messages": said, "prompt_from": conversation.where, "ended": answer.ended, **stated}
