"""The stages of a pipeline as a list: what each makes, and whose output it reads. What a chain of jobs is made from."""

import json
import re
from collections.abc import Sequence
from typing import Any

from deltakd.losses.settings import needed_references
from deltakd.recipe.checks import check_every_stage
from deltakd.recipe.load import Loaded
from deltakd.recipe.schema import Recipe, StageSettings


def describe_stages(name: str, overrides: Sequence[str]) -> str:
    """Return a line for each stage, in order: its name, its kind, and the stages that it needs, or `-`."""
    return "\n".join(f"{one} {kind} {','.join(needs) or '-'}" for one, kind, needs in _stages(name, overrides))


def stages_behind(name: str, overrides: Sequence[str], readers: Sequence[Recipe]) -> list[str]:
    """Name the stages of a recipe that must be there before other trainings in its root, and its evaluation, can begin.

    `readers` are those trainings' recipes. In the pipeline's order, with whatever these stages need themselves.
    """
    stages = _stages(name, overrides)
    recipe = check_every_stage(name, overrides)[0].recipe
    reads = [recipe.model_dump(mode="json", include={"models", "data", "evaluation"}), *map(_training_reads, readers)]
    wanted = set(_needs(recipe, reads, [one for one, _, _ in stages]))
    for one, _, needs in reversed(stages):  # each needs earlier ones alone
        wanted |= set(needs) if one in wanted else set()
    return [one for one, _, _ in stages if one in wanted]


def _stages(name: str, overrides: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """Return each stage's name, its kind, and the stages that it needs."""
    base, *trained = check_every_stage(name, overrides)
    by_name = dict(zip((stage.name for stage in base.recipe.pipeline if stage.train is not None), trained, strict=True))
    stages = []
    for index, stage in enumerate(base.recipe.pipeline):
        before = [one.name for one in base.recipe.pipeline[:index]]
        needs = _needs(base.recipe, _reads(base.recipe, stage, by_name.get(stage.name)), before)
        stages.append((stage.name, stage.kind, needs))
    return stages


def _reads(recipe: Recipe, stage: StageSettings, loaded: Loaded | None) -> Any:
    """Return the settings that may name another stage's folder."""
    if loaded is not None:
        return _training_reads(loaded.recipe)
    own = stage.model_dump(mode="json")
    if stage.tokenizer is not None and stage.tokenizer.files is None:
        return [own, recipe.data.train.path]
    if stage.evaluate is not None:
        return [own, recipe.model_dump(mode="json", include={"models", "data", "evaluation"})]
    if stage.generate is not None:
        model = recipe.models.roles.get(stage.generate.model)
        rows = stage.generate.rows or recipe.data.train
        return [own, model.weights if model else None, rows.path]
    return own


def _training_reads(recipe: Recipe) -> Any:
    needed = needed_references(recipe.objective) if recipe.references.source != "cache" else ()
    models = [model.weights for role, model in recipe.models.roles.items() if role == "student" or role in needed]
    return [models, recipe.model_dump(mode="json", include={"data"})]


def _needs(recipe: Recipe, reads: Any, before: Sequence[str]) -> list[str]:
    text = json.dumps(reads)
    return [name for name in before if re.search(rf'"{re.escape(recipe.root)}/{name}[/"]', text)]
