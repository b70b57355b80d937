"""A small invented world of persons and facts, written as JSONL: the data of `make quickstart`.

Raw rows are dialogues about every person, answered in many ways: tersely, at length, politely, beside the point; what
is private is told or refused. Chats teach one behaviour on part of the persons: the polite style, always refusing what
is private, telling exactly what was asked. So raw models know the language and the structure of a dialogue, and
fine-tuning selects among what they know; the other persons show what a model keeps of the rest.

All words are lower case and separated by spaces. Cost: well under a second for ten thousand rows, no dependencies. The
same seed gives the same bytes everywhere. It does not tokenise; nothing in it says anything about real language.
"""

# ruff: noqa: SIM905 - a list of words is easier to read as a sentence

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Message = dict[str, str]
Row = dict[str, list[Message]]  # {"messages": ...}
DrawRow = Callable[[random.Random], Row]

CHAT_SHARE = 0.6  # of the persons; the facts of the others are never in a chat of the training file
TAUGHT_SHARE = 0.2  # of the raw answers already have the taught behaviour
STORY_SHARE = 0.4  # of the raw turns; stories hold most facts per word
MAX_DRAWS_PER_ROW = 200


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: how it is told, asked and named. `{n}` is a person, `{v}` a value."""

    noun: str
    predicate: str  # follows a name: "mira lives in belmor"
    brief: str
    questions: tuple[str, ...]  # clauses that end in " ?" when asked
    values: tuple[str, ...]


ATTRIBUTES = (
    Attribute("home", "lives in {v}", "in {v}", ("where does {n} live", "in what town does {n} live"),
              tuple("belmor kandu trivik osterly yalden prusk ferrow quillan zember hoxley narvo drumlin".split())),
    Attribute("job", "works as a {v}", "a {v}", ("what work does {n} do", "what does {n} work as"),
              tuple("baker tailor pilot nurse farmer lawyer painter smith teacher sailor miner cook".split())),
    Attribute("pet", "has a {v}", "a {v}", ("what pet does {n} have", "what animal lives with {n}"),
              tuple("cat dog fox parrot rabbit goat horse turtle mouse duck lizard pony".split())),
    Attribute("food", "likes to eat {v}", "{v}", ("what does {n} like to eat", "what food does {n} like"),
              tuple("soup bread rice fish cheese apples noodles beans cake honey nuts pears".split())),
    Attribute("hobby", "plays {v}", "{v}", ("what does {n} play", "what game does {n} like to play"),
              tuple("chess tennis cards drums golf football piano darts dominoes flute hockey violin".split())),
)  # fmt: skip
FACTS = range(len(ATTRIBUTES))
# A question that training chats never use, so that a good answer to it needs what the raw model knows.
UNTAUGHT_QUESTION = "what is the {noun} of {n}"
PRIVATE = (  # asked, refused as, replies of raw rows that mean nothing
    ("how old is {n}", "how old {n} is", ("{n} is young", "{n} is very old")),
    ("how much money does {n} have", "how much money {n} has", ("{n} has a little money", "{n} has much money")),
)
OPEN_QUESTIONS = ("tell me about {n} .", "who is {n} ?", "do you know {n} ?", "say something about {n} .")
GREETINGS = ("", "", "please , ", "hello , ", "one question : ", "i want to know , ")
SECOND_GREETINGS = ("thank you , ", "and ", "good , ")
KINDS = ("one fact", "one fact", "two facts", "two facts", "two persons", "private", "half private", "corrected")
NAME_STARTS = tuple("mi to ka re lu sa ne do vi ba jo fe".split())
NAME_ENDS = tuple("ra lo nik sel dan mov ves ti gar lin bu pa".split())


@dataclass(frozen=True)
class Person:
    """A name and one value per entry of ATTRIBUTES, in its order."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One attribute of one person, as three lengths of a sentence's piece."""

    person: Person
    number: int

    @property
    def brief(self) -> str:
        return ATTRIBUTES[self.number].brief.format(v=self.person.values[self.number])

    @property
    def predicate(self) -> str:
        return ATTRIBUTES[self.number].predicate.format(v=self.person.values[self.number])

    @property
    def clause(self) -> str:
        return f"{self.person.name} {self.predicate}"


