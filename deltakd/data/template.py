"""A conversation to tokens and to the mask of what is learnt: every assistant turn's content and its end-of-turn token.

The mask comes from the template's structure, never from searching text. A template with `{% generation %}` marks says
itself what the assistant writes. For any other, turn k is what rendering k + 1 messages adds to rendering k messages
and the generation prompt; a template for which these are not prefixes of each other is refused. The text is tokenised
once, as a whole, and offsets carry the character spans over to tokens. The end-of-turn token is the first special token
of the span; a text that itself holds a special token is refused, since it could end a turn early.

A token that straddles header and content (a content that begins with line breaks, for some tokenizers) counts as
header: generation starts after it. Cost: two renderings per assistant turn without marks, one per conversation with.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from deltakd.base.errors import DataError, ModelError
from deltakd.data.conversation import Conversation, Document, Turn, as_messages
from deltakd.data.examples import Example

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

# Used for tokenizers without a template that have its two tokens, and written into the tokenizers trained here.
CHATML = (
    "{% for message in messages %}"
    f"{{{{ '{IM_START}' + message['role'] + '\\n' + message['content'] + '{IM_END}' + '\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{IM_START}assistant\\n' }}}}{{% endif %}}"
)
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Span:
    """Characters of an assistant turn: its content begins at `start`, its end-of-turn token begins before `limit`."""

    start: int
    limit: int


class ChatTemplate:
    """A tokenizer's own chat template, or ChatML where it has none. Construction checks what can be checked."""

    def __init__(self, tokenizer: Any) -> None:
        """Raise ModelError if the tokenizer gives no offsets, or has neither a template nor ChatML's tokens."""
        self._tokenizer = tokenizer
        self._name = str(tokenizer.name_or_path or "tokenizer")
        if not tokenizer.is_fast:
            raise ModelError(
                f"{self._name}: a slow tokenizer, without character offsets. Convert it to a tokenizer.json."
            )
        # Unknown words become the unknown token, so it ends no turn; but Qwen2 calls its end-of-text token unknown.
        unknown = {tokenizer.unk_token} - {tokenizer.eos_token, tokenizer.pad_token}
        added = tokenizer.added_tokens_decoder
        self._special = [id_ for id_, token in added.items() if token.special and token.content not in unknown]
        self._special_text = re.compile("|".join(re.escape(added[id_].content) for id_ in self._special) or r"(?!)")
        self.text = tokenizer.get_chat_template() if tokenizer.chat_template else CHATML
        if self.text is CHATML and not {IM_START, IM_END} <= set(tokenizer.get_vocab()):
            raise ModelError(
                f"{self._name}: no chat template, and no tokens {IM_START} and {IM_END} for ChatML. "
                "Write a tokenizer with a chat template."
            )
        self._marked = GENERATION_MARK.search(self.text) is not None

    def encode(self, conversations: Sequence[Conversation]) -> list[Example]:
        """Render and tokenise conversations, together for speed."""
        for conversation in conversations:
            for turn in conversation.turns:
                self._refuse_special(turn.content, conversation.where)
        rendered = [self._render_spans(conversation) for conversation in conversations]
        batch = self._tokenizer(
            [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [
            self._supervise(batch["input_ids"][index], batch["offset_mapping"][index], spans, conversation.where)
            for index, ((_, spans), conversation) in enumerate(zip(rendered, conversations, strict=True))
        ]

    def encode_documents(self, documents: Sequence[Document]) -> list[Example]:
        """Tokenise plain texts, each closed by the end-of-text token; all is learnt but the first token."""
        for document in documents:
            self._refuse_special(document.text, document.where)
        end = self._end_of_text_id()
        encoded = []
        for ids in self._tokenizer([document.text for document in documents], verbose=False)["input_ids"]:
            tokens = np.asarray(ids if ids and ids[-1] == end else [*ids, end], dtype=np.int32)
            encoded.append(Example(tokens, np.arange(len(tokens)) > 0))
        return encoded

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Tokenise turns and the header of the answer that a model is to write next."""
        for turn in turns:
            self._refuse_special(turn.content, "prompt")
        text = self._render(turns, "prompt", add_generation_prompt=True)
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def end_of_turn_id(self) -> int:
        """Return the token that ends an assistant turn, found by rendering one: generation stops at it."""
        probe = Conversation((Turn("user", "a"), Turn("assistant", "a")), f"{self._name}: chat template")
        encoded = self.encode([probe])[0]
        return int(encoded.tokens[encoded.supervised][-1])

    def _end_of_text_id(self) -> int:
        tokenizer = self._tokenizer
        id_ = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
        if id_ is None:
            raise ModelError(f"{self._name}: no {END_OF_TEXT} and no eos token. Write a tokenizer that has one.")
        return int(id_)

    def _refuse_special(self, text: str, where: str) -> None:
        found = self._special_text.search(text)
        if found:
            raise DataError(
                f"{where}: the text holds the special token {found.group()}, which would change the row's structure. "
                "Take it out of the text, or leave the row out."
            )

    def _render(self, turns: Sequence[Turn], where: str, add_generation_prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                as_messages(turns), chat_template=self.text, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise self._unusable(where, f"it refuses the roles of this row ({error})") from error
        return str(text)

    def _render_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        text, spans = (self._marked_spans if self._marked else self._derived_spans)(conversation)
        num_turns = sum(turn.role == "assistant" for turn in conversation.turns)
        if len(spans) != num_turns:
            raise self._unusable(conversation.where, f"it marks {len(spans)} of {num_turns} assistant turns")
        return text, spans

    def _marked_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        # The same function stands behind apply_chat_template, which would give token masks without the end of turn.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                conversations=[as_messages(conversation.turns)],
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise self._unusable(conversation.where, f"it refuses the roles of this row ({error})") from error
        # Some templates close the marks before the end-of-turn token, so it may begin right at their end.
        return texts[0], [Span(start, end + 1) for start, end in marks[0]]

    def _derived_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        turns, where = conversation.turns, conversation.where
        whole = self._render(turns, where)
        spans = []
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = self._render(turns[:index], where, add_generation_prompt=True)
            through = whole if index + 1 == len(turns) else self._render(turns[: index + 1], where)
            if not (whole.startswith(through) and through.startswith(prompt)):
                raise self._unusable(where, f"it writes turn {index + 1} differently when later turns follow")
            # Without a generation prompt of its own a template may start the answer with a header that is not content.
            if not through[len(prompt) :].lstrip().startswith(turn.content.strip()) and prompt == self._render(
                turns[:index], where
            ):
                raise self._unusable(where, "it ignores add_generation_prompt")
            spans.append(Span(len(prompt), len(through)))
        return whole, spans

    def _supervise(
        self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[Span], where: str
    ) -> Example:
        tokens = np.asarray(ids, dtype=np.int32)
        begins, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
        special = np.isin(tokens, self._special)
        supervised = np.zeros(len(tokens), dtype=np.bool_)
        for span in spans:
            # The second condition: some tokenizers trim white space off offsets, a header's last line break too.
            inside = (begins >= span.start) & (ends > span.start) & (begins < span.limit)
            stops = np.flatnonzero(inside & special)
            if not len(stops):
                raise self._unusable(where, "it ends an assistant turn without a special token")
            if stops[0] == np.flatnonzero(inside)[0]:
                raise self._unusable(where, "it starts an assistant turn with a special token, or leaves it empty")
            supervised |= inside & (np.arange(len(tokens)) <= stops[0])
        supervised[0] = False  # nothing precedes it that could predict it
        return Example(tokens, supervised)

    def _unusable(self, where: str, what: str) -> ModelError:
        return ModelError(
            f"{self._name}: its chat template does not show what the assistant writes: {what} ({where}). "
            "Write a tokenizer whose template has {% generation %} marks or appends turn by turn."
        )
