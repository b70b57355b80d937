"""What a row says, before any tokenizer: turns of a chat, or plain text.

Formats make these (formats.py), templates lay them out as tokens (template.py). `where` is `file:row`, counted from
one, so that every later complaint can name the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """What one side says: role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A chat: an optional system turn, then user and assistant in turn, with at least one assistant turn.

    `answer` is what a math row states as its final answer and `also` what other answers are as good as the last turn;
    evaluation compares with them, training never sees them.
    """

    turns: tuple[Turn, ...]
    where: str
    answer: str | None = None
    also: tuple[str, ...] = ()

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns before the last assistant turn: what a model is asked in evaluation."""
        return self.turns[: self._last_assistant]

    @property
    def reference(self) -> str:
        """The content of the last assistant turn: what the prompt's answer is compared with."""
        return self.turns[self._last_assistant].content

    @property
    def _last_assistant(self) -> int:
        return max(index for index, turn in enumerate(self.turns) if turn.role == "assistant")


@dataclass(frozen=True)
class Document:
    """Plain text; all of it is learnt from."""

    text: str
    where: str


def as_messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Return turns in the form that chat templates take."""
    return [{"role": turn.role, "content": turn.content} for turn in turns]
