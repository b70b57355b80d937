"""The recipe becomes parts, which take plain values and never see a whole recipe.

From what every rank knows before anything is loaded (`inputs.py`), student ranks build an engine, references and a
stream; teacher ranks build the models they serve.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltakd.base.files import write_json
from deltakd.base.ranks import Role, SoloWorld, World
from deltakd.base.rundir import BEST_STEP, RunDirectory
from deltakd.data.corpus import with_corpus
from deltakd.data.examples import ExampleSet
from deltakd.data.packing import PackedBatch
from deltakd.data.stream import Stream
from deltakd.engine.protocol import Engine, Optimizer, StudentModule, device_name
from deltakd.engine.settings import Fsdp2Settings, SingleSettings
from deltakd.losses.objectives import objective
from deltakd.losses.schedules import alpha_over_steps
from deltakd.models.load import choose_attention, load_head, load_model
from deltakd.models.lora import add_lora
from deltakd.models.settings import ModelsSettings, role_key
from deltakd.recipe.held_out import build_validation
from deltakd.recipe.inputs import Inputs, read_corpus
from deltakd.recipe.rollouts import build_rollouts
from deltakd.recipe.schema import Recipe
from deltakd.teacher.arena import Arena
from deltakd.teacher.cache import CachedReferences, find_folder
from deltakd.teacher.client import ServiceReferences, ServiceSettings, make_arena
from deltakd.teacher.members import Members
from deltakd.teacher.messages import PROTOCOL, Terms
from deltakd.teacher.payloads import FrozenFacts, FrozenModels
from deltakd.teacher.references import InProcessReferences, NoReferences, References
from deltakd.train.advantages import Advantages
from deltakd.train.checkpoints import Checkpoints, Saved
from deltakd.train.loop import Steps, TrainParts, never, tasks
from deltakd.train.schedule import schedule

CHECKED_BATCHES = 1000  # of a cache, before the first step; the others are found missing when they are needed


def build_frozen(inputs: Inputs, device: str, names: frozenset[str]) -> FrozenModels:
    """Load some of a run's frozen models; roles that share their weights share one model."""
    loaded: dict[str, nn.Module] = {}
    served = {}
    for role, facts_ in inputs.frozen.items():
        if role not in names:
            continue
        if facts_.identity not in loaded:
            key = inputs.where(f"{role_key(role)}.weights")
            in_8bit = inputs.recipe.models.roles[role].load_in_8bit
            model = load_model(key, Path(facts_.weights), inputs.recipe.models, in_8bit)
            loaded[facts_.identity] = model.requires_grad_(False).to(device)
        served[role] = loaded[facts_.identity]
    return FrozenModels(served, inputs.spec, objective(inputs.recipe.objective), inputs.recipe.seed)


def terms(inputs: Inputs, launch: str) -> Terms:
    """Return what teachers and students of a run must mean alike."""
    spec, recipe = inputs.spec, inputs.recipe
    target = ""
    if not spec.keeps_models_apart:  # alpha travels with every request
        formed = recipe.objective.target.model_dump_json(exclude={"alpha", "schedule"})
        target = f"{formed}, temperature {recipe.objective.temperature:g}, seed {recipe.seed}"
    shards = recipe.teachers.tensor_parallel
    return Terms(PROTOCOL, launch, inputs.fingerprint, spec.words, target, spec.layout, spec.vocab_size, shards)


@dataclass(frozen=True)
class Service:
    """What a student rank's references are asked through."""

    members: Members
    arena: Arena
    failed: Callable[[], str | None]  # why no teacher of this node can come back
    board: Callable[[Mapping[str, Any]], None]  # where the status is shown


def build_arena(inputs: Inputs, role: Role, scratch: Path) -> Arena:
    """Allocate this rank's slots, before anything is loaded."""
    return make_arena(scratch, role.rank, frozen_facts(inputs), inputs.spec, _service_settings(inputs.recipe))


def build_stream(recipe: Recipe, examples: ExampleSet, role: Role, tokens_per_step: int | None = None) -> Stream:
    """Return a student rank's micro-batches; a step's tokens are the recipe's unless they are given."""
    train = recipe.train
    return Stream(
        examples,
        recipe.seed,
        tokens_per_step or train.tokens_per_step,
        role.rank,
        role.num_students,
        train.tokens_per_micro_batch,
        train.examples_per_micro_batch,
        recipe.data.layout == "padded",
    )


