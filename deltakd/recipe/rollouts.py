"""The part of a student rank that writes its own batches: a whole copy of the student, and who refreshes it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deltakd.base.ranks import Role, World
from deltakd.base.rundir import ROLLOUTS, RunDirectory
from deltakd.data.examples import ExampleSet
from deltakd.data.stream import Stream
from deltakd.data.template import ChatTemplate
from deltakd.engine.protocol import Engine
from deltakd.evaluate.drawing import Drawing
from deltakd.evaluate.generate import draw_tokens
from deltakd.models.load import load_model
from deltakd.recipe.inputs import Inputs
from deltakd.rollout.mixture import Mixture
from deltakd.rollout.stream import Rollouts
from deltakd.rollout.writing import Answer, Writer
from deltakd.train.loop import heed


def build_rollouts(
    inputs: Inputs,
    examples: ExampleSet,
    stream: Stream,
    role: Role,
    world: World,
    engine: Engine,
    run: RunDirectory | None,
    stop: Callable[[], str | None],
) -> Rollouts:
    """Load the copy that writes and return the stream of its batches; `stop` says why it shall not go on writing."""
    recipe = inputs.recipe
    settings = recipe.rollouts
    copy, refresh = load_copy(inputs, engine)
    end_id = ChatTemplate(inputs.tokenizer).end_of_turn_id
    is_known = recipe.objective.policy_gradient is not None
    observe = None
    if is_known or settings.teacher_mix:
        teacher = _load_teacher(inputs, engine.device) if settings.teacher_mix else None
        observe = partial(Drawing, vocab_size=inputs.vocab_size, teacher=teacher, share=settings.teacher_mix)

    def write(prompts: Sequence[list[int]], most: int, seed: int) -> list[Answer]:
        own = settings.sampling(most, seed)
        drawn = draw_tokens(copy, prompts, end_id, own, vocab_size=inputs.vocab_size, observe=observe)
        kept = (known.cpu().numpy() if known is not None and is_known else None for _, known in drawn)
        return [Answer(tokens, known) for (tokens, _), known in zip(drawn, kept, strict=True)]

    def record(facts: Mapping[str, Any]) -> None:
        if run is not None and role.rank == 0:
            run.append(ROLLOUTS, facts)

    writer = Writer(settings, recipe.seed, recipe.data.max_tokens, world, write, lambda: heed(world, stop()))
    mixture = Mixture(settings, recipe.seed, recipe.train.steps)
    return Rollouts(stream, examples, settings, recipe.seed, mixture, writer, refresh, record)


def load_copy(inputs: Inputs, engine: Engine) -> tuple[Any, Callable[[], None]]:
    """Return a whole copy of the student on the engine's device, and what gives it the student's weights.

    The latter is called on all ranks together.
    """
    plain = inputs.recipe.models.model_copy(update={"lora": None})
    copy: Any = load_model(inputs.where("models.student.weights"), inputs.student, plain).to(engine.device).eval()
    weights = dict(copy.named_parameters())

    @torch.no_grad()
    def refresh() -> None:
        for name, whole in engine.gather(everywhere=True).items():
            weights[name].copy_(whole)

    return copy, refresh


def _load_teacher(inputs: Inputs, device: str) -> Any:
    """Load the teacher beside the student that draws with it; each rank has one."""
    facts = inputs.frozen["teacher"]
    in_8bit = inputs.recipe.models.roles["teacher"].load_in_8bit
    model: Any = load_model(inputs.where("models.teacher.weights"), Path(facts.weights), inputs.recipe.models, in_8bit)
    return model.requires_grad_(False).to(device).eval()
