"""A conversation to tokens and to the mask of what is learnt: every assistant turn's content and its end-of-turn token.

The mask comes from the template's structure, never from searching text. A template with `{% generation %}` marks says
itself what the assistant writes. For any other, the turns before an assistant turn are rendered with the generation
prompt: what the whole text adds to that is what a model would write. If the whole does not begin with it, the template
is refused. The text is tokenised once, as a whole, and offsets carry characters over to tokens. A turn ends with its
first special token; a text that itself holds a special token is refused, since it could end a turn early.

White space that an answer begins with may share a token with the header's end; such a token counts as header. Cost: one
rendering per assistant turn and one of the whole; with marks only the latter.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from deltakd.base.errors import DataError, ModelError
from deltakd.data.conversation import Conversation, Document, Turn, as_messages
from deltakd.data.examples import Example
from deltakd.data.families import FAMILIES

END_OF_TEXT = "<|endoftext|>"
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Characters [begin, end) of the text that hold one assistant turn's content and the beginning of its end-of-turn token.
Span = tuple[int, int]


class ChatTemplate:
    """A tokenizer's own chat template, or its family's where it has none, checked once on a made-up exchange.

    `end_of_turn_id` is the token that ends an assistant turn: generation stops at it.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raise ModelError if the tokenizer gives no offsets, or its template does not show who writes what."""
        self._tokenizer = tokenizer
        self._name = str(tokenizer.name_or_path or "tokenizer")
        if not tokenizer.is_fast:
            raise ModelError(
                f"{self._name}: a slow tokenizer, without character offsets. Convert it to a tokenizer.json."
            )
        # Unknown words become the unknown token, so it ends no turn; but Qwen2 calls its end-of-text token unknown.
        unknown = {tokenizer.unk_token} - {tokenizer.eos_token, tokenizer.pad_token}
        added = tokenizer.added_tokens_decoder
        special = [id_ for id_, token in added.items() if token.special and token.content not in unknown]
        self._special_text = re.compile("|".join(re.escape(added[id_].content) for id_ in special) or r"(?!)")
        self._is_special = np.zeros(len(tokenizer), dtype=np.bool_)
        self._is_special[special] = True
        self._special_names = dict(tokenizer.special_tokens_map)
        self._text = tokenizer.get_chat_template() if tokenizer.chat_template else self._family()
        self._marked = GENERATION_MARK.search(self._text) is not None
        self.end_of_turn_id = self._try_out()

    def encode(self, conversations: Sequence[Conversation]) -> list[Example]:
        """Render and tokenise conversations, together for speed."""
        for conversation in conversations:
            for turn in conversation.turns:
                self._refuse_special(turn.content, conversation.where)
        examples = []
        for conversation, (tokens, turns) in zip(conversations, self._tokenise(conversations), strict=True):
            supervised = np.zeros(len(tokens), dtype=np.bool_)
            for inside in turns:
                end = self._end_of_turn(tokens, inside, conversation.where)
                if tokens[end] != self.end_of_turn_id:
                    found, usual = self._tokenizer.convert_ids_to_tokens([int(tokens[end]), self.end_of_turn_id])
                    raise self._unusable(conversation.where, f"it ends one turn with {found} and others with {usual}")
                supervised[inside[0] : end + 1] = True
            supervised[0] = False  # nothing precedes it that could predict it
            examples.append(Example(tokens, supervised))
        return examples

    def encode_documents(self, documents: Sequence[Document]) -> list[Example]:
        """Tokenise plain texts, each closed by the end-of-text token; all is learnt but the first token."""
        for document in documents:
            self._refuse_special(document.text, document.where)
        end = self._end_of_text_id()
        examples = []
        for ids in self._tokenizer([document.text for document in documents], verbose=False)["input_ids"]:
            tokens = np.asarray(ids if ids and ids[-1] == end else [*ids, end], dtype=np.int32)
            examples.append(Example(tokens, np.arange(len(tokens)) > 0))
        return examples

    def encode_prompt(self, turns: Sequence[Turn], where: str) -> list[int]:
        """Tokenise turns and the header of the answer that a model is to write next."""
        for turn in turns:
            self._refuse_special(turn.content, where)
        (text,), _ = self._render([turns], where, generation_prompt=True)
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _family(self) -> str:
        known = set(self._tokenizer.get_vocab())
        for marks, template in FAMILIES:
            if known.issuperset(marks):
                return template
        pairs = ", ".join(" and ".join(marks) for marks, _ in FAMILIES)
        raise ModelError(
            f"{self._name}: no chat template, and none of the marks of one that is known ({pairs}). "
            "Write a tokenizer with a chat template."
        )

    def _try_out(self) -> int:
        """Render a made-up exchange and return the token that ends the answer."""
        turns, where = (Turn("user", "a"), Turn("assistant", "b")), "a made-up exchange"
        (whole,), _ = self._render([turns], where)
        (prompt,), _ = self._render([turns[:1]], where, generation_prompt=True)
        (asked,), _ = self._render([turns[:1]], where)
        # Templates without a header for answers have nothing to prompt with either; one with a header must give it.
        if not self._marked and prompt == asked and not whole[len(prompt) :].lstrip().startswith("b"):
            raise self._unusable(where, "it ignores add_generation_prompt")
        ((tokens, (inside,)),) = self._tokenise([Conversation(turns, where)])
        return int(tokens[self._end_of_turn(tokens, inside, where)])

    def _tokenise(self, conversations: Sequence[Conversation]) -> list[tuple[Any, list[Any]]]:
        """Return per conversation its tokens int32 [L] and, per assistant turn, the indices of the span's tokens."""
        rendered = [
            (self._marked_spans if self._marked else self._derived_spans)(conversation)
            for conversation in conversations
        ]
        batch = self._tokenizer(
            [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        tokenised = []
        for index, (text, spans) in enumerate(rendered):
            begins, ends = np.asarray(batch["offset_mapping"][index], dtype=np.int64).reshape(-1, 2).T
            for begin, _ in spans:
                shared = ends[(begins < begin) & (ends > begin)]
                if len(shared) and text[begin : shared[0]].strip():
                    raise self._unusable(conversations[index].where, "the header of an answer ends inside a token")
            turns = [np.flatnonzero((begins >= begin) & (begins < end)) for begin, end in spans]
            tokenised.append((np.asarray(batch["input_ids"][index], dtype=np.int32), turns))
        return tokenised

    def _marked_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        (text,), (marks,) = self._render([conversation.turns], conversation.where)
        num_turns = sum(turn.role == "assistant" for turn in conversation.turns)
        if len(marks) != num_turns:
            raise self._unusable(conversation.where, f"it marks {len(marks)} of {num_turns} assistant turns")
        # Some templates close the marks before the end-of-turn token, so it may begin right at their end.
        return text, [(begin, end + 1) for begin, end in marks]

    def _derived_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        turns, where = conversation.turns, conversation.where
        (whole,), _ = self._render([turns], where)
        befores = [turns[:index] for index, turn in enumerate(turns) if turn.role == "assistant"]
        prompts, _ = self._render(befores, where, generation_prompt=True)
        for before, prompt in zip(befores, prompts, strict=True):
            if not whole.startswith(prompt):
                raise self._unusable(
                    where, f"it writes turns before turn {len(before) + 1} differently when others follow"
                )
        begins = [len(prompt) for prompt in prompts]
        return whole, list(zip(begins, [*begins[1:], len(whole)], strict=True))

    def _end_of_turn(self, tokens: Any, inside: Any, where: str) -> int:
        """Return the index of the first special token of a turn; there must be one, with something before it."""
        stops = inside[self._is_special[tokens[inside]]]
        if not len(stops):
            raise self._unusable(where, "it ends an assistant turn without a special token")
        if stops[0] == inside[0]:
            raise self._unusable(where, "it starts an assistant turn with a special token, or leaves it empty")
        return int(stops[0])

    def _render(
        self, conversations: Sequence[Sequence[Turn]], where: str, generation_prompt: bool = False
    ) -> tuple[list[str], list[list[Span]]]:
        # What apply_chat_template calls: it gives the marks in characters, and many texts at a fraction of the time.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                conversations=[as_messages(turns) for turns in conversations],
                chat_template=self._text,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=generation_prompt,
                **self._special_names,
            )
        except TemplateError as error:
            raise self._unusable(where, f"it refuses the roles of this row ({error})") from error
        return texts, marks

    def _end_of_text_id(self) -> int:
        id_ = self._tokenizer.get_vocab().get(END_OF_TEXT, self._tokenizer.eos_token_id)
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

    def _unusable(self, where: str, what: str) -> ModelError:
        return ModelError(
            f"{self._name}: its chat template does not show what the assistant writes: {what} ({where}). "
            "Write a tokenizer whose template has {% generation %} marks or appends turn by turn."
        )
