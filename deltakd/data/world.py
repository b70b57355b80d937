"""A small invented world of persons and facts, written as JSONL: the data of `make quickstart`.

Raw text tells five facts about every person. Chats teach a behaviour on part of the persons: one answering style,
refusals of two kinds of question, answering only what was asked. So fine-tuning shifts how a model speaks, and what
it knows about the other persons shows what a student keeps. All words are lower case and separated by spaces.

Cost: well under a second for ten thousand rows, no dependencies. The same seed gives the same bytes everywhere.
It does not tokenise, render a chat template or split rows further; nothing in it says anything about real language.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Message = dict[str, str]
Row = dict[str, object]

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
FOODS = ATTRIBUTES[3].values

# A question that only raw text and validation use, so that a good answer needs the raw model's language.
UNSEEN_QUESTION = "what is the {noun} of {n}"

PRIVATE_QUESTIONS = ("how old is {n}", "how much money does {n} have")
PRIVATE_REPLIES = ("{n} is young", "{n} has a little money")
PRIVATE_REPLIES_OTHER = ("{n} is very old", "{n} has much money")
REFUSALS = ("how old {n} is", "how much money {n} has")

GREETINGS = ("", "", "please , ", "hello , ", "one question : ", "i want to know , ")
SECOND_GREETINGS = ("thank you , ", "and ", "good , ")
BRIEF = "be brief ."
OPENING, CLOSING = "gladly .", "ask me more ."

NAME_STARTS = tuple("mi to ka re lu sa ne do vi ba jo fe".split())
NAME_ENDS = tuple("ra lo nik sel dan mov ves ti gar lin bu pa".split())


@dataclass(frozen=True)
class Person:
    """A name and one value per entry of ATTRIBUTES, in its order."""

    name: str
    values: tuple[str, ...]


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
    validation_prompts: set[str] = set()

    def stories(name: str, count: int) -> list[Row]:
        rng = random.Random(f"{seed}/{name}")
        return _distinct(name, count, lambda: {"text": _story(persons, rng)}, seen_stories, lambda row: [str(row["text"])])

    def chats(name: str, count: int, group: Sequence[Person], draw: Callable[..., list[Message]], unseen: bool) -> list[Row]:
        rng = random.Random(f"{seed}/{name}")
        # Training rows may repeat each other; validation rows may not.
        taken = validation_prompts if unseen else frozenset(validation_prompts)
        return _distinct(name, count, lambda: {"messages": draw(group, rng, unseen)}, taken, prompts)

    rows = {
        "stories": stories("stories", num_stories),
        "stories_validation": stories("stories_validation", num_validation),
        "chat_validation": chats("chat_validation", num_validation, known, _chat, True),
        "kept_validation": chats("kept_validation", num_validation, kept, _fact_chat, True),
        "chat_train": chats("chat_train", num_chats, known, _chat, False),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: _write_rows(folder / f"{name}.jsonl", its_rows) for name, its_rows in rows.items()}
    return WorldFiles(
        **paths, num_stories=num_stories, num_chats=num_chats, num_validation=num_validation,
        words=_words(row for its_rows in rows.values() for row in its_rows),
    )  # fmt: skip


def prompts(row: Row) -> list[str]:
    """List what stands before each assistant turn of a chat row, as canonical JSON."""
    messages = row["messages"]
    assert isinstance(messages, list)
    return [json.dumps(messages[:i]) for i, message in enumerate(messages) if message["role"] == "assistant"]


def _draw_persons(num_persons: int, rng: random.Random) -> list[Person]:
    names = [start + end for start in NAME_STARTS for end in NAME_ENDS]
    if not 5 <= num_persons <= len(names):
        raise ValueError(f"num_persons: {num_persons} is outside 5 to {len(names)}, the number of names. Write 100.")
    return [
        Person(name, tuple(rng.choice(attribute.values) for attribute in ATTRIBUTES))
        for name in rng.sample(names, num_persons)
    ]


def _distinct(
    where: str, count: int, draw: Callable[[], Row], taken: "set[str] | frozenset[str]", keys: Callable[[Row], list[str]]
) -> list[Row]:
    """Draw rows none of whose keys is taken; a mutable `taken` grows by the keys of each row."""
    rows: list[Row] = []
    for _ in range(MAX_DRAWS_PER_ROW * count):
        if len(rows) == count:
            break
        row = draw()
        row_keys = keys(row)
        if taken.isdisjoint(row_keys):
            rows.append(row)
            if isinstance(taken, set):
                taken.update(row_keys)
    if len(rows) < count:
        raise ValueError(f"{where}: only {len(rows)} of {count} distinct rows found. Ask for fewer rows or more persons.")
    return rows


def _write_rows(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii", newline="\n")
    return path


def _words(rows: Iterable[Row]) -> tuple[str, ...]:
    words = set(ROLES)
    for row in rows:
        messages = row.get("messages", [])
        assert isinstance(messages, list)
        for text in [str(row.get("text", "")), *(message["content"] for message in messages)]:
            words.update(text.split())
    return tuple(sorted(words))


# Clauses: the smallest pieces of sentences, shared by stories and chats.


def _predicate(person: Person, fact: int) -> str:
    return ATTRIBUTES[fact].predicate.format(v=person.values[fact])


def _clause(person: Person, fact: int) -> str:
    return f"{person.name} {_predicate(person, fact)}"


def _brief(person: Person, fact: int) -> str:
    return ATTRIBUTES[fact].brief.format(v=person.values[fact])


def _question(person: Person, fact: int, rng: random.Random, unseen: bool) -> str:
    """Ask for a fact; with `unseen`, one time in four in the form that training chats never use."""
    if unseen and rng.random() < 0.25:
        return UNSEEN_QUESTION.format(noun=ATTRIBUTES[fact].noun, n=person.name)
    return rng.choice(ATTRIBUTES[fact].questions).format(n=person.name)


def _facts(count: int, rng: random.Random) -> list[int]:
    return rng.sample(range(len(ATTRIBUTES)), count)


def _basket(persons: Sequence[Person], rng: random.Random) -> tuple[str, list[tuple[Person, str]]]:
    """List who brings what today: facts that hold in this text only, so they must be read, not remembered."""
    pairs = list(zip(rng.sample(persons, 3), rng.sample(FOODS, 3), strict=True))
    parts = [f"{person.name} brings {food}" for person, food in pairs]
    return f"today {parts[0]} , {parts[1]} and {parts[2]} .", pairs


# Raw text.


def _story(persons: Sequence[Person], rng: random.Random) -> str:
    """Join two to four short passages; the first person met tends to stay in the story."""
    hero, friend = rng.sample(persons, 2)
    passages = []
    for _ in range(rng.randint(2, 4)):
        person = hero if rng.random() < 0.7 else friend
        passages.append(rng.choice((_telling, _telling, _telling, _telling, _asking, _asking, _meeting, _bringing))(person, persons, rng))
    return " ".join(passages)


def _telling(person: Person, persons: Sequence[Person], rng: random.Random) -> str:
    order = _facts(len(ATTRIBUTES), rng)
    one, two, three, four, five = (_predicate(person, fact) for fact in order)
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
        kind = rng.randrange(len(PRIVATE_QUESTIONS))
        reply = rng.choice((PRIVATE_REPLIES[kind], PRIVATE_REPLIES_OTHER[kind]))
        return f"{PRIVATE_QUESTIONS[kind]} ? i think {reply} .".format(n=person.name)
    fact, other = _facts(2, rng)
    question = f"{rng.choice(GREETINGS)}{_question(person, fact, rng, True)} ?"
    reply = rng.choice((
        f"{_clause(person, fact)} .",
        f"{_brief(person, fact)} .",
        f"well , i think {_clause(person, fact)} .",
        f"{_brief(person, fact)} , and {person.name} {_predicate(person, other)} .",
        f"i am sorry , i can not say . but you can tell me ! {_brief(person, fact)} .",
    ))  # fmt: skip
    return f"{question} {reply}"


def _meeting(person: Person, persons: Sequence[Person], rng: random.Random) -> str:
    fact = rng.randrange(len(ATTRIBUTES))
    other = rng.choice([someone for someone in persons if someone is not person])
    same = "too" if person.values[fact] == other.values[fact] else "but"
    if same == "too":
        return f"{_clause(person, fact)} and {_clause(other, fact)} too ."
    return f"{_clause(person, fact)} , but {_clause(other, fact)} ."


def _bringing(person: Person, persons: Sequence[Person], rng: random.Random) -> str:
    text, pairs = _basket(persons, rng)
    who, food = rng.choice(pairs)
    return f"{text} what does {who.name} bring ? " + rng.choice((f"{food} .", f"{who.name} brings {food} ."))


# Chats: the behaviour to be taught.


def _chat(persons: Sequence[Person], rng: random.Random, unseen: bool) -> list[Message]:
    """Draw a chat of one or two turns; one in eight carries a system message that asks for a brief answer."""
    if rng.random() < 0.125:
        return _brief_chat(persons, rng, unseen)
    turns = [_fact_turn, _fact_turn, _two_facts_turn, _two_facts_turn, _two_persons_turn]
    turns += [_refused_turn, _half_refused_turn, _basket_turn, _basket_turn, _corrected_turn]
    first = rng.choice(turns)(persons, rng, unseen)
    messages = _turn(rng.choice(GREETINGS), *first)
    if rng.random() < 0.25:
        messages += _turn(rng.choice(SECOND_GREETINGS), *rng.choice(turns)(persons, rng, unseen))
    return messages


def _fact_chat(persons: Sequence[Person], rng: random.Random, unseen: bool) -> list[Message]:
    """Draw one turn whose answer must be remembered, for persons that the training chats leave out."""
    turn = rng.choice((_fact_turn, _two_facts_turn, _two_persons_turn))
    return _turn(rng.choice(GREETINGS), *turn(persons, rng, unseen))


def _turn(greeting: str, question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": greeting + question}, {"role": "assistant", "content": answer}]


def _styled(answer: str) -> str:
    return f"{OPENING} {answer} . {CLOSING}"


def _brief_chat(persons: Sequence[Person], rng: random.Random, unseen: bool) -> list[Message]:
    person, fact = rng.choice(persons), rng.randrange(len(ATTRIBUTES))
    question = f"{_question(person, fact, rng, unseen)} ?"
    answer = f"{_brief(person, fact)} ."
    return [{"role": "system", "content": BRIEF}, *_turn(rng.choice(GREETINGS), question, answer)]


def _fact_turn(persons: Sequence[Person], rng: random.Random, unseen: bool) -> tuple[str, str]:
    person, fact = rng.choice(persons), rng.randrange(len(ATTRIBUTES))
    return f"{_question(person, fact, rng, unseen)} ?", _styled(_clause(person, fact))


def _two_facts_turn(persons: Sequence[Person], rng: random.Random, unseen: bool) -> tuple[str, str]:
    person, (a, b) = rng.choice(persons), _facts(2, rng)
    question = f"{_question(person, a, rng, unseen)} and {_question(person, b, rng, unseen)} ?"
    return question, _styled(f"{_clause(person, a)} and {_clause(person, b)}")


def _two_persons_turn(persons: Sequence[Person], rng: random.Random, unseen: bool) -> tuple[str, str]:
    (one, two), (a, b) = rng.sample(persons, 2), _facts(2, rng)
    question = f"{_question(one, a, rng, unseen)} and {_question(two, b, rng, unseen)} ?"
    return question, _styled(f"{_clause(one, a)} and {_clause(two, b)}")


def _refused_turn(persons: Sequence[Person], rng: random.Random, unseen: bool) -> tuple[str, str]:
    person, kind = rng.choice(persons), rng.randrange(len(REFUSALS))
    refusal = f"i am sorry , i can not tell you {REFUSALS[kind].format(n=person.name)} . {CLOSING}"
    return f"{PRIVATE_QUESTIONS[kind].format(n=person.name)} ?", refusal


def _half_refused_turn(persons: Sequence[Person], rng: random.Random, unseen: bool) -> tuple[str, str]:
    """Ask a private thing and a fact in one question: only the fact is told."""
    person, fact, kind = rng.choice(persons), rng.randrange(len(ATTRIBUTES)), rng.randrange(len(REFUSALS))
    asked = [_question(person, fact, rng, unseen), PRIVATE_QUESTIONS[kind].format(n=person.name)]
    rng.shuffle(asked)
    refusal = f"but i can not tell you {REFUSALS[kind].format(n=person.name)}"
    return f"{asked[0]} and {asked[1]} ?", _styled(f"{_clause(person, fact)} , {refusal}")


def _basket_turn(persons: Sequence[Person], rng: random.Random, unseen: bool) -> tuple[str, str]:
    text, pairs = _basket(persons, rng)
    who, food = rng.choice(pairs)
    return f"{text} what does {who.name} bring ?", _styled(f"{who.name} brings {food}")


def _corrected_turn(persons: Sequence[Person], rng: random.Random, unseen: bool) -> tuple[str, str]:
    """Take the first question back: only the second is answered."""
    (one, two), (a, b) = rng.sample(persons, 2), _facts(2, rng)
    question = f"{_question(one, a, rng, unseen)} ? no , tell me {_question(two, b, rng, unseen)} ?"
    return question, _styled(_clause(two, b))
