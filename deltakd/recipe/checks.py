"""What one setting asks of another, and of this machine's disk; every refusal names the line and the value to write.

`check_recipe` looks at the recipe alone, so it runs anywhere; `check_paths` looks for local files and folders. Neither
imports torch, asks the hub, or reads a row.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from glob import has_magic
from pathlib import Path

from deltakd.base.errors import DataError, ModelError, RecipeError
from deltakd.base.hub import could_be_hub_id, refuse_unreachable
from deltakd.data.settings import SourceSettings
from deltakd.data.sources import local_files
from deltakd.losses.settings import must_stay_apart, needed_references
from deltakd.models.settings import role_key
from deltakd.recipe.load import Loaded, load
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
    _check_rows_apart(recipe, where)
    _check_labels(recipe.evaluation.kept, "evaluation.kept", where)
    _check_labels(recipe.models.teachers, "models.teachers", where)
    _check_labels(recipe.models.teachers_raw, "models.teachers_raw", where)
    _check_pipeline(recipe, where)


def check_paths(recipe: Recipe, where: Where, name: str = "NAME") -> None:
    """Raise RecipeError for local models and data that are not there; what can be a hub id passes.

    `name` is the recipe's, for the command that would make what lies under its root.
    """
    for role in ["student", *sorted(needed_references(recipe.objective))]:
        _check_model(recipe, f"{role_key(role)}.weights", recipe.models.roles[role].weights, where, name)
    train = _check_source(recipe, "data.train", recipe.data.train, where, name)
    if recipe.data.validation is not None:
        validation = _check_source(recipe, "data.validation", recipe.data.validation, where, name)
        shared = sorted(train & validation)
        if shared and not _same_rows_source(recipe.data.train, recipe.data.validation):
            raise RecipeError(
                f"{where('data.validation.path')}: {shared[0]} is also read for data.train. "
                "Write a path whose files data.train does not read."
            )
    for label, path in recipe.evaluation.kept.items():
        if path is not None:
            _check_files(recipe, f"evaluation.kept.{label}", path, where, name)


def check_hub(recipe: Recipe, where: Where) -> None:
    """Raise ModelError, after seconds, if a model that the objective needs is on a hub that cannot be reached."""
    for role in ["student", *sorted(needed_references(recipe.objective))]:
        model = recipe.models.roles[role]
        if could_be_hub_id(model.weights):
            try:
                refuse_unreachable("model", model.weights, model.revision, ModelError)
            except ModelError as error:
                raise ModelError(f"{where(f'{role_key(role)}.weights')}: {error}") from error


def _check_root(recipe: Recipe, where: Where) -> None:
    if recipe.root.startswith("~"):
        raise RecipeError(f"{where('root')}: {recipe.root} has a ~. Write {Path(recipe.root).expanduser()}.")


def _check_references(recipe: Recipe, where: Where) -> None:
    known = [role for role in recipe.models.roles if role != "student"]
    for role in sorted(needed_references(recipe.objective) - set(known)):
        kind, _, name = role.partition(".")
        if kind not in ("teacher", "teacher_raw"):
            raise RecipeError(
                f"{where('objective.target.weights')}: {role} is no frozen model. "
                f"Write one of {', '.join(known)}, or teacher.NAME with models.teachers."
            )
        raise RecipeError(
            f"{where(role_key(role))}: missing, but the target {recipe.objective.target.name} reads it. "
            f"Write {name or role}: {{weights: FOLDER or hub id}}, or objective.sft_weight: 1.0 to train without."
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
    """Refuse validation rows that are also trained on."""
    train, validation = recipe.data.train, recipe.data.validation
    if validation is None or not _same_rows_source(train, validation):
        return
    (train_begin, train_end), (begin, end) = _row_range(train), _row_range(validation)
    if max(train_begin, begin) >= min(train_end, end):
        return
    if end != float("inf"):
        todo = f"Write data.train.skip_rows: {end:_}"
    elif train_end != float("inf"):
        todo = f"Write data.validation.skip_rows: {train_end:_}"
    else:
        todo = "Write data.validation.num_rows, and the same number as data.train.skip_rows"
    shared_end = min(train_end, end)
    shared = f"{max(train_begin, begin):,} to {'the last' if shared_end == float('inf') else format(shared_end, ',')}"
    raise RecipeError(f"{where('data.validation')}: rows {shared} of {validation.path} are also in data.train. {todo}.")


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


def _check_model(recipe: Recipe, key: str, weights: str, where: Where, name: str) -> None:
    path = Path(weights).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise RecipeError(f"{where(key)}: {weights} holds no config.json. Write the folder of a model.")
    if not path.exists() and _is_local(weights, recipe.root):
        raise _not_there(recipe, where(key), weights, name, "the folder of a model or a hub id")


def _check_source(recipe: Recipe, key: str, source: SourceSettings, where: Where, name: str) -> set[Path]:
    files = _check_files(recipe, f"{key}.path", source.path, where, name)
    ignored = {
        "subset": source.subset,
        "revision": source.revision,
        "split": None if source.split == "train" else source.split,
    }
    for setting, value in ignored.items():
        if files and value is not None:
            raise RecipeError(f"{where(f'{key}.{setting}')}: {value}, but {source.path} is local. Leave {setting} out.")
    return files


def _check_files(recipe: Recipe, key: str, path: str, where: Where, name: str) -> set[Path]:
    """Return the local files that a path stands for, resolved; none for what can be a hub id."""
    if not Path(path).expanduser().exists() and not has_magic(path):
        if not _is_local(path, recipe.root):
            return set()
        raise _not_there(recipe, where(key), path, name, "an existing file, folder or pattern")
    try:
        return {file.resolve() for file in local_files(path)}
    except DataError as error:
        raise RecipeError(f"{where(key)}: {error}") from error


def _is_local(path: str, root: str) -> bool:
    """Tell whether a path that does not exist was meant as one of this machine, not as a hub id."""
    first, slash, _ = path.partition("/")
    return not could_be_hub_id(path) or _is_under(path, root) or bool(slash and Path(first).is_dir())


def _is_under(path: str, root: str) -> bool:
    return Path(os.path.normpath(root)) in (Path(os.path.normpath(path)), *Path(os.path.normpath(path)).parents)


def _not_there(recipe: Recipe, prefix: str, path: str, name: str, instead: str) -> RecipeError:
    todo = f"Write {instead}"
    if recipe.pipeline and _is_under(path, recipe.root):
        todo = f"Run `python -m deltakd run {name}` first, which makes it, or write {instead}"
    return RecipeError(f"{prefix}: {path} does not exist. {todo}.")


def _same_rows_source(one: SourceSettings, other: SourceSettings) -> bool:
    facts = [(os.path.normpath(source.path), source.subset, source.split) for source in (one, other)]
    return facts[0] == facts[1]


def _row_range(source: SourceSettings) -> tuple[int, float]:
    return source.skip_rows, source.skip_rows + (source.num_rows or float("inf"))
