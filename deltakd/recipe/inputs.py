"""What every rank can know cheaply before anything is loaded: folders, tokenizer, vocabulary, facts of the models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deltakd.base.errors import RecipeError
from deltakd.data.examples import ExampleSet, drop_validation
from deltakd.data.settings import SourceSettings
from deltakd.data.sources import load_rows
from deltakd.data.tokenise import build_examples
from deltakd.data.tokenizer import load_tokenizer
from deltakd.losses.settings import must_stay_apart, needed_references
from deltakd.models.load import ModelFacts, facts, identity, refuse_unsplittable, resolve
from deltakd.models.settings import role_key
from deltakd.models.vocabulary import fingerprint, refuse_foreign, shared_vocabulary
from deltakd.recipe.schema import Recipe
from deltakd.teacher.payloads import PayloadKind, PayloadSpec, choose_payload

Where = Callable[[str], str]


@dataclass(frozen=True)
class Inputs:
    """What is known of a run before any weights are loaded."""

    recipe: Recipe
    where: Where
    student: Path
    frozen: Mapping[str, ModelFacts]
    tokenizer: Any
    fingerprint: str
    vocab_size: int

    @cached_property
    def identities(self) -> dict[str, str]:
        """Which weights a run comes from, by role."""
        return {"student": identity(self.student)} | {name: one.identity for name, one in self.frozen.items()}

    @cached_property
    def _payload(self) -> tuple[PayloadKind, str]:
        references, objective_ = self.recipe.references, self.recipe.objective
        if references.payload != "auto":
            return references.payload, f"payload {references.payload}, as the recipe says"
        if reason := must_stay_apart(objective_):
            return "hidden", f"payload hidden: {reason}"
        if any(set(self.frozen) - set(names) for names in self.recipe.teachers.serves or []):
            return "hidden", "payload hidden: models are served apart"
        sizes = {name: facts_.hidden_size for name, facts_ in self.frozen.items()}
        return choose_payload(sizes, self.vocab_size, getattr(torch, references.dtype).itemsize)

    @property
    def why(self) -> str:
        """Say which payload frozen models send, and why."""
        return self._payload[1]

    @cached_property
    def spec(self) -> PayloadSpec:
        """What frozen models send in this run."""
        references, layout, kind = self.recipe.references, self.recipe.data.layout, self._payload[0]
        size = {"top_k": references.top_k, "sampled": references.samples}.get(kind, 0)
        if kind == "top_k" and size >= self.vocab_size:
            raise RecipeError(
                f"{self.where('references.top_k')}: {size:,} of a vocabulary of {self.vocab_size:,}. "
                "Write a smaller number, or references.payload: target."
            )
        return PayloadSpec(kind, references.dtype, layout, self.vocab_size, size, references.tail)


def read_inputs(recipe: Recipe, where: Where) -> Inputs:
    """Find models and tokenizers and refuse what does not fit together; loads no weights.

    Raises ModelError for a missing model, a foreign tokenizer, a head that does not cover the tokenizer, or a model
    that cannot be split as the recipe says.
    """
    shards = recipe.teachers.tensor_parallel
    student_key = where("models.student.weights")
    student = resolve(student_key, recipe.models.student)
    tokenizer = load_tokenizer(str(student), recipe.models.trust_remote_code)
    frozen: dict[str, ModelFacts] = {}
    for role in sorted(needed_references(recipe.objective)):
        key = where(f"{role_key(role)}.weights")
        folder = resolve(key, recipe.models.roles[role])
        refuse_foreign(key, tokenizer, load_tokenizer(str(folder), recipe.models.trust_remote_code))
        frozen[role] = facts(key, folder, recipe.models.roles[role].load_in_8bit)
        if shards > 1:
            refuse_unsplittable(key, folder, shards, recipe.models.trust_remote_code)
    heads = {"student": facts(student_key, student).head_rows} | {name: f.head_rows for name, f in frozen.items()}
    return Inputs(
        recipe, where, student, frozen, tokenizer, fingerprint(tokenizer), shared_vocabulary(heads, len(tokenizer))
    )


def read_corpus(recipe: Recipe, tokenizer: Any) -> ExampleSet:
    """Tokenise the rows of plain text that are learnt beside the steps; whether they hold `text` shows in the first."""
    corpus = recipe.data.corpus
    assert corpus is not None  # asked for where there is one
    source = SourceSettings(**corpus.model_dump(include=set(SourceSettings.model_fields)))
    _, first = next(iter(load_rows(source)))
    form = "text" if "text" in first else recipe.data.format
    data = recipe.data.model_copy(update={"format": form, "supervise": "all"})
    return build_examples(data, source, tokenizer, Path(recipe.root) / "tokens", progress=False)


def read_examples(recipe: Recipe, tokenizer: Any, progress: bool) -> ExampleSet:
    """Tokenise the training rows, or load them from the root's cache; rows that are also held out are left out."""
    cache = Path(recipe.root) / "tokens"
    train = build_examples(recipe.data, recipe.data.train, tokenizer, cache, progress)
    if recipe.data.validation is None or recipe.data.format == "text":
        return train
    held_out = build_examples(recipe.data, recipe.data.validation, tokenizer, cache, progress)
    return drop_validation(train, held_out, prompts=recipe.data.apart == "prompts")
