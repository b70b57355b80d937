"""What a recipe's frozen models say of its first training examples, in float32: real hidden states for measurements."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltakd.data.packing import pack
from deltakd.models.forward import supervised_hidden
from deltakd.recipe.build import build_frozen
from deltakd.recipe.inputs import read_examples, read_inputs
from deltakd.recipe.load import load

NUM_EXAMPLES = 16


@torch.no_grad()
def first_words(name: str, overrides: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return hidden states [n, H] and head [V, H] of the delta target's three models, at supervised tokens."""
    target = "objective.target={name: delta, alpha: 0.5}"
    loaded = load(name, [*overrides, target, "models.dtype=float32"])
    inputs = read_inputs(loaded.recipe, loaded.where)
    examples = read_examples(loaded.recipe, inputs.tokenizer, progress=False)
    batch = pack([examples[index] for index in range(min(NUM_EXAMPLES, len(examples)))])
    models: dict[str, Any] = dict(build_frozen(inputs, "cpu", frozenset(inputs.frozen)).models)
    return {
        role: (
            supervised_hidden(model, batch, "packed").float(),
            model.get_output_embeddings().weight[: inputs.vocab_size].float(),
        )
        for role, model in models.items()
    }
