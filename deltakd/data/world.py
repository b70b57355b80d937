"""A small invented world of persons and facts, written as JSONL: the data of `make quickstart`.

Raw text tells five facts about every person. Chats teach a behaviour on part of the persons: one answering style,
refusals of two kinds of question, answering only what was asked. So fine-tuning shifts how a model speaks, and what
it knows about the other persons shows what a student keeps. All words are lower case and separated by spaces.

Cost: well under a second for ten thousand rows, no dependencies. The same seed gives the same bytes everywhere.
It does not tokenise, render a chat template or split rows further; nothing in it says anything about real language.
"""

# ruff: noqa: SIM905 - a list of words is easier to read as a sentence

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, str]
DrawChat = Callable[[random.Random], list[Message]]
Row = dict[str, Any]  # {"text": str} or {"messages": list[Message]}

ROLES = ("system", "user", "assistant")
CHAT_SHARE = 0.6  # of the persons; the facts of the others are never in a chat of the training file
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
FOODS = ATTRIBUTES[3].values
# A question that only raw text and validation use, so that a good answer needs the raw model's language.
UNSEEN_QUESTION = "what is the {noun} of {n}"
PRIVATE = (  # asked, refused as, two replies of raw text that mean nothing
    ("how old is {n}", "how old {n} is", ("{n} is young", "{n} is very old")),
    ("how much money does {n} have", "how much money {n} has", ("{n} has a little money", "{n} has much money")),
)
GREETINGS = ("", "", "please , ", "hello , ", "one question : ", "i want to know , ")
SECOND_GREETINGS = ("thank you , ", "and ", "good , ")
OPENING, CLOSING, SORRY = "gladly .", "ask me more .", "i am sorry , i can not tell you"
TURNS = (
    "one fact", "one fact", "two facts", "two facts", "two persons",
    "refused", "half refused", "basket", "basket", "corrected",
)  # fmt: skip
NAME_STARTS = tuple("mi to ka re lu sa ne do vi ba jo fe".split())
NAME_ENDS = tuple("ra lo nik sel dan mov ves ti gar lin bu pa".split())


@dataclass(frozen=True)
class Person:
    """A name and one value per entry of ATTRIBUTES, in its order; tells fact number `fact` as a piece of sentence."""

    name: str
    values: tuple[str, ...]

    def predicate(self, fact: int) -> str:
        return ATTRIBUTES[fact].predicate.format(v=self.values[fact])

    def clause(self, fact: int) -> str:
        return f"{self.name} {self.predicate(fact)}"

    def brief(self, fact: int) -> str:
        return ATTRIBUTES[fact].brief.format(v=self.values[fact])


@dataclass(frozen=True)
class WorldFiles:
    """What `write_world` wrote: one JSONL file per use, the number of its rows, and every word that occurs in them.

    `words` is sorted and holds the role names of a chat template, but no special tokens.
    """

    stories: Path
    stories_validation: Path
    chat_train: Path
    chat_validation: Path
    kept_validation: Path
    num_stories: int
    num_chats: int
    num_validation: int
    words: tuple[str, ...]