def planned(inputs: Inputs, examples: ExampleSet, role: Role) -> Iterator[tuple[PackedBatch, float]]:
    """Yield all micro-batches that a student rank will ask references for, with the target's alpha."""
    recipe = inputs.recipe
    stream = partial(build_stream, recipe, role=role)
    moving = alpha_over_steps(recipe.objective.target, recipe.train.steps)
    validation = build_validation(inputs, role, stream)
    for task in tasks(stream(examples).steps, moving, recipe.train.steps, validation):
        for batch in task.batches:
            yield batch, task.alpha


def build_parts(
    inputs: Inputs,
    examples: ExampleSet,
    role: Role,
    world: World,
    service: Service | None,
    run: RunDirectory | None = None,
    saved: Saved | None = None,
    stop: Callable[[], str | None] = lambda: None,
    references: References | None = None,
) -> TrainParts:
    """Build everything that a student rank trains with; `service` is None where no teacher rank is asked.

    `run` is where checkpoints and the best weights go, None for a training that keeps none; it goes on from `saved`.
    `references` stand in for those of the recipe.
    """
    recipe = inputs.recipe
    stream, train = partial(build_stream, recipe, role=role), recipe.train
    batches = stream(examples)
    if recipe.references.source == "cache" and inputs.frozen:  # looked through before anything large is loaded
        references = _build_cached(inputs, device_name(role.local_index), planned(inputs, examples, role))
    engine = build_engine(inputs, role, saved)
    alpha = alpha_over_steps(recipe.objective.target, train.steps)
    policy = recipe.objective.policy_gradient
    keep = validation = written = None
    if recipe.rollouts.are_written:
        written = build_rollouts(inputs, examples, batches, role, world, engine, run, stop)
    if run is not None:
        validation = build_validation(inputs, role, stream, partial(_keep_best, run, engine, inputs, role))
        facts_ = facts_of_run(inputs, examples) if role.rank == 0 else {}
        model = partial(engine.save, tokenizer=inputs.tokenizer) if recipe.checkpoints.models else None
        keep = Checkpoints(run.path, recipe.checkpoints, world, engine, alpha, facts_, validation, model, written)
    if keep is not None and saved is not None:
        keep.restore(saved)
    return TrainParts(
        world,
        engine,
        references=references or _build_references(inputs, engine.device, service, stop),
        steps=_beside_corpus(inputs, stream, written.steps if written is not None else batches.steps),
        waits=written.waits if written is not None else never,
        heard=written.observe if written is not None else lambda loss: None,
        advantages=Advantages(policy, world, inputs.vocab_size) if policy is not None else None,
        schedule=schedule(train),
        alpha=alpha,
        num_steps=train.steps,
        checkpoints=keep,
        validation=validation,
        stop=stop,
        done=saved.step if saved is not None else 0,
    )


def _beside_corpus(inputs: Inputs, stream: Callable[..., Stream], steps: Steps) -> Steps:
    """Return the steps with plain text beside them, where the recipe has some."""
    corpus = inputs.recipe.data.corpus
    if corpus is None:
        return steps
    rows = read_corpus(inputs.recipe, inputs.tokenizer)
    beside = stream(rows, tokens_per_step=corpus.tokens_per_step)
    return with_corpus(steps, beside, corpus.weight)


def _keep_best(run: RunDirectory, engine: Engine, inputs: Inputs, role: Role, step: int) -> None:
    engine.save(run.best, inputs.tokenizer)
    if role.rank == 0:
        write_json(run.best / BEST_STEP, {"step": step})


def facts_of_run(inputs: Inputs, examples: ExampleSet) -> dict[str, Any]:
    """Return what the numbers of a run depend on beside its recipe: a checkpoint is of these and no others."""
    facts_ = {
        "models": inputs.identities,
        "examples": examples.digest,
        "payload": inputs.spec.words if inputs.frozen else "none",
    }
    if inputs.recipe.data.corpus is not None:
        facts_["corpus"] = read_corpus(inputs.recipe, inputs.tokenizer).digest
    return facts_


def meet(recipe: Recipe, role: Role) -> World:
    """Wait for the other student ranks."""
    if isinstance(recipe.engine, SingleSettings):
        return SoloWorld()
    from deltakd.engine.join import join_students

    return join_students(role, recipe.engine.meet_s)


