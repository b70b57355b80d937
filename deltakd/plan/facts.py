"""What the planner knows of a run: the recipe, the shapes of its models, and what its frozen models send.

A model that the recipe's own pipeline will make is read off the stage that makes it: a plan needs nothing on the disk.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from deltakd.base.errors import ModelError
from deltakd.losses.settings import must_stay_apart, needed_references
from deltakd.models.settings import NewModelSettings, role_key
from deltakd.plan.architecture import Architecture, known_models, read_architecture
from deltakd.recipe.load import load, recipe_names
from deltakd.recipe.schema import Recipe

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
APART = ("hidden", "logits")  # one payload for each model
KINDS = ("hidden", "logits", "target", "top_k", "sampled")
_ALIGN, _PAGE = 64, 4096  # where an array of a slot may start, and a slot
_DEPTH = 8  # stages that one model may come through


@dataclass(frozen=True)
class Frozen:
    """A frozen model of the run."""

    shape: Architecture
    weights: str  # where they lie: roles of the same weights share one model
    in_8bit: bool


@dataclass(frozen=True)
class Run:
    """A run, as far as its arithmetic goes."""

    recipe: Recipe
    student: Architecture
    frozen: Mapping[str, Frozen]  # those that the objective needs
    supervised: float  # share of the tokens that are learnt: assumed, since no data is read
    document: int  # tokens of a document, as attention sees them: assumed

    @property
    def vocab_size(self) -> int:
        """The smallest head."""
        return min([self.student.head_rows, *(one.shape.head_rows for one in self.frozen.values())])

    @property
    def models(self) -> dict[str, Frozen]:
        """The frozen models that are loaded, by their weights."""
        return {f"{one.weights} {one.in_8bit}": one for one in self.frozen.values()}

    @property
    def asks_service(self) -> bool:
        """Whether frozen models answer from processes of their own."""
        return bool(self.frozen) and self.recipe.references.source == "service"

    @property
    def width(self) -> int:
        """Bytes of a number of the forward pass."""
        return BYTES[self.recipe.models.dtype]

    @property
    def trained(self) -> int:
        """Parameters that are trained: all of the student's, or its adapters."""
        lora, shape = self.recipe.models.lora, self.student
        if lora is None:
            return shape.num_parameters
        layers = shape.linear if lora.layers == "all-linear" else {n: shape.linear.get(n, (0, 0)) for n in lora.layers}
        return shape.num_layers * lora.rank * sum(inputs + outputs for inputs, outputs in layers.values())

    def micro_batch(self, num_students: int) -> tuple[int, int]:
        """Return the tokens of a micro-batch and how many of them a student rank takes in a step."""
        train = self.recipe.train
        most = train.tokens_per_micro_batch
        if train.examples_per_micro_batch is not None:
            most = min(most, train.examples_per_micro_batch * self.document)
        own = max(ceil(train.tokens_per_step / num_students), self.document)  # which no two ranks share
        return min(most, own), ceil(own / most)

    @property
    def are_served_apart(self) -> bool:
        """Whether some teacher lacks a model, and so can form no target of all."""
        return any(set(self.frozen) - set(names) for names in self.recipe.teachers.serves or [])

    @property
    def payload(self) -> str:
        """The payload's kind; `auto` becomes what the run itself would choose."""
        references = self.recipe.references
        if references.payload != "auto":
            return references.payload
        if must_stay_apart(self.recipe.objective) or self.are_served_apart:
            return "hidden"
        return "hidden" if sum(one.shape.hidden_size for one in self.frozen.values()) <= self.vocab_size else "target"

    def payload_bytes(self, kind: str, num_tokens: int) -> list[int]:
        """Return the bytes of each payload of a micro-batch with so many supervised tokens."""
        references, each = self.recipe.references, BYTES[self.recipe.references.dtype]
        if kind == "hidden":
            rows = [[(one.shape.hidden_size, each)] for one in self.frozen.values()]
        elif kind == "logits":
            rows = [[(self.vocab_size, each)] for _ in self.frozen]
        elif kind == "target":
            rows = [[(self.vocab_size, each)]]
        elif kind == "top_k":
            rows = [[(references.top_k, 4), (references.top_k, each), *([(1, each)] if references.tail else [])]]
        else:
            rows = [[(references.samples, 4)]]
        return [sum(ceil(num_tokens * size * each / _ALIGN) * _ALIGN for size, each in row) for row in rows]

    def allows(self, kind: str) -> str | None:
        """Say why a payload of this kind cannot be had in this run; None if it can."""
        if kind in APART:
            return None
        if reason := must_stay_apart(self.recipe.objective):
            return reason
        if self.are_served_apart:
            return "teachers.serves keeps the models apart"
        plain = self.recipe.objective.divergence.name == "forward_kl" and self.recipe.objective.support is None
        return None if kind != "sampled" or plain else "draws estimate forward_kl over all tokens alone"

    def arena_bytes(self, kind: str) -> int:
        """Return the bytes of a student rank's slots in shared memory, all of whose tokens may be supervised."""
        teachers = self.recipe.teachers
        payloads = self.payload_bytes(kind, self.recipe.train.tokens_per_micro_batch)
        slots = teachers.slots or (teachers.look_ahead + 2) * len(payloads)
        return slots * max(1, ceil(max(payloads) / _PAGE)) * _PAGE

    @property
    def heads(self) -> list[int]:
        """Hidden sizes of the frozen heads that a student's process holds, each once."""
        return [one.shape.hidden_size for one in self.models.values()] if self.payload == "hidden" else []


