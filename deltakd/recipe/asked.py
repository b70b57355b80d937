"""A model that is scored, and the question that its scores answer: known before any weights are loaded.

Scores are taken in parts (scoring.py): 64 prompts answered from one seed, the cross-entropy and the KLs of 64 rows, or
a whole `kept` file. Each is a file of its own under chunks/<label>-<digest of the question>/, whole or not there.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deltakd.data.conversation import Conversation
from deltakd.data.settings import SourceSettings
from deltakd.data.sources import identity as rows_identity
from deltakd.data.tokenizer import load_tokenizer
from deltakd.evaluate.answers import gold_answer
from deltakd.evaluate.compare import ModelScores
from deltakd.evaluate.predictions import predictions_path
from deltakd.evaluate.protocols import Protocol
from deltakd.evaluate.responses import CHUNK, num_chunks
from deltakd.losses.objectives import Objective
from deltakd.models.load import identity, load_model
from deltakd.models.settings import ModelsSettings
from deltakd.models.vocabulary import fingerprint
from deltakd.recipe.schema import Recipe

RULES_VERSION = 2  # raise it when the same models and rows would get other scores; stored ones are not read then


@dataclass(frozen=True)
class Weights:
    """A model's folder, and the key of a recipe that its faults are said of."""

    key: str
    path: Path
    in_8bit: bool = False

    @cached_property
    def identity(self) -> str:
        return identity(self.path, self.in_8bit)


class Shelf:
    """Frozen models that every scored model is held against: each is loaded when it is first asked, and once."""

    def __init__(self, settings: ModelsSettings, device: str) -> None:
        self.settings, self.device = settings, device
        self._loaded: dict[tuple[Path, bool], Any] = {}

    def model(self, weights: Weights) -> Any:
        """Return a model of the shelf, and load it if it is not there."""
        place = weights.path, weights.in_8bit
        if place not in self._loaded:
            self._loaded[place] = self.fresh(weights)
        return self._loaded[place]

    def holds(self, weights: Weights) -> bool:
        """Tell whether a model has been loaded already."""
        return (weights.path, weights.in_8bit) in self._loaded

    def fresh(self, weights: Weights) -> Any:
        """Load a model that goes with its owner."""
        model = load_model(weights.key, weights.path, self.settings, weights.in_8bit)
        return model.requires_grad_(False).to(self.device)

    def tokenizer(self, weights: Weights) -> Any:
        """Load the tokenizer of a model."""
        return load_tokenizer(str(weights.path), self.settings.trust_remote_code)


@dataclass(frozen=True)
class Target:
    """The point that a recipe's students learn from: its objective at the run's last alpha, and its frozen models."""

    objective: Objective
    frozen: Mapping[str, Weights]


@dataclass(frozen=True)
class HeldOut:
    """The rows that all models of a comparison answer."""

    rows: Sequence[Conversation]
    is_math: bool

    @cached_property
    def golds(self) -> list[str | None]:
        """Right answers, where rows have them."""
        return [gold_answer(row.answer, row.reference) if self.is_math else None for row in self.rows]

    @cached_property
    def digest(self) -> str:
        """Tell these rows from others by what they say."""
        said = [[[vars(turn) for turn in row.turns], row.answer, row.also] for row in self.rows]
        return _digest(said)


@dataclass(frozen=True)
class Part:
    """What is taken at a time: `prompts` of one seed, `rows`, or a `kept` file."""

    kind: str
    number: int = 0  # of the chunk
    seed: int = 0
    kept: str = ""

    @property
    def name(self) -> str:
        words = {"prompts": f"prompts-{self.seed}-{self.number:05}", "rows": f"rows-{self.number:05}"}
        return words.get(self.kind, f"kept-{self.kept}")

    @property
    def rows(self) -> slice:
        """Which of the held-out rows it is about."""
        return slice(self.number * CHUNK, (self.number + 1) * CHUNK)


@dataclass(frozen=True)
class Asked:
    """A model that is scored: under which label, by which protocol, against whom, and where its scores go."""

    recipe: Recipe
    protocol: Protocol
    label: str
    weights: Weights
    shelf: Shelf
    held_out: HeldOut
    teacher: Weights | None
    target: Target | None
    folder: Path
    only_kept: bool = False  # of the raw student no more is read

    @property
    def kept(self) -> dict[str, str]:
        """The files whose cross-entropy tells what the model kept."""
        return {name: file for name, file in self.recipe.evaluation.kept.items() if file is not None}

    @cached_property
    def question(self) -> dict[str, Any]:
        """Return all that the scores depend on."""
        recipe, tokenizer = self.recipe, self.shelf.tokenizer(self.weights)
        files = {name: rows_identity(SourceSettings(path=file)) for name, file in self.kept.items()}
        question: dict[str, Any] = {
            "rules": RULES_VERSION,
            "identity": self.weights.identity,
            "dtype": recipe.models.dtype,
            "tokenizer": fingerprint(tokenizer),
            "template": _digest(tokenizer.chat_template),
            "data": recipe.data.model_dump(mode="json", include={"format", "supervise", "max_tokens", "over_long"}),
            "rows": self.held_out.digest,
            "protocol": self.protocol.facts() | {"name": self.protocol.name},
            "kept": files,
            "only_kept": self.only_kept,
        }
        if self.teacher is not None:
            question["teacher"] = self.teacher.identity
        if self.target is not None:
            settings = self.target.objective.settings.model_dump(mode="json")
            frozen = {role: one.identity for role, one in self.target.frozen.items()}
            question["target"] = {"settings": settings, "alpha": self.target.objective.alpha, "frozen": frozen}
        plain: dict[str, Any] = json.loads(json.dumps(question))  # as it is read again
        return plain

    @cached_property
    def chunks(self) -> Path:
        """Where the parts lie until the last is there."""
        return self.folder / "chunks" / f"{self.label}-{_digest(self.question)}"

    @property
    def scores_path(self) -> Path:
        return self.folder / ("before" if self.only_kept else "scores") / f"{self.label}.json"

    @cached_property
    def parts(self) -> list[Part]:
        """All parts of the scores, in their order."""
        chunks = range(0 if self.only_kept else num_chunks(self.held_out.rows))
        prompts = [Part("prompts", number, seed) for seed in self.protocol.seeds for number in chunks]
        return [
            *prompts,
            *(Part("rows", number) for number in chunks),
            *(Part("kept", kept=name) for name in self.kept),
        ]

    def size(self, part: Part) -> int:
        """Return how much of a bar a part is: its rows; a file counts as one."""
        return len(self.held_out.rows[part.rows]) if part.kind != "kept" else 1

    @property
    def total(self) -> int:
        """Return the length of the bar."""
        return sum(map(self.size, self.parts))

    @property
    def done(self) -> int:
        """Return how much of it is there."""
        if self.stored() is not None:
            return self.total
        return sum(self.size(part) for part in self.parts if self.path(part).exists())

    def path(self, part: Part) -> Path:
        return self.chunks / f"{part.name}.json"

    def stored(self) -> ModelScores | None:
        """Return the scores that lie there already for the same question; those that cannot be read are taken again."""
        try:
            stored = json.loads(self.scores_path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        is_whole = self.only_kept or predictions_path(self.folder, self.label).exists()
        return ModelScores(**stored["scores"]) if is_whole and stored["question"] == self.question else None


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
