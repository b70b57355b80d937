"""What one setting asks of another; every refusal names the line and the value to write.

Looks at the recipe alone, so it runs anywhere; what is named on the disk is looked for in `paths.py`. Imports no torch.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from deltakd.base.errors import RecipeError
from deltakd.data.settings import SourceSettings
from deltakd.losses.settings import must_stay_apart, needed_references
from deltakd.models.settings import role_key
from deltakd.recipe.load import Loaded, load
from deltakd.recipe.own_tokens import check_own_tokens
from deltakd.recipe.paths import row_range, same_rows_source
from deltakd.recipe.schema import CompareSettings, Recipe

Where = Callable[[str], str]
LABEL = re.compile(r"[A-Za-z0-9_.-]+")


def check_every_stage(name_or_path: str, overrides: Sequence[str] = ()) -> list[Loaded]:
    """Load and check a recipe as it is, then as each of its train stages runs it; return them in that order."""
    base = load(name_or_path, overrides)
    check_recipe(base.recipe, base.where)
    loaded = [base]
    for stage in base.recipe.pipeline:
        if stage.kind == "train":
            loaded.append(load(name_or_path, overrides, stage.name))
            check_recipe(loaded[-1].recipe, loaded[-1].where)
    return loaded


def check_recipe(recipe: Recipe, where: Where) -> None:
    """Raise RecipeError for settings that cannot hold together."""
    _check_root(recipe, where)
    _check_references(recipe, where)
    _check_8bit(recipe, where)
    _check_payload(recipe, where)
    _check_tensor_parallel(recipe, where)
    _check_serves(recipe, where)
    _check_lengths(recipe, where)
    _check_schedule(recipe, where)
    _check_validation(recipe, where)
    check_own_tokens(recipe, where)
    _check_profile(recipe, where)
    _check_rows_apart(recipe, where)
    _check_prompts_apart(recipe, where)
    _check_labels(recipe.evaluation.kept, "evaluation.kept", where)
    _check_labels(recipe.models.teachers, "models.teachers", where)
    _check_labels(recipe.models.teachers_raw, "models.teachers_raw", where)
    _check_pipeline(recipe, where)


def _check_root(recipe: Recipe, where: Where) -> None:
    if recipe.root.startswith("~"):
        raise RecipeError(f"{where('root')}: {recipe.root} has a ~. Write {Path(recipe.root).expanduser()}.")


def _check_references(recipe: Recipe, where: Where) -> None:
    known = [role for role in recipe.models.roles if role != "student"]
    for role in sorted(needed_references(recipe.objective) - set(known)):
        kind, _, name = role.partition(".")
        if kind not in ("teacher", "teacher_raw"):
            reward = recipe.objective.policy_gradient
            key = "policy_gradient.reward" if reward is not None and role in reward.reward else "target.weights"
            raise RecipeError(
                f"{where(f'objective.{key}')}: {role} is no frozen model. "
                f"Write one of {', '.join(known)}, or teacher.NAME with models.teachers."
            )
        policy = recipe.objective.model_copy(update={"policy_gradient": None})
        reader = f"the target {recipe.objective.target.name}" if role in needed_references(policy) else "the reward"
        raise RecipeError(
            f"{where(role_key(role))}: missing, but {reader} reads it. "
            f"Write {name or role}: {{weights: FOLDER or hub id}}, or objective.sft_weight: 1.0 to train without."
        )


def _check_validation(recipe: Recipe, where: Where) -> None:
    settings = recipe.validation
    if settings.every_steps is not None and recipe.data.validation is None:
        raise RecipeError(
            f"{where('validation.every_steps')}: {settings.every_steps}, but there are no held-out rows. "
            "Write data.validation: {path: FILE}."
        )
    if settings.every_steps is None and (settings.stop_after is not None or settings.export == "best"):
        name = "stop_after" if settings.stop_after is not None else "export"
        raise RecipeError(
            f"{where(f'validation.{name}')}: {getattr(settings, name)}, but nothing is validated. "
            "Write validation.every_steps."
        )
    silent = not needed_references(recipe.objective) or recipe.references.payload == "sampled"
    if settings.best_by == "kl_to_target" and silent:
        raise RecipeError(
            f"{where('validation.best_by')}: kl_to_target, but this run knows no whole target. "
            "Write loss or cross_entropy."
        )
    if settings.answers_every is not None and recipe.data.format == "text":
        raise RecipeError(
            f"{where('validation.answers_every')}: {settings.answers_every}, but a text holds no prompt. "
            "Leave it out, or write data.format: messages."
        )


def _check_profile(recipe: Recipe, where: Where) -> None:
    window, steps = recipe.records.profile, recipe.train.steps
    if window is not None and not window.first_step <= window.last_step <= steps:
        raise RecipeError(
            f"{where('records.profile')}: {window.first_step} to {window.last_step} are no window of "
            f"{steps:,} steps. Write {{first_step: 1, last_step: {min(3, steps)}}}."
        )


def _check_8bit(recipe: Recipe, where: Where) -> None:
    if recipe.models.student.load_in_8bit:
        raise RecipeError(
            f"{where('models.student.load_in_8bit')}: true, but the student is trained, and 8 bit cannot be. "
            "Leave it out; a frozen model of the same weights is models.student_raw."
        )


def _check_payload(recipe: Recipe, where: Where) -> None:
    payload, objective = recipe.references.payload, recipe.objective
    if payload not in ("target", "top_k", "sampled") or not needed_references(objective):
        return
    key = where("references.payload")
    if reason := must_stay_apart(objective):
        raise RecipeError(f"{key}: {payload}, but {reason}. Write hidden, logits or auto.")
    if payload == "sampled" and (objective.divergence.name != "forward_kl" or objective.support is not None):
        beside = "" if objective.support is None else " on a support"
        raise RecipeError(
            f"{key}: sampled, but draws estimate forward_kl over all tokens alone, not {objective.divergence.name}"
            f"{beside}. Write top_k, target or auto."
        )


def _check_tensor_parallel(recipe: Recipe, where: Where) -> None:
    shards, per_node = recipe.teachers.tensor_parallel, recipe.teachers.per_node
    needed = needed_references(recipe.objective)
    if shards == 1 or not needed:
        return
    key = where("teachers.tensor_parallel")
    if per_node % shards:
        raise RecipeError(
            f"{key}: {per_node} processes of a node do not make teachers of {shards} each. "
            f"Write teachers.per_node: {-(-per_node // shards) * shards}, or a number that divides {per_node}."
        )
    if recipe.references.source == "in_process":
        raise RecipeError(
            f"{key}: {shards}, but references.from: in_process loads whole models beside the student. "
            "Write references.from: service, or 1."
        )
    for role in sorted(needed):
        if recipe.models.roles[role].load_in_8bit:
            raise RecipeError(
                f"{where(f'{role_key(role)}.load_in_8bit')}: true, but teachers.tensor_parallel is {shards}, and "
                "a model in 8 bit is not split. Leave one of them out."
            )


def _check_serves(recipe: Recipe, where: Where) -> None:
    teachers, needed = recipe.teachers, needed_references(recipe.objective)
    if teachers.serves is None or not needed:
        return
    key = where("teachers.serves")
    count = teachers.per_node // teachers.tensor_parallel
    if len(teachers.serves) != count:
        split = (
            f" ({teachers.per_node} processes, {teachers.tensor_parallel} each)" if count < teachers.per_node else ""
        )
        raise RecipeError(
            f"{key}: {len(teachers.serves)} lists for {count} teacher ranks of a node{split}. Write one list for each."
        )
    known = [role for role in recipe.models.roles if role != "student"]
    for name in sorted({name for names in teachers.serves for name in names} - set(known)):
        raise RecipeError(f"{key}: {name} is no frozen model. Write some of {', '.join(known)}.")
    together = recipe.references.payload in ("target", "top_k", "sampled")
    served = [set(names) for names in teachers.serves] if together else [set().union(*teachers.serves)]
    for names in served:
        if missing := sorted(needed - names):
            why = f"payload {recipe.references.payload} is formed of all of them" if together else "nobody serves it"
            raise RecipeError(f"{key}: {missing[0]} is missing, and {why}. Add it, or leave serves out.")


def _check_lengths(recipe: Recipe, where: Where) -> None:
    for key in ("tokens_per_micro_batch", "tokens_per_step"):
        most = getattr(recipe.train, key)
        if recipe.data.max_tokens > most:
            raise RecipeError(
                f"{where('data.max_tokens')}: an example of {recipe.data.max_tokens:,} tokens does not fit into "
                f"train.{key}, {most:,}. Write {most:_} or less, or train.{key}: {recipe.data.max_tokens:_}."
            )


def _check_schedule(recipe: Recipe, where: Where) -> None:
    train = recipe.train
    if train.warmup_steps >= train.steps:
        raise RecipeError(
            f"{where('train.warmup_steps')}: {train.warmup_steps:,} steps of warm-up leave none of train.steps, "
            f"{train.steps:,}. Write {train.steps - 1:_} or less."
        )


def _check_rows_apart(recipe: Recipe, where: Where) -> None:
    """Refuse validation rows that are also learnt."""
    _check_apart("train", recipe.data.train, recipe.data.validation, where)
    if recipe.data.corpus is not None:
        _check_apart("corpus", recipe.data.corpus, recipe.data.validation, where)


def _check_apart(key: str, learnt: SourceSettings, validation: SourceSettings | None, where: Where) -> None:
    if validation is None or not same_rows_source(learnt, validation):
        return
    for choice in ("where", "max_characters"):
        if getattr(learnt, choice) != getattr(validation, choice):
            raise RecipeError(
                f"{where(f'data.validation.{choice}')}: not data.{key}'s, so which rows of {validation.path} are first "
                f"differs, and held-out ones may be learnt. Write the same {choice} for both."
            )
    (learnt_begin, learnt_end), (begin, end) = row_range(learnt), row_range(validation)
    if max(learnt_begin, begin) >= min(learnt_end, end):
        return
    if end != float("inf"):
        todo = f"Write data.{key}.skip_rows: {end:_}"
    elif learnt_end != float("inf"):
        todo = f"Write data.validation.skip_rows: {learnt_end:_}, and of fewer rows a smaller data.{key}.num_rows first"
    else:
        todo = f"Write data.validation.num_rows, and the same number as data.{key}.skip_rows"
    shared_end = min(learnt_end, end)
    shared = f"{max(learnt_begin, begin):,} to {'the last' if shared_end == float('inf') else format(shared_end, ',')}"
    raise RecipeError(f"{where('data.validation')}: rows {shared} of {validation.path} are also in data.{key}. {todo}.")


def _check_prompts_apart(recipe: Recipe, where: Where) -> None:
    data = recipe.data
    if data.apart == "prompts" and data.validation is not None and (data.supervise == "all" or data.format == "text"):
        raise RecipeError(
            f"{where('data.apart')}: prompts, but rows of which all is learnt have no prompt. Write rows."
        )


def _check_labels(labels: Iterable[str], key: str, where: Where) -> None:
    for label in labels:
        if LABEL.fullmatch(label) is None:
            raise RecipeError(f"{where(key)}: the name {label!r} does not fit. Write letters, digits, _, . and - only.")


def _check_pipeline(recipe: Recipe, where: Where) -> None:
    first: dict[str, int] = {}
    for i, stage in enumerate(recipe.pipeline):
        if stage.name in first:
            earlier = where(f"pipeline.{first[stage.name]}.name")
            raise RecipeError(f"{where(f'pipeline.{i}.name')}: {stage.name} is taken by {earlier}. Write another name.")
        first[stage.name] = i
        if stage.evaluate is not None:
            _check_comparison(recipe, stage.evaluate, f"pipeline.{i}.evaluate", where)


def _check_comparison(recipe: Recipe, compare: CompareSettings, key: str, where: Where) -> None:
    _check_labels(compare.models, f"{key}.models", where)
    for role in ("baseline", "teacher"):
        label = getattr(compare, role)
        if label is not None and label not in compare.models:
            known = ", ".join(compare.models)
            raise RecipeError(f"{where(f'{key}.{role}')}: {label} is none of the models. Write one of {known}.")
    if recipe.data.validation is None:
        raise RecipeError(
            f"{where('data.validation')}: missing, but {key} draws its prompts there. Write a path of rows."
        )