def read_run(
    name: str,
    overrides: Sequence[str],
    recipe: Recipe,
    where: Callable[[str], str],
    supervised: float,
    document: int | None,
) -> Run:
    """Find the shapes of a recipe's models. Raises ModelError for one that is nowhere to be read."""
    roles = {role: recipe.models.roles[role] for role in sorted({"student"} | needed_references(recipe.objective))}
    shapes = {}
    for role, settings in roles.items():
        key = where(f"{role_key(role)}.weights")
        found = _find(key, name, overrides, recipe, settings.weights, _DEPTH)
        if found is None:
            raise ModelError(
                f"{key}: {settings.weights} is no folder with config.json, no stage makes it, and its sizes are not "
                f"known. Write a folder that holds its config.json, or one of {', '.join(known_models())}."
            )
        shapes[role] = found
    frozen = {
        role: Frozen(shapes[role], settings.weights, settings.load_in_8bit)
        for role, settings in roles.items()
        if role != "student"
    }
    share = 1.0 if recipe.data.supervise == "all" or recipe.data.format == "text" else supervised
    return Run(
        recipe, shapes["student"], frozen, share, min(document or recipe.data.max_tokens, recipe.data.max_tokens)
    )


def _find(
    where: str, name: str, overrides: Sequence[str], recipe: Recipe, weights: str, depth: int
) -> Architecture | None:
    """Read a model's sizes from the disk or models.yaml, or from the stage that will make it."""
    if found := read_architecture(where, weights):
        return found
    root = Path(recipe.root)
    for stage in recipe.pipeline if depth else []:
        if stage.model is not None and Path(weights) == root / stage.name:
            return _made(weights, stage.model, recipe)
        if stage.train is not None and Path(weights) == root / stage.name / "export":
            before = load(name, overrides, stage.name).recipe
            return _find(where, name, overrides, recipe, before.models.student.weights, depth - 1)
    # A baseline takes its models from the recipe whose folder it shares, wherever root=... puts that.
    owner = Path(load(name).recipe.root).name if depth and root in Path(weights).parents else name
    if owner != name and owner in recipe_names():
        shared = [f"root={recipe.root}", *(word for word in overrides if word.startswith("models."))]
        return _find(where, owner, shared, load(owner, shared).recipe, weights, depth - 1)
    return None


def _made(name: str, model: NewModelSettings, recipe: Recipe) -> Architecture:
    """Return the sizes of a new model; its head has a row for each token that its tokenizer may have."""
    rows = model.head_rows
    for stage in recipe.pipeline:
        if rows is None and stage.tokenizer is not None and Path(model.tokenizer) == Path(recipe.root) / stage.name:
            rows = stage.tokenizer.vocab_size
    return Architecture(
        name=name,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.hidden_size // model.num_heads,
        intermediate_size=model.intermediate_size,
        head_rows=rows or 4096,
        is_tied=model.tie_embeddings,
        max_positions=model.max_positions,
        kind=model.architecture,
        has_bias=model.architecture == "qwen2",
    )
