"""What a recipe says about its text: where rows come from, how they are read, how they are laid out."""

from typing import Literal

from pydantic import Field

from deltakd.base.settings import Settings


class SourceSettings(Settings):
    """One set of rows: a data set on the hub, or local .json, .jsonl, .jsonl.gz or .parquet files."""

    path: str = Field(description="A hub id as HuggingFaceH4/ultrachat_200k, a file, or a folder or pattern of files.")
    subset: str | None = Field(None, description="The hub data set's configuration, where it has several.")
    split: str = Field("train", description="The split of a hub data set; local files have only train.")
    revision: str | None = Field(None, description="A commit or tag of the hub data set.")
    where: dict[str, list[str | int | float | bool]] | None = Field(
        None, description="Only rows whose column holds one of these values: {problem_type: [has_answer_extracted]}."
    )
    max_characters: dict[str, int] | None = Field(
        None, description="Only rows whose column is no longer than that: {generated_solution: 12_000}."
    )
    num_rows: int | None = Field(
        None,
        gt=0,
        description="Use only the first rows, of those that are let in; null: all. Of the hub no more is read.",
    )
    skip_rows: int = Field(0, ge=0, description="Leave out the first rows, where validation takes them.")

    @property
    def chooses(self) -> bool:
        """Whether rows are let in by what they hold."""
        return bool(self.where or self.max_characters)


class CorpusSettings(SourceSettings):
    """Plain text that is learnt beside a method's own tokens, so that language is not forgotten (MiniLLM, DistiLLM)."""

    weight: float = Field(1.0, gt=0, description="Of its mean cross-entropy in the loss of a step.")
    tokens_per_step: int | None = Field(None, gt=1, description="Beside each step; null: train.tokens_per_step.")


class DataSettings(Settings):
    """Rows to tokens: format, template, length and layout, the same for every model of a run."""

    train: SourceSettings
    validation: SourceSettings | None = Field(None, description="Held-out rows for evaluation, none of train.")
    corpus: CorpusSettings | None = Field(
        None, description="Rows of text, or of `format`, learnt whole and by cross-entropy alone beside every step."
    )
    apart: Literal["rows", "prompts"] = Field(
        "rows",
        description="What of data.validation is never trained on. prompts: no other answer to its prompts either, "
        "where a set holds several solutions of a problem.",
    )
    format: Literal["messages", "math", "text"] = Field(
        "messages",
        description="messages: rows with `messages` [{role, content}]. math: `problem`, `generated_solution`, "
        "`expected_answer`. text: `text`, every token supervised.",
    )
    supervise: Literal["assistant", "all"] = Field(
        "assistant",
        description="assistant: what the assistant writes, end-of-turn token included. all: every token but the first, "
        "as in pretraining. A text has no assistant: it is always learnt whole.",
    )
    max_tokens: int = Field(2048, gt=1, description="The longest example, in tokens.")
    over_long: Literal["drop", "truncate"] = Field(
        "drop", description="What happens to longer ones; counted either way."
    )
    layout: Literal["packed", "padded"] = Field(
        "packed", description="packed: documents side by side, none sees another, no padding. padded: one per row."
    )


class WorldSettings(Settings):
    """The generated world of the quickstart: invented persons, raw dialogues about them, and chats that teach."""

    num_persons: int = Field(gt=1, description="The chats teach on a part of them; raw rows are about all.")
    num_raw: int = Field(gt=0, description="Rows of raw_train.jsonl.")
    num_chats: int = Field(gt=0, description="Rows of chat_train.jsonl.")
    num_validation: int = Field(gt=0, description="Rows of each of the three validation files.")
    seed: int = 0


class TokenizerSettings(Settings):
    """A new tokenizer, trained on local rows: byte-level BPE, split as Qwen2 splits."""

    files: list[str] | None = Field(
        None, min_length=1, description="Rows whose text it learns from, of any format; null: those of data.train."
    )
    vocab_size: int = Field(4096, gt=0, description="Most tokens, 256 bytes and three special ones among them.")
    num_rows: int | None = Field(None, gt=0, description="Learn from the first rows of each file only.")
