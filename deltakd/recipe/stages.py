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
    base, *trained = check_every_stage(name, overrides)
    by_name = dict(zip((stage.name for stage in base.recipe.pipeline if stage.train is not None), trained, strict=True))
    lines = []
    for index, stage in enumerate(base.recipe.pipeline):
        before = [one.name for one in base.recipe.pipeline[:index]]
        needs = _needs(base.recipe, _reads(base.recipe, stage, by_name.get(stage.name)), before)
        lines.append(f"{stage.name} {stage.kind} {','.join(needs) or '-'}")
    return "\n".join(lines)


def _reads(recipe: Recipe, stage: StageSettings, loaded: Loaded | None) -> Any:
    """Return the settings that may name another stage's folder."""
    if loaded is not None:
        trained = loaded.recipe
        needed = needed_references(trained.objective) if trained.references.source != "cache" else ()
        models = [model.weights for role, model in trained.models.roles.items() if role == "student" or role in needed]
        return [models, trained.model_dump(mode="json", include={"data"})]
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


def _needs(recipe: Recipe, reads: Any, before: Sequence[str]) -> list[str]:
    text = json.dumps(reads)
    return [name for name in before if re.search(rf'"{re.escape(recipe.root)}/{name}[/"]', text)]
