"""The recipe becomes parts. This is the only file that sees a whole recipe; parts take plain values.

`Inputs` is what every rank can know cheaply before anything is loaded: folders, tokenizer, vocabulary, facts of the
models. Student ranks then build an engine, references and a stream; teacher ranks build the models they serve.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltakd.base.ranks import Role, SoloWorld, World
from deltakd.data.examples import ExampleSet, drop_validation
from deltakd.data.stream import Stream
from deltakd.data.tokenise import build_examples
from deltakd.data.tokenizer import load_tokenizer
from deltakd.engine.protocol import Engine, Optimizer, StudentModule, device_name
from deltakd.engine.settings import SingleSettings
from deltakd.losses.objectives import objective
from deltakd.losses.settings import needed_references
from deltakd.models.frozen import PayloadSpec
from deltakd.models.load import ModelFacts, facts, load_head, load_model, resolve
from deltakd.models.settings import WeightsSettings
from deltakd.models.vocabulary import fingerprint, refuse_foreign, shared_vocabulary
from deltakd.recipe.schema import Recipe
from deltakd.teacher.client import FrozenFacts, ServiceReferences, ServiceSettings, TeacherRank
from deltakd.teacher.references import InProcessReferences, NoReferences, References
from deltakd.train.loop import TrainParts
from deltakd.train.schedule import schedule

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

    @property
    def spec(self) -> PayloadSpec:
        """What frozen models send in this run."""
        references, layout = self.recipe.references, self.recipe.data.layout
        return PayloadSpec(references.payload, references.dtype, layout, self.vocab_size)


def read_inputs(recipe: Recipe, where: Where) -> Inputs:
    """Find models and tokenizers and refuse what does not fit together; loads no weights.

    Raises ModelError for a missing model, a foreign tokenizer or a head that does not cover the tokenizer.
    """
    student_key = where("models.student.weights")
    student = resolve(student_key, recipe.models.student)
    tokenizer = load_tokenizer(str(student), recipe.models.trust_remote_code)
    frozen: dict[str, ModelFacts] = {}
    for role in sorted(needed_references(recipe.objective)):
        key = where(f"models.{role}.weights")
        folder = resolve(key, _weights(recipe, role))
        refuse_foreign(key, tokenizer, load_tokenizer(str(folder), recipe.models.trust_remote_code))
        frozen[role] = facts(key, folder)
    heads = {"student": facts(student_key, student).head_rows} | {name: f.head_rows for name, f in frozen.items()}
    return Inputs(
        recipe, where, student, frozen, tokenizer, fingerprint(tokenizer), shared_vocabulary(heads, len(tokenizer))
    )


def _weights(recipe: Recipe, role: str) -> WeightsSettings:
    """Return what plays a role; the frozen raw student is by default what the student starts from."""
    given: WeightsSettings | None = getattr(recipe.models, role)
    return given or recipe.models.student


def read_examples(recipe: Recipe, tokenizer: Any, progress: bool) -> ExampleSet:
    """Tokenise the training rows, or load them from the root's cache; rows that are also held out are left out."""
    cache = Path(recipe.root) / "tokens"
    train = build_examples(recipe.data, recipe.data.train, tokenizer, cache, progress)
    if recipe.data.validation is None or recipe.data.format == "text":
        return train
    return drop_validation(train, build_examples(recipe.data, recipe.data.validation, tokenizer, cache, progress))


def build_served(inputs: Inputs, device: str) -> dict[str, nn.Module]:
    """Load the frozen models of a run; roles that share their weights share one model."""
    loaded: dict[str, nn.Module] = {}
    served = {}
    for role, facts_ in inputs.frozen.items():
        if facts_.identity not in loaded:
            key = inputs.where(f"models.{role}.weights")
            model = load_model(key, Path(facts_.weights), inputs.recipe.models)
            loaded[facts_.identity] = model.requires_grad_(False).to(device)
        served[role] = loaded[facts_.identity]
    return served


def build_parts(
    inputs: Inputs,
    examples: ExampleSet,
    role: Role,
    scratch: Path,
    launch: str,
    teachers: Sequence[TeacherRank],
    stack: ExitStack,
) -> TrainParts:
    """Build everything that a student rank trains with; what must be closed is closed by `stack`."""
    recipe = inputs.recipe
    world, engine = build_engine(inputs, role)
    references = _build_references(inputs, role, engine.device, scratch, launch, teachers, stack)
    train = recipe.train
    stream = Stream(
        examples,
        recipe.seed,
        train.tokens_per_step,
        role.rank,
        role.num_students,
        train.tokens_per_micro_batch,
        train.examples_per_micro_batch,
        recipe.data.layout == "padded",
    )
    return TrainParts(world, engine, references, stream.steps(), schedule(train), train.steps)


def build_engine(inputs: Inputs, role: Role) -> tuple[World, Engine]:
    """Load the student and hand it to its engine, having joined the other students."""
    recipe = inputs.recipe
    train = recipe.train
    optimizer = Optimizer(train.learning_rate, (train.beta1, train.beta2), train.weight_decay, train.max_grad_norm)
    if isinstance(recipe.engine, SingleSettings):
        from deltakd.engine.single import SingleEngine

        module = _student_module(inputs)
        return SoloWorld(), SingleEngine(module, recipe.engine, optimizer, device_name(role.local_index))
    from deltakd.engine import deepspeed

    world = deepspeed.join_students(role)
    torch.manual_seed(recipe.seed)
    with deepspeed.sharded_loading(deepspeed.config(recipe.engine, optimizer, recipe.models.dtype, role.num_students)):
        module = _student_module(inputs)
    return world, deepspeed.DeepSpeedEngine(module, recipe.engine, optimizer, recipe.models.dtype, role)


def _student_module(inputs: Inputs) -> StudentModule:
    recipe = inputs.recipe
    model: Any = load_model(inputs.where("models.student.weights"), inputs.student, recipe.models)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return StudentModule(model, objective(recipe.objective), recipe.data.layout, inputs.vocab_size)


def _build_references(
    inputs: Inputs,
    role: Role,
    device: str,
    scratch: Path,
    launch: str,
    teachers: Sequence[TeacherRank],
    stack: ExitStack,
) -> References:
    recipe = inputs.recipe
    if not inputs.frozen:
        return NoReferences()
    heads = _frozen_heads(inputs, device) if recipe.references.payload == "hidden" else {}
    if recipe.references.source == "in_process":
        return InProcessReferences(build_served(inputs, device), heads, inputs.spec)
    settings = ServiceSettings(
        look_ahead=recipe.teachers.look_ahead,
        start_s=recipe.teachers.start_s,
        answer_s=recipe.teachers.answer_s,
        max_tokens=recipe.train.tokens_per_micro_batch,
    )
    models = {name: FrozenFacts(facts_.identity, facts_.hidden_size) for name, facts_ in inputs.frozen.items()}
    return stack.enter_context(
        ServiceReferences(
            scratch, launch, role.rank, teachers, models, heads, inputs.fingerprint, inputs.spec, settings, device
        )
    )


def _frozen_heads(inputs: Inputs, device: str) -> dict[str, Tensor]:
    """Load the heads alone: all that a student's process ever holds of a frozen model."""
    dtype = getattr(torch, inputs.recipe.models.dtype)
    return {
        role: load_head(inputs.where(f"models.{role}.weights"), Path(facts_.weights), dtype, inputs.vocab_size).to(
            device
        )
        for role, facts_ in inputs.frozen.items()
    }
