"""What `bench methods` trains: base recipes, the methods that are laid on them, and a run for each seed.

A method is a training stage of the base's own pipeline (sft, forward_kl, delta) or a recipe of recipes/baselines: what
that adds to the recipe it extends, apart from where it lies and its pipeline. Every run is the base recipe with the
method's blocks as overrides, so all methods have the base's models, data, batches and number of steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltakd.base.errors import RunError
from deltakd.evaluate.responses import ROWS
from deltakd.recipe.checks import check_recipe
from deltakd.recipe.load import Loaded, as_override, load, read_added, recipe_names
from deltakd.recipe.schema import Recipe

BASELINES = "baselines/"
OF_PIPELINES = ("sft", "forward_kl", "delta")
NOT_ADDED = frozenset({"root", "run", "pipeline", "seed"})
# Where responses are learnt instead of the base's rows, nothing that chose among those is left.
ALL_ROWS: dict[str, Any] = {"skip_rows": 0, "num_rows": None, "where": None, "max_characters": None}
ALL_ROWS |= {"subset": None, "revision": None, "split": "train"}
RATE = "train.learning_rate"
SET_HERE = ("root", "run", "seed", "pipeline")


@dataclass(frozen=True)
class Base:
    """A recipe whose models and data the methods share."""

    name: str
    rows: Sequence[str]  # overrides that say where its data lie
    own: Sequence[str]  # the user's, which win over a method's
    root: Path

    @property
    def overrides(self) -> list[str]:
        """What its own stages are started with."""
        return [*self.rows, *self.own, f"root={self.root}"]

    def load(self) -> Loaded:
        """Load and check it."""
        loaded = load(self.name, self.overrides)
        check_recipe(loaded.recipe, loaded.where)
        return loaded


@dataclass(frozen=True)
class Method:
    """What a method lays on a base, and who writes responses for it first, if anyone does."""

    name: str
    blocks: Sequence[str]  # overrides
    generate: Sequence[str] | None = None  # overrides of the base with which its stage `responses` is run
    responses: str = ""


@dataclass(frozen=True)
class Run:
    """One training: a method on a base from a seed."""

    base: Base
    method: Method
    seed: int
    overrides: Sequence[str]
    recipe: Recipe

    @property
    def label(self) -> str:
        """Its folder's name, and its row's in the scores."""
        return self.recipe.run


def default_methods() -> list[str]:
    """Name the methods that are compared unless the user says which: those of the pipelines and every baseline."""
    return [*OF_PIPELINES, *(name.removeprefix(BASELINES) for name in recipe_names(BASELINES))]


def read_method(base: Base, name: str) -> Method:
    """Find a method by its name. Raises RunError for one that is unknown, or that trains more than one student."""
    recipe = base.load().recipe
    for stage in recipe.pipeline:
        if stage.name == name and stage.train is not None:
            return Method(name, _overrides(stage.train))
    if f"{BASELINES}{name}" not in recipe_names(BASELINES):
        raise RunError(
            f"--methods: {name} is no training stage of {base.name} and no recipe of recipes/{BASELINES}. "
            f"Write some of {', '.join(default_methods())}."
        )
    added = read_added(f"{BASELINES}{name}")
    stages: Sequence[Mapping[str, Any]] = added.get("pipeline", [])
    if not isinstance(stages, list):
        raise RunError(
            f"recipes/{BASELINES}{name}: its pipeline changes stages of what it extends, which says nothing of "
            "another base. Write the stages out as a list, or leave it out of --methods."
        )
    trained = [stage["train"] for stage in stages if "train" in stage]
    writing = [stage for stage in stages if "generate" in stage]
    if len(trained) > 1 or len(writing) > 1:
        raise RunError(
            f"recipes/{BASELINES}{name}: its pipeline has {len(trained)} stages that train and {len(writing)} that "
            "generate. bench methods knows one of each at most: leave it out of --methods, or make two recipes of it."
        )
    changes = trained[0] if trained else {}
    plain = _overrides(_plain_text(base, recipe)) if "corpus" in added.get("data", {}) else []
    method = Method(name, [*_overrides(added), *_overrides(changes), *plain])
    return _with_responses(base, recipe, method, added, writing[0]) if writing else method


def _plain_text(base: Base, recipe: Recipe) -> dict[str, Any]:
    """Return a block in which the text that a method learns beside its steps is what the base's raw student has read.

    A baseline's file can only name that of the recipe it extends. Empty where no stage of the base made that student.
    """
    for stage in recipe.pipeline:
        if stage.train is not None and recipe.models.student.weights.startswith(f"{recipe.root}/{stage.name}/"):
            read = load(base.name, base.overrides, stage.name).recipe.data.train
            return {"data": {"corpus": read.model_dump(mode="json")}}
    return {}


def _with_responses(
    base: Base, recipe: Recipe, method: Method, added: Mapping[str, Any], stage: Mapping[str, Any]
) -> Method:
    """Return the method with the stage that writes what it learns: to the prompts of the base, whichever those are."""
    said = {key: value for key, value in (stage["generate"] or {}).items() if key != "rows"}
    blocks = {key: value for key, value in added.items() if key in ("generation", "models")}
    pipeline = as_override("pipeline", [{"name": stage["name"], "generate": said}])
    generate = [*base.rows, *_overrides(blocks), *base.own, f"root={base.root}", pipeline]
    learnt: dict[str, Any] = {"train": {"path": f"{{root}}/{stage['name']}/{ROWS}", **ALL_ROWS}}
    if recipe.data.format != "messages":  # which responses are; the held-out rows are not, and no training reads them
        learnt |= {"format": "messages", "validation": None}
    return Method(method.name, [*method.blocks, *_overrides({"data": learnt})], generate, stage["name"])


def _overrides(blocks: Mapping[str, Any]) -> list[str]:
    return [as_override(key, value) for key, value in blocks.items() if key not in NOT_ADDED]


def plan(
    base: Base,
    methods: Sequence[str],
    seeds: Sequence[int],
    steps: int | None,
    engine: str,
    rates: Mapping[str, float] | None = None,
    within: str = "",
) -> list[Run]:
    """Return a run for each seed and method, all of the same number of steps; a seed's are together.

    `rates` holds learning rates that some methods have of their own; the runs lie in the folder `within`. Raises
    RecipeError for a method that cannot be laid on the base.
    """
    chosen = [read_method(base, name) for name in methods]
    chosen = [with_rate(one, rates[one.name]) if rates and one.name in rates else one for one in chosen]
    steps = base.load().recipe.train.steps if steps is None else steps
    return [
        plan_of(base, one, seed, steps, engine, f"{within}{one.name}_seed{seed}") for seed in seeds for one in chosen
    ]


def with_rate(method: Method, rate: float) -> Method:
    """Return the method with a learning rate of its own, which wins over its recipe's."""
    return replace(method, blocks=[*method.blocks, as_override(RATE, rate)])


def plan_of(base: Base, method: Method, seed: int, steps: int, engine: str, run: str) -> Run:
    """Return one training in the folder `run`. Raises RecipeError where the method cannot be laid on the base."""
    placed = [as_override("engine", {"name": engine}), *(["references.from=in_process"] if engine == "single" else [])]
    here = [f"root={base.root}", f"run={run}", f"seed={seed}", f"train.steps={steps}"]
    here.append("pipeline=[]")  # the base's: its evaluation would ask for held-out rows that a method may not read
    overrides = [*base.rows, *method.blocks, *base.own, *placed, *here]
    loaded = load(base.name, overrides)
    check_recipe(loaded.recipe, loaded.where)
    return Run(base, method, seed, overrides, loaded.recipe)
