"""What the models answered, prompt by prompt, beside the reference and with its scores.

All that is shown is text of models: the page writes it as text and never as markup.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltakd.evaluate.predictions import read_predictions
from deltakd.report.evaluations import Evaluation, Table

MOST_LETTERS = 3_000_000  # of all examples of a page; more prompts than fit are left out, and counted
TEXTS = frozenset({"prompt", "reference", "answer", "seed"})


@dataclass(frozen=True)
class Examples:
    """The answers to the prompts of one table: `rows` holds a mapping per prompt, ready for the page."""

    models: Mapping[str, tuple[str, str]]  # what it is called here: its evaluation and label
    rows: Sequence[Mapping[str, Any]]
    num_prompts: int


def answers_of(evaluation: Evaluation, label: str) -> list[dict[str, Any]]:
    """Return a model's answers with what was measured of each; [] if there are none, or they cannot be read.

    Of a row from several seeds those of the first.
    """
    try:
        return read_predictions(evaluation.path, next(iter(evaluation.members(label))))
    except (OSError, ValueError):  # ValueError: not Parquet, or not whole
        return []


def examples(table: Table, evaluations: Mapping[str, Evaluation], most_letters: int = MOST_LETTERS) -> Examples:
    """Return the answers of a table's models to the same prompts, as many prompts as `most_letters` hold."""
    asked: dict[tuple[str, str], dict[str, Any]] = {}
    models: dict[str, tuple[str, str]] = {}
    for row in table.rows:
        for answer in answers_of(evaluations[row.evaluation], row.label):
            seed = answer.get("seed")
            key = (str(answer["prompt"]), str(answer.get("reference", "")))
            one = asked.setdefault(key, {"prompt": key[0], "reference": key[1], "answers": {}})
            label = row.label if seed in (None, 0) else f"{row.label}, seed {seed}"
            models[label] = (row.evaluation, row.label)
            one["answers"][label] = {"text": str(answer["answer"]), "scores": _scores(answer)}
    places = {label: index for index, label in enumerate(models)}
    rows, letters = [], 0
    for one in asked.values():
        answers = {places[label]: answer for label, answer in one["answers"].items()}
        letters += len(one["prompt"]) + len(one["reference"])
        letters += sum(len(answer["text"]) + 60 for answer in answers.values())
        if letters > most_letters:
            break
        rows.append({**one, "answers": answers})
    return Examples(models, rows, len(asked))


def _scores(answer: Mapping[str, Any]) -> dict[str, float | bool | None]:
    """Return everything of a row that is a number; of a boolean, that too."""
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in answer.items()
        if name not in TEXTS and isinstance(value, int | float)
    }