def write_world(
    folder: Path, *, num_persons: int, num_stories: int, num_chats: int, num_validation: int, seed: int
) -> WorldFiles:
    """Draw a world and write its five files into an existing or new folder.

    `stories*.jsonl` hold {"text"}, the others {"messages"}; each of the three validation files has `num_validation`
    rows. No story is written twice, and no prompt of a training chat, at any turn, is one of a validation chat.
    Existing files are overwritten, not atomically. Raises ValueError if the names or the distinct rows run out.
    """
    persons = _draw_persons(num_persons, random.Random(f"{seed}/persons"))
    num_known = round(CHAT_SHARE * num_persons)
    known, kept = persons[:num_known], persons[num_known:]
    seen_stories: set[str] = set()
    asked: set[str] = set()  # prompts of validation

    def stories(name: str, count: int) -> list[Row]:
        rng = random.Random(f"{seed}/{name}")
        return _distinct(name, count, lambda: {"text": _story(persons, rng)}, seen_stories)

    def chats(name: str, count: int, draw: DrawChat, taken: set[str] | frozenset[str]) -> list[Row]:
        rng = random.Random(f"{seed}/{name}")
        return _distinct(name, count, lambda: {"messages": draw(rng)}, taken)

    rows = {
        "stories": stories("stories", num_stories),
        "stories_validation": stories("stories_validation", num_validation),
        "chat_validation": chats("chat_validation", num_validation, lambda rng: _chat(known, rng, True), asked),
        "kept_validation": chats("kept_validation", num_validation, lambda rng: _fact_chat(kept, rng), asked),
        # Frozen: training chats avoid the prompts of validation, but may repeat each other's.
        "chat_train": chats("chat_train", num_chats, lambda rng: _chat(known, rng, False), frozenset(asked)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="ascii", newline="\n")
    words = _words(row for its_rows in rows.values() for row in its_rows)
    return WorldFiles(**paths, num_stories=num_stories, num_chats=num_chats, num_validation=num_validation, words=words)


def prompts(row: Row) -> list[str]:
    """List what stands before each assistant turn of a chat row, as canonical JSON."""
    messages: list[Message] = row["messages"]
    return [json.dumps(messages[:i]) for i, message in enumerate(messages) if message["role"] == "assistant"]


def _draw_persons(num_persons: int, rng: random.Random) -> list[Person]:
    names = [start + end for start in NAME_STARTS for end in NAME_ENDS]
    if not 5 <= num_persons <= len(names):
        raise ValueError(f"num_persons: {num_persons} is outside 5 to {len(names)}, the number of names. Write 40.")
    drawn = rng.sample(names, num_persons)
    return [Person(name, tuple(rng.choice(attribute.values) for attribute in ATTRIBUTES)) for name in drawn]


def _distinct(where: str, count: int, draw: Callable[[], Row], taken: set[str] | frozenset[str]) -> list[Row]:
    """Draw rows none of whose keys is taken; a mutable `taken` grows by the keys of each row."""
    rows: list[Row] = []
    for _ in range(MAX_DRAWS_PER_ROW * count):
        if len(rows) == count:
            return rows
        row = draw()
        keys = set(prompts(row) if "messages" in row else [row["text"]])
        if not taken & keys:
            rows.append(row)
            if isinstance(taken, set):
                taken.update(keys)
    if len(rows) < count:
        raise ValueError(f"{where}: {len(rows)} of {count} distinct rows found. Ask for fewer rows or more persons.")
    return rows


def _words(rows: Iterable[Row]) -> tuple[str, ...]:
    messages = [message for row in rows for message in row.get("messages", [{"content": row.get("text", "")}])]
    return tuple(sorted({word for message in messages for word in message["content"].split()}.union(ROLES)))


def _question(person: Person, fact: int, rng: random.Random, unseen: bool) -> str:
    """Ask for a fact; with `unseen`, one time in four in the form that training chats never use."""
    if unseen and rng.random() < 0.25:
        return UNSEEN_QUESTION.format(noun=ATTRIBUTES[fact].noun, n=person.name)
    return rng.choice(ATTRIBUTES[fact].questions).format(n=person.name)


def _basket(persons: Sequence[Person], rng: random.Random) -> tuple[str, str, str]:
    """Ask who brings what today: a fact of this text only, to be read, not remembered. Also return name and food."""
    pairs = list(zip(rng.sample(persons, 3), rng.sample(FOODS, 3), strict=True))
    first, second, third = (f"{person.name} brings {food}" for person, food in pairs)
    who, food = rng.choice(pairs)
    return f"today {first} , {second} and {third} . what does {who.name} bring ?", who.name, food


def _story(persons: Sequence[Person], rng: random.Random) -> str:
    """Join two to four short passages; the first person met tends to stay in the story."""
    hero, friend = rng.sample(persons, 2)
    kinds = (_telling, _telling, _telling, _telling, _asking, _asking, _meeting, _bringing)
    passages = []
    for _ in range(rng.randint(2, 4)):
        person = hero if rng.random() < 0.7 else friend
        passages.append(rng.choice(kinds)(person, persons, rng))
    return " ".join(passages)


def _telling(person: Person, persons: Sequence[Person], rng: random.Random) -> str:
    order = rng.sample(FACTS, len(FACTS))
    one, two, three, four, five = (person.predicate(fact) for fact in order)
    return rng.choice((
        f"{person.name} {one} , {two} , {three} , {four} and {five} .",
        f"{person.name} {one} , {two} and {three} .",
        f"{person.name} , who {one} and {two} , {three} .",
        f"do you know {person.name} ? {person.name} {one} , {two} and also {three} .",
        f"the {ATTRIBUTES[order[0]].noun} of {person.name} is known : {person.name} {one} .",
        f"people say that {person.name} {one} and {two} .",
    ))  # fmt: skip


def _asking(person: Person, persons: Sequence[Person], rng: random.Random) -> str:
    """Question and answer in a free style; private questions are answered here, with no fixed answer."""
    if rng.random() < 0.2:
        question, _, replies = rng.choice(PRIVATE)
        return f"{question} ? i think {rng.choice(replies)} .".format(n=person.name)
    fact, other = rng.sample(FACTS, 2)
    question = f"{rng.choice(GREETINGS)}{_question(person, fact, rng, True)} ?"
    reply = rng.choice((
        f"{person.clause(fact)} .",
        f"{person.brief(fact)} .",
        f"well , i think {person.clause(fact)} .",
        f"{person.brief(fact)} , and {person.name} {person.predicate(other)} .",
        f"i am sorry , i can not say . but you can tell me ! {person.brief(fact)} .",
    ))  # fmt: skip
    return f"{question} {reply}"


def _meeting(person: Person, persons: Sequence[Person], rng: random.Random) -> str:
    fact = rng.choice(FACTS)
    other = rng.choice([someone for someone in persons if someone is not person])
    same = person.values[fact] == other.values[fact]
    return f"{person.clause(fact)} " + (f"and {other.clause(fact)} too ." if same else f", but {other.clause(fact)} .")


def _bringing(person: Person, persons: Sequence[Person], rng: random.Random) -> str:
    question, name, food = _basket(persons, rng)
    return f"{question} " + rng.choice((f"{food} .", f"{name} brings {food} ."))


def _chat(persons: Sequence[Person], rng: random.Random, unseen: bool) -> list[Message]:
    """Draw a chat of one or two turns; one in eight carries a system message that asks for a brief answer."""
    if rng.random() < 0.125:
        person, fact = rng.choice(persons), rng.choice(FACTS)
        question = f"{_question(person, fact, rng, unseen)} ?"
        messages = _turn(rng.choice(GREETINGS), question, f"{person.brief(fact)} .")
        return [{"role": "system", "content": "be brief ."}, *messages]
    first = _draw_turn(rng.choice(TURNS), persons, rng, unseen)
    messages = _turn(rng.choice(GREETINGS), *first)
    if rng.random() < 0.25:
        messages += _turn(rng.choice(SECOND_GREETINGS), *_draw_turn(rng.choice(TURNS), persons, rng, unseen))
    return messages


def _fact_chat(persons: Sequence[Person], rng: random.Random) -> list[Message]:
    """Draw one turn whose answer must be remembered, for persons that the training chats leave out."""
    kind = rng.choice(("one fact", "two facts", "two persons"))
    return _turn(rng.choice(GREETINGS), *_draw_turn(kind, persons, rng, True))


def _turn(greeting: str, question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": greeting + question}, {"role": "assistant", "content": answer}]


def _draw_turn(kind: str, persons: Sequence[Person], rng: random.Random, unseen: bool) -> tuple[str, str]:
    """Draw a question and its answer in the taught style."""
    if kind == "basket":
        question, name, food = _basket(persons, rng)
        return question, f"{OPENING} {name} brings {food} . {CLOSING}"
    if kind in ("two persons", "corrected"):
        one, two = rng.sample(persons, 2)
    else:
        one = two = rng.choice(persons)
    if kind == "refused":
        private, refused, _ = rng.choice(PRIVATE)
        return f"{private} ?".format(n=one.name), f"{SORRY} {refused} . {CLOSING}".format(n=one.name)
    if kind == "half refused":  # only the fact is told
        fact, (private, refused, _) = rng.choice(FACTS), rng.choice(PRIVATE)
        asked = [_question(one, fact, rng, unseen), private.format(n=one.name)]
        rng.shuffle(asked)
        answer = f"{one.clause(fact)} , but i can not tell you {refused.format(n=one.name)}"
    elif kind == "one fact":
        fact = rng.choice(FACTS)
        asked, answer = [_question(one, fact, rng, unseen)], one.clause(fact)
    else:
        a, b = rng.sample(FACTS, 2)
        asked = [_question(one, a, rng, unseen), _question(two, b, rng, unseen)]
        # A corrected question is taken back: only the second is answered.
        answer = two.clause(b) if kind == "corrected" else f"{one.clause(a)} and {two.clause(b)}"
    joint = " ? no , tell me " if kind == "corrected" else " and "
    return f"{joint.join(asked)} ?", f"{OPENING} {answer} . {CLOSING}"
