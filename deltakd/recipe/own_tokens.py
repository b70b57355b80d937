"""What cannot be had of tokens that the student writes while it trains; every refusal names the value to write.

Looks at the recipe alone. Imports no torch.
"""

from collections.abc import Callable

from deltakd.base.errors import RecipeError
from deltakd.losses.settings import needed_references
from deltakd.recipe.schema import Recipe

Where = Callable[[str], str]


def check_own_tokens(recipe: Recipe, where: Where) -> None:
    """Raise RecipeError for rollouts and objectives on them that cannot hold together."""
    if not recipe.rollouts.are_written:
        _check_never_written(recipe, where)
        return
    place = f"{where('rollouts.on_policy_fraction')}: {recipe.rollouts.on_policy_fraction:g}"
    if recipe.rollouts.adaptive is not None:
        place = f"{where('rollouts.adaptive')}: set"
    if recipe.references.source == "cache":
        raise RecipeError(f"{place}, but a cache knows no answer before it is written. Write references.from: service.")
    if recipe.objective.sft_weight:
        raise RecipeError(
            f"{place}, but objective.sft_weight is {recipe.objective.sft_weight:g}: the student would learn its own "
            "answers as if they were data. Write sft_weight: 0."
        )
    if recipe.data.format == "text" or recipe.data.supervise == "all":
        raise RecipeError(f"{place}, but rows of which all is learnt have no prompt. Write data.supervise: assistant.")
    if recipe.rollouts.adaptive is not None and recipe.validation.every_steps is None:
        raise RecipeError(f"{place}, but nothing is validated that it could follow. Write validation.every_steps.")
    _check_drawing(recipe, where)


def _check_never_written(recipe: Recipe, where: Where) -> None:
    asked = {
        "objective.policy_gradient": recipe.objective.policy_gradient is not None,
        "rollouts.replay": recipe.rollouts.replay is not None,
        "rollouts.teacher_mix": recipe.rollouts.teacher_mix > 0,
    }
    for key, is_set in asked.items():
        if is_set:
            raise RecipeError(
                f"{where(key)}: set, but the student never writes. Write rollouts.on_policy_fraction: 1, or leave it "
                "out."
            )


def _check_drawing(recipe: Recipe, where: Where) -> None:
    """Probabilities are kept of tokens that were drawn from the whole distribution, as it is trained."""
    settings = recipe.rollouts
    if recipe.objective.policy_gradient is None and not settings.teacher_mix:
        return
    key = "rollouts.teacher_mix" if settings.teacher_mix else "objective.policy_gradient"
    for name in ("temperature", "top_p"):
        if getattr(settings, name) != 1:
            raise RecipeError(
                f"{where(f'rollouts.{name}')}: {getattr(settings, name):g}, but {key.rpartition('.')[2]} needs tokens "
                "drawn from the student as it is trained. Write 1."
            )
    if settings.teacher_mix and "teacher" not in needed_references(recipe.objective):
        raise RecipeError(
            f"{where('rollouts.teacher_mix')}: {settings.teacher_mix:g}, but the objective reads no model named "
            "teacher. Write 0, or a target that holds it."
        )
