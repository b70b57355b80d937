"""Held-out rows: those that a training validates on, and the prompts that models are asked."""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from deltakd.base.errors import DataError
from deltakd.base.ranks import Role
from deltakd.data.conversation import Conversation
from deltakd.data.examples import ExampleSet
from deltakd.data.formats import read_row
from deltakd.data.settings import SourceSettings
from deltakd.data.sources import load_rows
from deltakd.data.stream import Stream
from deltakd.data.template import ChatTemplate
from deltakd.data.tokenise import build_examples
from deltakd.losses.schedules import alpha_over_steps
from deltakd.recipe.inputs import Inputs
from deltakd.recipe.schema import Recipe
from deltakd.train.validation import Prompts, Validation


def held_out_conversations(recipe: Recipe, num_rows: int | None) -> list[Conversation]:
    """Read the first conversations of data.validation. Raises DataError if its rows are none."""
    assert recipe.data.validation is not None  # checked with the recipe
    return conversations_of(recipe, recipe.data.validation, num_rows)


def conversations_of(recipe: Recipe, source: SourceSettings, num_rows: int | None) -> list[Conversation]:
    """Read the first conversations of some rows. Raises DataError if the rows are none."""
    if num_rows is not None:
        source = source.model_copy(update={"num_rows": min(source.num_rows or 10**12, num_rows)})
    rows = [read_row(row, recipe.data.format, where) for where, row in load_rows(source)]
    conversations = [row for row in rows if isinstance(row, Conversation)]
    if not conversations:
        raise DataError(f"{source.path}: no conversation to draw a prompt from. Write data.format: messages or math.")
    return conversations


def build_validation(
    inputs: Inputs, role: Role, stream: Callable[[ExampleSet], Stream], keep: Callable[[int], None] = lambda step: None
) -> Validation | None:
    """Return a student rank's part of the validations; None where the recipe wants none."""
    recipe = inputs.recipe
    settings, source = recipe.validation, recipe.data.validation
    if settings.every_steps is None or source is None:
        return None
    first = source.model_copy(update={"num_rows": min(source.num_rows or 10**12, settings.num_rows)})
    rows = build_examples(recipe.data, first, inputs.tokenizer, Path(recipe.root) / "tokens", progress=False)
    batches = stream(rows).cut(np.arange(len(rows)))
    alpha = alpha_over_steps(recipe.objective.target, recipe.train.steps).final
    prompts = _prompts(inputs, role) if settings.answers_every is not None else None
    return Validation(settings, recipe.train.steps, batches, alpha, prompts, keep)


def _prompts(inputs: Inputs, role: Role) -> Prompts:
    recipe = inputs.recipe
    template = ChatTemplate(inputs.tokenizer)
    conversations = held_out_conversations(recipe, recipe.validation.num_prompts)
    own = conversations[role.rank :: role.num_students]
    # Every rank answers as many: under ZeRO-3 and FSDP2 all of them take part in every forward pass.
    asked: Sequence[Conversation] = list(chain(own, conversations))[: -(-len(conversations) // role.num_students)]
    return Prompts(
        encoded=[template.encode_prompt(one.prompt, one.where) for one in asked],
        texts=[one.prompt[-1].content for one in asked],
        references=[one.reference for one in asked],
        num_own=len(own),
        tokenizer=inputs.tokenizer,
        end_id=template.end_of_turn_id,
        settings=recipe.evaluation.model_copy(update={"max_new_tokens": recipe.validation.max_new_tokens}),
    )
