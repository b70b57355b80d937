"""What is learnt: every assistant turn's content and its end-of-turn token, whatever the template and the text."""

import copy
import json
import unicodedata
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltakd.base.errors import DataError, ModelError
from deltakd.data.conversation import Conversation, Document, Turn
from deltakd.data.families import CHATML
from deltakd.data.template import ChatTemplate

# ChatML that puts a system turn of its own before conversations without one, as Qwen2.5 does.
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # as Llama 3: a start of text, headers, trimmed contents
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
BRACKETS = (  # as Mistral: nothing stands before an answer, and add_generation_prompt adds nothing
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|eot|>"
    "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "default_system": (DEFAULT_SYSTEM, "<|im_end|>"),
    "headers": (HEADERS, "<|eot|>"),
    "brackets": (BRACKETS, "<|eot|>"),
    "marked": (MARKED, "<|im_end|>"),
    "marked_without_end": (MARKED_WITHOUT_END, "<|im_end|>"),
}


def with_template(tokenizer: Any, template: str | None) -> Any:
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|head|>", "<|/head|>", "<|eot|>"]})
    other.add_special_tokens({"bos_token": "<|begin|>"})
    other.chat_template = template
    return other


@pytest.fixture(scope="session")
def templates(byte_bpe) -> dict[str, tuple[Any, ChatTemplate]]:
    tokenizers = {name: with_template(byte_bpe, template) for name, (template, _) in TEMPLATES.items()}
    return {name: (tokenizer, ChatTemplate(tokenizer)) for name, tokenizer in tokenizers.items()}


def chat(*contents: str) -> Conversation:
    return Conversation(tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)), "f:1")


# Any text in Unicode's NFC form, into which Qwen2's tokenizer brings every other; white space in front may melt into
# the header's last token, which has its own test below.
contents = (
    st.text(max_size=20)
    .map(lambda text: unicodedata.normalize("NFC", text).lstrip())
    .filter(lambda text: text and "<|" not in text)
)
exchanges = st.lists(st.tuples(contents, contents), min_size=1, max_size=3)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(exchanges=exchanges, system=st.none() | contents)
def test_the_learnt_tokens_are_the_answers_and_their_ends_and_begin_where_a_prompt_ends(
    templates, name, exchanges, system
):
    tokenizer, template = templates[name]
    turns = [Turn("system", system)] if system else []
    for question, answer in exchanges:
        turns += [Turn("user", question), Turn("assistant", answer)]
    example = template.encode([Conversation(tuple(turns), "f:1")])[0]

    end = TEMPLATES[name][1]
    answers = [answer.strip() if name == "headers" else answer for _, answer in exchanges]
    assert tokenizer.decode(example.tokens[example.supervised]) == "".join(answer + end for answer in answers)
    # Nothing but decoding would tell an answer from a user who says the same: its place does.
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            prompt = template.encode_prompt(turns[:index], "f:1")
            assert example.tokens[: len(prompt)].tolist() == prompt
            assert not example.supervised[len(prompt) - 1] and example.supervised[len(prompt)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_stops_at_the_last_learnt_token_of_every_turn(templates, name):
    tokenizer, template = templates[name]
    assert tokenizer.convert_ids_to_tokens(template.end_of_turn_id) == TEMPLATES[name][1]


def test_tokens_are_those_of_the_rendered_text_as_a_whole(templates):
    tokenizer, template = templates["default_system"]
    example = template.encode([chat("hi", "you", "hi", "soup")])[0]
    messages = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 2, ("hi", "you", "hi", "soup"), strict=True)
    ]
    assert example.tokens.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)


def test_a_line_break_before_an_answer_that_melts_into_the_header_is_not_learnt(templates):
    tokenizer, template = templates["chatml"]
    example = template.encode([chat("q", "\nanswer\n")])[0]
    assert "assistant\n\nanswer\n<|im_end|>" in tokenizer.decode(example.tokens)
    assert tokenizer.decode(example.tokens[example.supervised]) == "answer\n<|im_end|>"


def test_words_split_at_white_space_are_learnt_the_same_way(words):
    template = ChatTemplate(words)
    example = template.encode([chat("where does person 3 live ?", "zebra lives in town 1", "and ?", "soup zebra")])[0]
    learnt = words.decode(example.tokens[example.supervised])
    # A zebra is unknown: the unknown token is special too, and must end no turn.
    assert learnt == "<unk> lives in town 1 <|im_end|> soup <unk> <|im_end|>"
    assert template.encode_prompt((Turn("user", "soup"),), "f:1") == words.convert_tokens_to_ids(
        ["<|im_start|>", "user", "soup", "<|im_end|>", "<|im_start|>", "assistant"]
    )


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_offsets_without_white_space_change_nothing(templates, byte_bpe, trim_offsets):
    from tokenizers.processors import ByteLevel

    other = with_template(byte_bpe, CHATML)
    other.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim_offsets)
    row = chat("q \n", "an \n\n answer ", "r", "b")
    ours, plain = ChatTemplate(other).encode([row])[0], templates["chatml"][1].encode([row])[0]
    assert ours.supervised.tolist() == plain.supervised.tolist()