def build_engine(inputs: Inputs, role: Role, saved: Saved | None = None) -> Engine:
    """Load the student and hand it to its engine; other students must have been met."""
    recipe = inputs.recipe
    train = recipe.train
    optimizer = Optimizer(train.learning_rate, (train.beta1, train.beta2), train.weight_decay, train.max_grad_norm)
    torch.manual_seed(recipe.seed)
    if isinstance(recipe.engine, SingleSettings):
        from deltakd.engine.single import SingleEngine

        module = _student_module(inputs, recipe.models)
        return SingleEngine(module, optimizer, device_name(role.local_index))
    if isinstance(recipe.engine, Fsdp2Settings):
        from deltakd.engine.fsdp2 import Fsdp2Engine

        attention = choose_attention(recipe.models)[0]  # of what it computes in
        # Master weights in float32; the engine casts them for each layer's forward.
        module = _student_module(inputs, recipe.models.model_copy(update={"dtype": "float32", "attention": attention}))
        return Fsdp2Engine(module, recipe.engine, optimizer, recipe.models.dtype, role)
    from deltakd.engine import deepspeed

    others = saved is not None and saved.facts["num_ranks"] != role.num_students
    config = deepspeed.config(recipe.engine, optimizer, recipe.models.dtype, role.num_students, others)
    with deepspeed.sharded_loading(config) if recipe.engine.zero_stage == 3 else nullcontext():
        module = _student_module(inputs, recipe.models)
    return deepspeed.DeepSpeedEngine(module, recipe.engine, optimizer, recipe.models.dtype, role, others)


def _student_module(inputs: Inputs, settings: ModelsSettings) -> StudentModule:
    recipe = inputs.recipe
    model: Any = load_model(inputs.where("models.student.weights"), inputs.student, settings)
    if settings.lora is not None:
        add_lora(inputs.where("models.lora.layers"), model, settings.lora, recipe.seed)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return StudentModule(model, objective(recipe.objective), recipe.data.layout, inputs.vocab_size)


def _build_references(
    inputs: Inputs, device: str, service: Service | None, stop: Callable[[], str | None]
) -> References:
    if not inputs.frozen:
        return NoReferences()
    heads = frozen_heads(inputs, device) if inputs.spec.kind == "hidden" else {}
    if service is None:
        return InProcessReferences(build_frozen(inputs, device, frozenset(inputs.frozen)), heads)
    facts_, settings = frozen_facts(inputs), _service_settings(inputs.recipe)
    return ServiceReferences(
        service.members,
        service.arena,
        facts_,
        heads,
        inputs.spec,
        settings,
        service.failed,
        service.board,
        stop,
        device,
    )


def _build_cached(inputs: Inputs, device: str, batches: Iterator[tuple[PackedBatch, float]]) -> References:
    heads = frozen_heads(inputs, device) if inputs.spec.kind == "hidden" else {}
    facts_ = frozen_facts(inputs)
    identities = {name: one.identity for name, one in facts_.items()}
    folder, _ = find_folder(Path(inputs.recipe.root), terms(inputs, ""), identities)
    references = CachedReferences(folder, facts_, heads, inputs.spec, device)
    references.refuse_missing(islice(batches, CHECKED_BATCHES))
    return references


def _service_settings(recipe: Recipe) -> ServiceSettings:
    teachers = recipe.teachers
    return ServiceSettings(
        look_ahead=teachers.look_ahead,
        start_s=teachers.start_s,
        answer_s=teachers.answer_s,
        give_up_s=teachers.give_up_s,
        max_tokens=recipe.train.tokens_per_micro_batch,
        slots=teachers.slots,
    )


def frozen_facts(inputs: Inputs) -> dict[str, FrozenFacts]:
    """Return what a student knows of the run's frozen models."""
    return {name: FrozenFacts(facts_.identity, facts_.hidden_size) for name, facts_ in inputs.frozen.items()}


def frozen_heads(inputs: Inputs, device: str) -> dict[str, Tensor]:
    """Load the heads alone: all that a student's process ever holds of a frozen model; equal ones are held once."""
    dtype = getattr(torch, inputs.recipe.models.dtype)
    heads: dict[str, Tensor] = {}
    for role, facts_ in inputs.frozen.items():
        key = inputs.where(f"{role_key(role)}.weights")
        head = load_head(key, Path(facts_.weights), dtype, inputs.vocab_size).to(device)
        # Fine-tuning that left the head alone: the loss then takes one matrix product for both.
        heads[role] = next((other for other in heads.values() if torch.equal(other, head)), head)
    return heads
