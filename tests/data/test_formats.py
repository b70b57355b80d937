"""Rows are read as they stand, or refused with their place, what they hold and what to do."""

import pytest

from deltakd.base.errors import DataError
from deltakd.data.conversation import Conversation, Document, Turn
from deltakd.data.formats import read_row, texts_of

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def test_each_format_reads_its_columns_and_ignores_others():
    chat = read_row({"messages": [SYSTEM, USER, ASSISTANT], "prompt_id": 3}, "messages", "f:1")
    assert chat == Conversation((Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a")), "f:1")
    math = read_row({"problem": "1+1", "generated_solution": "two", "expected_answer": 2, "x": None}, "math", "f:2")
    assert math == Conversation((Turn("user", "1+1"), Turn("assistant", "two")), "f:2", answer="2")
    assert read_row({"text": " kept as it is\n"}, "text", "f:3") == Document(" kept as it is\n", "f:3")


def test_the_prompt_of_a_conversation_ends_before_its_last_answer():
    chat = read_row({"messages": [SYSTEM, USER, ASSISTANT, USER, {**ASSISTANT, "content": "b"}]}, "messages", "f:1")
    assert isinstance(chat, Conversation)
    assert [turn.content for turn in chat.prompt] == ["s", "q", "a", "q"]
    assert chat.reference == "b"


@pytest.mark.parametrize(
    ("format", "row", "fragment"),
    [
        ("messages", {"text": "x", "id": None}, "the columns text and no messages"),
        ("messages", {"messages": []}, "messages is []"),
        ("messages", {"messages": "hello"}, "messages is 'hello'"),
        ("messages", {"messages": ["hello"]}, "messages[0] is 'hello'"),
        ("messages", {"messages": [ASSISTANT, USER]}, "the roles are assistant, user"),
        ("messages", {"messages": [USER, USER, ASSISTANT]}, "the roles are user, user, assistant"),
        ("messages", {"messages": [USER, SYSTEM, ASSISTANT]}, "the roles are user, system, assistant"),
        ("messages", {"messages": [SYSTEM, ASSISTANT]}, "the roles are system, assistant"),
        ("messages", {"messages": [SYSTEM, USER]}, "no assistant turn among system, user"),
        ("messages", {"messages": [SYSTEM]}, "no assistant turn among system"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0]: role is 'tool'"),
        ("messages", {"messages": [{"content": "x"}]}, "messages[0]: role is missing"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": 3}]}, "content of the assistant is 3"),
        ("messages", {"messages": [USER, {"role": "assistant"}]}, "messages[1]: content of the assistant is missing"),
        ("messages", {"messages": [{"role": "user", "content": " \n"}, ASSISTANT]}, "content of the user is empty"),
        ("messages", {"messages": [USER, ASSISTANT], "other_answers": "x"}, "other_answers is 'x'"),
        ("messages", {"messages": [USER, ASSISTANT], "other_answers": ["x", ""]}, "other_answers[1] is empty"),
        ("math", {"problem": "p", "generated_solution": None}, "generated_solution is missing"),
        ("math", {"problem": "", "generated_solution": "s"}, "problem is empty"),
        ("text", {"text": ["a"]}, "text is ['a'], not a text"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_its_place_and_what_it_holds(format, row, fragment):
    with pytest.raises(DataError) as refusal:
        read_row(row, format, "rows.jsonl:7")
    message = str(refusal.value)
    assert message.startswith("rows.jsonl:7: ") and fragment in message
    assert ". Write " in message or ". Add " in message


def test_other_answers_are_kept_beside_the_last_turn():
    for format, row in (
        ("messages", {"messages": [USER, ASSISTANT]}),
        ("math", {"problem": "q", "generated_solution": "a"}),
    ):
        assert read_row({**row, "other_answers": ["b", "c"]}, format, "f:1").also == ("b", "c")
        assert read_row({**row, "other_answers": None}, format, "f:1").also == ()


def test_a_tokenizer_learns_from_any_format_and_refuses_rows_of_none():
    assert texts_of({"messages": [USER, ASSISTANT], "text": None}, "f:1") == ["q", "a"]
    assert texts_of({"problem": "p", "generated_solution": "s"}, "f:1") == ["p", "s"]
    assert texts_of({"text": "t"}, "f:1") == ["t"]
    with pytest.raises(DataError, match=r"f:1: the row has the columns body, none of messages, problem or text"):
        texts_of({"body": "x"}, "f:1")