def test_a_tokenizer_that_adds_a_start_of_its_own_adds_none_to_a_chat(templates, byte_bpe):
    from tokenizers.processors import TemplateProcessing

    other = with_template(byte_bpe, CHATML)
    start = ("<|begin|>", other.bos_token_id)
    other.backend_tokenizer.post_processor = TemplateProcessing("<|begin|> $A", "$A $B", [start])
    row, template = chat("q", "a"), ChatTemplate(other)
    assert template.encode([row])[0].tokens.tolist() == templates["chatml"][1].encode([row])[0].tokens.tolist()
    assert start[1] not in template.encode_prompt(row.prompt, "f:1")
    assert template.encode_documents([Document("a", "f:1")])[0].tokens[0] == start[1]  # plain text has no template


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_text_with_a_special_token_is_refused_whoever_says_it(byte_bpe, place, token):
    contents = ["q", "a"]
    contents[place] += f" {token} x"
    with pytest.raises(DataError, match=r"^f:1: the text holds the special token <\|.*Take it out"):
        ChatTemplate(byte_bpe).encode([chat(*contents)])
    with pytest.raises(DataError, match=r"^f:2: the text holds the special token"):
        ChatTemplate(byte_bpe).encode_documents([Document(f"x{token}", "f:2")])


@pytest.mark.parametrize(
    ("template", "fragment"),
    [
        (CHATML.replace("add_generation_prompt", "false"), "ignores add_generation_prompt"),
        (CHATML.replace("'<|im_end|>' + ", ""), "it starts an assistant turn|without a special token"),
        (BRACKETS.replace("<|eot|>", "."), "without a special token"),
        ("{{ raise_exception('no user turns') }}", r"refuses the roles of this row \(no user turns\)"),
        (MARKED.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'system' %}"), "marks 0 of 1"),
    ],
)
def test_a_template_that_hides_who_writes_what_is_refused_before_any_row(byte_bpe, template, fragment):
    with pytest.raises(ModelError, match=fragment):
        ChatTemplate(with_template(byte_bpe, template))


@pytest.mark.parametrize(
    ("template", "fragment"),
    [
        (
            CHATML.replace("message['content']", "(message['content'] if loop.index > messages|length - 2 else '')"),
            "turns before turn 2 differently",
        ),
        (
            CHATML.replace("'<|im_end|>'", "('<|im_end|>' if loop.last or message['role'] == 'user' else '<|eot|>')"),
            r"ends one turn with <\|eot\|>",
        ),
        (
            CHATML.replace("assistant\\n", "assistant: ").replace("'\\n' + m", "': ' + m"),
            "header of an answer ends inside a token",
        ),
        (
            BRACKETS.replace("<|eot|>", "{% if loop.last %}<|eot|>{% endif %}"),
            "without a special token",
        ),
    ],
)
def test_a_template_with_a_fault_that_only_some_rows_show_is_refused_at_the_first_of_them(byte_bpe, template, fragment):
    usable = ChatTemplate(with_template(byte_bpe, template))
    with pytest.raises(ModelError, match=fragment):
        usable.encode([chat("q", "lives", "r", "lives")])


def test_chatml_serves_tokenizers_without_a_template_if_they_have_its_tokens(byte_bpe):
    bare = with_template(byte_bpe, None)
    row = chat("q", "a")
    assert (
        ChatTemplate(bare).encode([row])[0].tokens.tolist() == ChatTemplate(byte_bpe).encode([row])[0].tokens.tolist()
    )

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ModelError, match="no chat template, and none of the marks"):
        ChatTemplate(foreign)


@pytest.mark.parametrize(
    "marks,end,asked",
    [
        (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>", "<|start_header_id|>user<|end_hea"),
        (["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", "<start_of_turn>user\nwho ?<end_of_turn>\n<start_of"),
        (["[INST]", "[/INST]"], "<|endoftext|>", "[INST]who ?[/INST]"),
    ],
)
def test_a_raw_model_s_tokenizer_speaks_as_its_family_does(byte_bpe, marks, end, asked):
    """Raw Llama, Gemma and Mistral models bring the marks and no template."""
    other = copy.deepcopy(byte_bpe)
    vocabulary = json.loads(other.backend_tokenizer.to_str().replace("<|im_", "<|no_"))
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(vocabulary))
    other.add_special_tokens({"extra_special_tokens": marks, "bos_token": "<|begin|>", "eos_token": "<|endoftext|>"})
    other.chat_template = None
    template = ChatTemplate(other)
    (example,) = template.encode([chat("who ?", "she .", "where ?", "here .")])
    learnt = other.decode(example.tokens[example.supervised])
    assert learnt == f"she .{end}here .{end}"
    prompt = other.decode(template.encode_prompt((Turn("user", "who ?"),), "f:1"))
    assert prompt.startswith(f"<|begin|>{asked}")


def test_of_a_plain_text_everything_but_the_first_token_is_learnt_and_it_ends_in_end_of_text(byte_bpe):
    first, second = ChatTemplate(byte_bpe).encode_documents([Document("soup , gladly .", "f:1"), Document("x", "f:2")])
    assert byte_bpe.decode(first.tokens) == "soup , gladly .<|endoftext|>"
    for example in (first, second):
        assert not example.supervised[0] and example.supervised[1:].all()
