"""Rows to conversations or documents: the only file that knows the names of a data set's columns.

A row that does not fit is refused with its place, what it holds and what to do; nothing is repaired or skipped here.
"""

from collections.abc import Callable, Mapping
from typing import Any

from deltakd.base.errors import DataError
from deltakd.data.conversation import Conversation, Document, Turn

Row = Mapping[str, Any]
ROLES = ("system", "user", "assistant")


def read_row(row: Row, format: str, where: str) -> Conversation | Document:
    """Read one row in the named format (a key of FORMATS); `where` is its `file:row`."""
    return FORMATS[format](row, where)


def texts_of(row: Row, where: str) -> list[str]:
    """Return the texts of a row whose format is known by its columns, for a tokenizer to learn from."""
    if row.get("messages") is not None:
        return [turn.content for turn in read_messages(row, where).turns]
    if row.get("problem") is not None:
        return [turn.content for turn in read_math(row, where).turns]
    if row.get("text") is not None:
        return [read_text(row, where).text]
    raise DataError(
        f"{where}: the row has {_columns(row)}, none of messages, problem or text. Write rows in one of these formats."
    )


def read_messages(row: Row, where: str) -> Conversation:
    """Read `messages`: a list of {role, content}, and `other_answers`, texts that are as good as the last turn."""
    messages = row.get("messages")
    if messages is None:
        raise DataError(
            f"{where}: the row has {_columns(row)} and no messages. "
            "Write `messages` [{role, content}], or the data.format that these rows have."
        )
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages is {_brief(messages)}. Write a list of at least two {{role, content}}.")
    turns = tuple(_read_turn(message, f"{where}: messages[{index}]") for index, message in enumerate(messages))
    _refuse_order(turns, where)
    return Conversation(turns, where, also=_also(row, where))


def read_math(row: Row, where: str) -> Conversation:
    """Read `problem` and `generated_solution` as one exchange, and `expected_answer` where the row has it."""
    turns = (
        Turn("user", _content(row.get("problem"), f"{where}: problem")),
        Turn("assistant", _content(row.get("generated_solution"), f"{where}: generated_solution")),
    )
    answer = row.get("expected_answer")
    return Conversation(turns, where, None if answer is None else str(answer), _also(row, where))


def read_text(row: Row, where: str) -> Document:
    """Read `text`."""
    return Document(_content(row.get("text"), f"{where}: text"), where)


def _also(row: Row, where: str) -> tuple[str, ...]:
    given = row.get("other_answers")
    if given is None:
        return ()
    if not isinstance(given, list):
        raise DataError(f"{where}: other_answers is {_brief(given)}. Write a list of texts, or leave the column out.")
    return tuple(_content(one, f"{where}: other_answers[{index}]") for index, one in enumerate(given))


def _read_turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is {_brief(message)}. Write {{role, content}}.")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{where}: role is {_brief(role)}. Write one of {', '.join(ROLES)}, or leave the row out.")
    return Turn(role, _content(message.get("content"), f"{where}: content of the {role}"))


def _content(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {_brief(value)}, not a text. Write a string, or leave the row out.")
    if not value.strip():
        raise DataError(f"{where} is empty. Write a text, or leave the row out.")
    return value


def _refuse_order(turns: tuple[Turn, ...], where: str) -> None:
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != [("user", "assistant")[index % 2] for index in range(len(spoken))]:
        raise DataError(
            f"{where}: the roles are {_brief_roles(roles)}. "
            "Write an optional system turn, then user and assistant in turn, user first."
        )
    if "assistant" not in roles:
        raise DataError(f"{where}: no assistant turn among {_brief_roles(roles)}. Add one, or leave the row out.")


def _brief_roles(roles: list[str]) -> str:
    return ", ".join(roles[:8]) + (f", ... ({len(roles)} turns)" if len(roles) > 8 else "")


def _brief(value: Any) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _columns(row: Row) -> str:
    present = [str(name) for name, value in row.items() if value is not None]
    return f"the columns {', '.join(present)}" if present else "no columns"


FORMATS: dict[str, Callable[[Row, str], Conversation | Document]] = {
    "messages": read_messages,
    "math": read_math,
    "text": read_text,
}
