"""What a recipe says about its text: where rows come from, how they are read, how they are laid out."""

from typing import Literal

from pydantic import Field

from deltakd.base.settings import Settings


class SourceSettings(Settings):
    """One set of rows: a data set on the hub, or local .json, .jsonl, .jsonl.gz or .parquet files."""

    path: str = Field(description="A hub id such as HuggingFaceH4/ultrachat_200k, a file, or a folder or pattern of files.")
    subset: str | None = Field(None, description="The hub data set's configuration, where it has several.")
    split: str = Field("train", description="The split of a hub data set; ignored by nothing: local files have only train.")
    revision: str | None = Field(None, description="A commit or tag of the hub data set.")
    num_rows: int | None = Field(None, gt=0, description="Use only the first rows; null uses all.")
    skip_rows: int = Field(0, ge=0, description="Leave out the first rows, as where validation takes them from one split.")


class DataSettings(Settings):
    """Rows to tokens: format, template, length and layout, the same for every model of a run."""

    train: SourceSettings
    validation: SourceSettings | None = Field(None, description="Held-out rows for evaluation; must not overlap train.")
    format: Literal["messages", "math", "text"] = Field(
        "messages",
        description="messages: rows with `messages` [{role, content}]. math: `problem`, `generated_solution`, "
        "`expected_answer`. text: `text`, every token supervised.",
    )
    max_tokens: int = Field(2048, gt=1, description="The longest example, in tokens.")
    over_long: Literal["drop", "truncate"] = Field("drop", description="What happens to longer ones; counted either way.")
    layout: Literal["packed", "padded"] = Field(
        "packed", description="packed: documents side by side, none sees another, no padding. padded: one per row."
    )


class WorldSettings(Settings):
    """The generated world of the quickstart: invented persons, stories about them, and instruction data."""

    num_persons: int = Field(gt=1)
    num_stories: int = Field(gt=0)
    num_chats: int = Field(gt=0)
    num_validation: int = Field(gt=0)
    seed: int = 0


class TokenizerSettings(Settings):
    """A new tokenizer, trained on local rows: whole words for the generated world, byte-level BPE for real text."""

    kind: Literal["words", "byte_bpe"]
    files: list[str] = Field(min_length=1, description="Rows whose text it learns from: text, messages or math fields.")
    vocab_size: int = Field(4096, gt=4, description="Most tokens; words stops at the words it finds.")
    num_rows: int | None = Field(None, gt=0, description="Learn from the first rows of each file only.")