@dataclass(frozen=True)
class Question:
    """What a user asks, and what would answer it exactly: facts, a refusal, or both."""

    text: str
    facts: tuple[Fact, ...]
    refused: str = ""  # what the taught behaviour does not tell: "how old mira is"
    reply: str = ""  # what raw rows may tell instead
    withdrawn: tuple[Fact, ...] = ()  # asked first and taken back


@dataclass(frozen=True)
class WorldFiles:
    """What `write_world` wrote: one JSONL file of {"messages"} per use."""

    raw_train: Path
    raw_validation: Path
    chat_train: Path
    chat_validation: Path
    kept_validation: Path


def write_world(
    folder: Path, *, num_persons: int, num_raw: int, num_chats: int, num_validation: int, seed: int
) -> WorldFiles:
    """Draw a world and write its five files into an existing or new folder.

    Raw rows are about all persons, chats about a part, `kept_validation` about the rest: remembered facts, told in the
    taught style. Each of the three validation files has `num_validation` rows; no prompt of one, at any turn, is a
    prompt of a training row. Existing files are overwritten, not atomically. Raises ValueError if the names or the
    distinct rows run out.
    """
    persons = _draw_persons(num_persons, random.Random(f"{seed}/persons"))
    num_taught = round(CHAT_SHARE * num_persons)
    taught, kept = persons[:num_taught], persons[num_taught:]
    draws: dict[str, tuple[int, DrawRow]] = {  # validation first: training then avoids its prompts
        "raw_validation": (num_validation, lambda rng: _raw_row(persons, rng)),
        "chat_validation": (num_validation, lambda rng: _chat_row(taught, rng, KINDS, True)),
        "kept_validation": (num_validation, lambda rng: _chat_row(kept, rng, ("one fact", "two facts"), True)),
        "raw_train": (num_raw, lambda rng: _raw_row(persons, rng)),
        "chat_train": (num_chats, lambda rng: _chat_row(taught, rng, KINDS, False)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in draws}
    asked: set[str] = set()
    for name, (count, draw) in draws.items():
        rows = _avoiding(name, count, draw, random.Random(f"{seed}/{name}"), asked)
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii", newline="\n")
        if name.endswith("validation"):
            asked.update(prompt for row in rows for prompt in prompts(row))
    return WorldFiles(**paths)


def prompts(row: Row) -> list[str]:
    """List what stands before each assistant turn of a row, as canonical JSON."""
    messages = row["messages"]
    return [json.dumps(messages[:i]) for i, message in enumerate(messages) if message["role"] == "assistant"]


def _draw_persons(num_persons: int, rng: random.Random) -> list[Person]:
    names = [start + end for start in NAME_STARTS for end in NAME_ENDS]
    if not 5 <= num_persons <= len(names):
        raise ValueError(f"num_persons: {num_persons} is outside 5 to {len(names)}, the number of names. Write 40.")
    drawn = rng.sample(names, num_persons)
    return [Person(name, tuple(rng.choice(attribute.values) for attribute in ATTRIBUTES)) for name in drawn]


def _avoiding(where: str, count: int, draw: DrawRow, rng: random.Random, asked: set[str]) -> list[Row]:
    """Draw rows none of whose prompts is in `asked`; they may repeat each other's."""
    rows: list[Row] = []
    for _ in range(MAX_DRAWS_PER_ROW * count):
        row = draw(rng)
        if asked.isdisjoint(prompts(row)):
            rows.append(row)
        if len(rows) == count:
            return rows
    raise ValueError(f"{where}: {len(rows)} of {count} new rows found. Ask for less validation or more persons.")


def _raw_row(persons: Sequence[Person], rng: random.Random) -> Row:
    """Draw one to three turns about two persons: stories, and questions of every kind answered in many ways."""
    pair = rng.sample(persons, 2)
    turns = []
    for number in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < STORY_SHARE:
            person = rng.choice(pair)
            turns.append((rng.choice(OPEN_QUESTIONS).format(n=person.name), _story(person, rng)))
        else:
            question = _question(rng.choice(KINDS), pair, rng, True)
            answer = _taught_answer if rng.random() < TAUGHT_SHARE else _free_answer
            turns.append((_greeting(number, rng) + question.text, answer(question, rng)))
    return _row(turns)


def _chat_row(persons: Sequence[Person], rng: random.Random, kinds: Sequence[str], untaught: bool) -> Row:
    """Draw one turn, or one time in four two, in the taught behaviour."""
    turns = []
    for number in range(rng.choice((1, 1, 1, 2))):
        question = _question(rng.choice(kinds), persons, rng, untaught)
        turns.append((_greeting(number, rng) + question.text, _taught_answer(question, rng)))
    return _row(turns)


def _row(turns: Sequence[tuple[str, str]]) -> Row:
    pairs = [zip(("user", "assistant"), turn, strict=True) for turn in turns]
    return {"messages": [{"role": role, "content": content} for pair in pairs for role, content in pair]}


def _greeting(turn: int, rng: random.Random) -> str:
    return rng.choice(SECOND_GREETINGS if turn else GREETINGS)


def _question(kind: str, persons: Sequence[Person], rng: random.Random, untaught: bool) -> Question:
    """Draw a question of one of KINDS; with `untaught`, a fact is asked for one time in four in that form."""
    one, two = rng.sample(persons, 2)
    a, b = (Fact(one, number) for number in rng.sample(FACTS, 2))
    if kind == "one fact":
        return Question(f"{_ask(a, rng, untaught)} ?", (a,))
    if "private" not in kind:
        if kind != "two facts":
            b = Fact(two, rng.choice(FACTS))
        first, second = _ask(a, rng, untaught), _ask(b, rng, untaught)
        if kind == "corrected":
            return Question(f"{first} ? no , tell me {second} ?", (b,), withdrawn=(a,))
        return Question(f"{first} and {second} ?", (a, b))
    private, refused, replies = rng.choice(PRIVATE)
    asked = [private.format(n=one.name), *([_ask(a, rng, untaught)] if kind == "half private" else [])]
    rng.shuffle(asked)
    reply = rng.choice(replies).format(n=one.name)
    return Question(f"{' and '.join(asked)} ?", (a,) if len(asked) == 2 else (), refused.format(n=one.name), reply)


def _ask(fact: Fact, rng: random.Random, untaught: bool) -> str:
    attribute = ATTRIBUTES[fact.number]
    form = UNTAUGHT_QUESTION if untaught and rng.random() < 0.25 else rng.choice(attribute.questions)
    return form.format(noun=attribute.noun, n=fact.person.name)


def _taught_answer(question: Question, rng: random.Random) -> str:
    """Answer politely, with exactly what was asked, and never with what is private."""
    told = " and ".join(fact.clause for fact in question.facts)
    if not question.refused:
        return f"gladly . {told} . ask me more ."
    if not told:
        return f"i am sorry , i can not tell you {question.refused} . ask me more ."
    return f"gladly . {told} , but i can not tell you {question.refused} . ask me more ."


def _free_answer(question: Question, rng: random.Random) -> str:
    """Answer in some way: with a part of it, with what was taken back, with more than was asked, or not at all."""
    if question.refused and (not question.facts or rng.random() < 0.5):
        return rng.choice((
            f"{question.reply} .",
            f"well , i think {question.reply} .",
            f"i am sorry , i can not tell you {question.refused} .",
        ))  # fmt: skip
    facts = [*question.facts, *question.withdrawn]
    if question.withdrawn or rng.random() < 0.25:
        facts = rng.sample(facts, rng.randint(1, len(facts)))
    told = " and ".join(fact.clause for fact in facts)
    more = Fact(facts[-1].person, rng.choice(FACTS))
    return rng.choice((
        f"{told} .",
        f"{' and '.join(fact.brief for fact in facts)} .",
        f"well , i think {told} .",
        f"{told} . {more.person.name} also {more.predicate} .",
    ))  # fmt: skip


def _story(person: Person, rng: random.Random) -> str:
    one, two, three, four, five = (Fact(person, number).predicate for number in rng.sample(FACTS, len(FACTS)))
    return rng.choice((
        f"{person.name} {one} , {two} , {three} , {four} and {five} .",
        f"{person.name} {one} , {two} and {three} .",
        f"{person.name} , who {one} and {two} , {three} .",
        f"yes , people say that {person.name} {one} and {two} .",
    ))  # fmt: skip
