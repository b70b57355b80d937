"""The part of a student rank that writes its own batches: a whole copy of the student, and who refreshes it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deltakd.base.ranks import Role, World
from deltakd.base.rundir import ROLLOUTS, RunDirectory
from deltakd.data.examples import ExampleSet
from deltakd.data.stream import Stream
from deltakd.data.template import ChatTemplate
from deltakd.engine.protocol import Engine
from deltakd.evaluate.generate import write_tokens
from deltakd.models.load import load_model
from deltakd.recipe.inputs import Inputs
from deltakd.rollout.stream import Rollouts


def build_rollouts(
    inputs: Inputs,
    examples: ExampleSet,
    stream: Stream,
    role: Role,
    world: World,
    engine: Engine,
    run: RunDirectory | None,
) -> Rollouts:
    """Load the copy that writes and return the stream of its batches."""
    recipe = inputs.recipe
    settings = recipe.rollouts
    plain = recipe.models.model_copy(update={"lora": None})
    copy: Any = load_model(inputs.where("models.student.weights"), inputs.student, plain).to(engine.device).eval()
    weights = dict(copy.named_parameters())
    end_id = ChatTemplate(inputs.tokenizer).end_of_turn_id

    @torch.no_grad()
    def refresh() -> None:
        for name, whole in engine.gather(everywhere=True).items():
            weights[name].copy_(whole)

    def write(prompts: Sequence[list[int]], most: int, seed: int) -> list[list[int]]:
        own = settings.model_copy(update={"max_new_tokens": most, "seed": seed})
        return write_tokens(copy, prompts, end_id, own)

    def record(facts: Mapping[str, Any]) -> None:
        if run is not None and role.rank == 0:
            run.append(ROLLOUTS, facts)

    return Rollouts(stream, examples, settings, recipe.seed, recipe.data.max_tokens, world, refresh, write, record)
