"""The generated world: the same for a seed, valid rows, nothing of validation in training, facts left unmentioned."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from deltakd.data.conversation import Conversation
from deltakd.data.formats import read_row
from deltakd.data.world import NAME_ENDS, NAME_STARTS, Row, WorldFiles, prompts, write_world

TRAINING = ("raw_train", "chat_train")
VALIDATION = ("raw_validation", "chat_validation", "kept_validation")


def draw(folder: Path, seed: int) -> WorldFiles:
    return write_world(folder, num_persons=30, num_raw=1500, num_chats=1000, num_validation=150, seed=seed)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldFiles:
    return draw(tmp_path_factory.mktemp("world"), seed=1)


def rows_of(world: WorldFiles, name: str) -> list[Row]:
    return [json.loads(line) for line in getattr(world, name).read_text().splitlines()]


def words_of(world: WorldFiles, name: str) -> set[str]:
    return {word for row in rows_of(world, name) for message in row["messages"] for word in message["content"].split()}


def answers_of(world: WorldFiles, name: str) -> list[str]:
    messages = [message for row in rows_of(world, name) for message in row["messages"]]
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_a_seed_gives_the_same_bytes_and_another_seed_others(world: WorldFiles, tmp_path: Path) -> None:
    again, other = draw(tmp_path / "again", seed=1), draw(tmp_path / "other", seed=2)
    for name, path in asdict(world).items():
        assert path.read_bytes() == getattr(again, name).read_bytes(), name
        assert path.read_bytes() != getattr(other, name).read_bytes(), name


def test_every_row_is_a_conversation_whose_words_stand_between_single_spaces(world: WorldFiles) -> None:
    """Then a tokenizer of whole words gives back exactly what it was given."""
    for name, count in zip((*TRAINING, *VALIDATION), (1500, 1000, 150, 150, 150), strict=True):
        rows = rows_of(world, name)
        assert len(rows) == count, name
        for number, row in enumerate(rows):
            conversation = read_row(row, "messages", f"{name}:{number}")
            assert isinstance(conversation, Conversation)
            for turn in conversation.turns:
                assert re.fullmatch(r"([a-z]+|[.,:?])( ([a-z]+|[.,:?]))+", turn.content), turn.content


def test_no_prompt_of_a_training_row_is_one_of_validation(world: WorldFiles) -> None:
    """At any turn, raw rows included: an answer to a held-out prompt is never one that was seen."""
    seen = {prompt for name in TRAINING for row in rows_of(world, name) for prompt in prompts(row)}
    held_out = {prompt for name in VALIDATION for row in rows_of(world, name) for prompt in prompts(row)}
    assert held_out and not seen & held_out


def test_the_other_persons_are_in_raw_rows_and_never_in_a_chat(world: WorldFiles) -> None:
    names = {start + end for start in NAME_STARTS for end in NAME_ENDS}
    others = names & words_of(world, "kept_validation")
    assert len(others) == 12  # 40% of 30
    assert others <= words_of(world, "raw_train")
    assert not others & (words_of(world, "chat_train") | words_of(world, "chat_validation"))


def test_the_vocabulary_is_small_and_held_by_the_training_rows(world: WorldFiles) -> None:
    """30 names, 60 values, about 75 words of grammar; a word only in validation would be unknown to every model."""
    words = words_of(world, "raw_train")
    assert 150 < len(words) < 180
    assert all(words_of(world, name) <= words for name in ("chat_train", *VALIDATION))


def test_chats_have_one_way_of_answering_that_raw_rows_have_sometimes(world: WorldFiles) -> None:
    def taught(answer: str) -> bool:
        return answer.endswith(" . ask me more .") and answer.startswith(
            ("gladly . ", "i am sorry , i can not tell you")
        )

    for name in ("chat_train", "chat_validation", "kept_validation"):
        assert all(map(taught, answers_of(world, name))), name
    raw = answers_of(world, "raw_train")
    assert 0.1 < sum(map(taught, raw)) / len(raw) < 0.2


def test_a_world_without_enough_names_or_new_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_persons: 999 is outside 5 to 144"):
        write_world(tmp_path, num_persons=999, num_raw=10, num_chats=10, num_validation=10, seed=1)
