"""`deltakd evaluate`: any models on a recipe's held-out rows, by a protocol, in one table.

Several processes share the parts out, on one node (`--processes`) or on any that see root (`--shard`); the call without
a share takes what is missing and makes the table. A call that was killed goes on with the parts that are not there.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from deltakd.base.errors import RunError
from deltakd.base.rundir import RunDirectory
from deltakd.evaluate.settings import CompareSettings
from deltakd.recipe.evaluation import Plan, bar_of, finish, results_in, take_share
from deltakd.recipe.load import Loaded, load
from deltakd.recipe.paths import LABEL, check_held_out
from deltakd.recipe.schema import Recipe
from deltakd.recipe.shares import follow_shares, local_index, read_share

TEACHER = "teacher"
NOBODY = "none"


@dataclass(frozen=True)
class Request:
    """What was typed."""

    recipe: str
    models: Sequence[str]  # PATH, LABEL=PATH, and settings that argparse could not tell from them
    overrides: Sequence[str]
    protocol: str = "paper"
    name: str | None = None  # of the folder under ROOT/evaluations; None: the protocol's
    baseline: str | None = None  # None: the first model
    teacher: str | None = None  # None: the recipe's, if its folder is there
    to_target: bool = False
    num_processes: int = 1
    shard: str | None = None


def run(request: Request) -> None:
    """Live the verb: score all models, or take one share of the work, and print the table."""
    settings = [word for word in request.models if _is_setting(word)]
    request = replace(
        request,
        models=[word for word in request.models if word not in settings],
        overrides=[*request.overrides, *settings],
    )
    loaded = load(request.recipe, request.overrides)
    compared, folder = _compared(loaded, request), _folder(loaded.recipe, request)
    check_held_out(loaded.recipe, loaded.where, request.recipe)
    index = local_index() if request.shard is not None else 0
    plan = Plan(loaded, compared, folder, "--model LABEL", request.protocol, request.to_target, index)
    if request.shard is not None:
        share = read_share(request.shard)
        take_share(plan, *share)
        words = f"share {request.shard} is taken; the same command without --shard makes the table"
        print(f"{folder}: {words}", flush=True)
        return
    console = Console(stderr=True)
    with RunDirectory(folder).claim():
        if request.num_processes > 1:
            _follow(plan, _command(request, compared), request.num_processes, console)
        finish(plan, console)
    print(f"{(folder / 'table.md').read_text()}\n{results_in(folder)}")


def _is_setting(word: str) -> bool:
    """Tell a setting from LABEL=PATH: it begins with a part of recipes, as root= or evaluation.num_prompts=."""
    key, equals, _ = word.partition("=")
    return bool(equals) and key.partition(".")[0] in Recipe.model_fields


def _folder(recipe: Recipe, request: Request) -> Path:
    name = request.name or request.protocol
    if not LABEL.fullmatch(name) or name in (".", ".."):
        raise RunError(f"--name: {name!r} is no folder's name. Write one of letters, digits, '.', '_' and '-'.")
    return Path(recipe.root) / "evaluations" / name


def _compared(loaded: Loaded, request: Request) -> CompareSettings:
    """Return the models by label, with the teacher among them where there is one."""
    root = Path(loaded.recipe.root)
    models: dict[str, str] = {}
    for word in request.models:
        label, path = _labelled(word, root)
        if label in models:
            raise RunError(f"--model: {label} is the label of {models[label]} and of {path}. Write LABEL={path}.")
        models[label] = path
    if not models:
        raise RunError("--model: no model. Write a run, the folder of a model or a hub id.")
    baseline = request.baseline or next(iter(models))
    teacher = _teacher(loaded.recipe, request, models, root)
    if baseline not in models:
        raise RunError(f"--baseline: {baseline} is none of the labels {', '.join(models)}. Write one of them.")
    return CompareSettings(models=models, baseline=baseline, teacher=teacher)


def _teacher(recipe: Recipe, request: Request, models: dict[str, str], root: Path) -> str | None:
    """Return the teacher's label; one that is none of the models is put before them."""
    given = request.teacher
    if given == NOBODY:
        return None
    if given is not None and given in models:
        return given
    if given is None:
        known = recipe.models.teacher
        if known is None or not (Path(known.weights).expanduser() / "config.json").exists():
            return None
        given = known.weights
    path = _labelled(given, root)[1]
    for label, other in models.items():
        if Path(other).expanduser().resolve() == Path(path).expanduser().resolve():
            return label
    if TEACHER in models:
        raise RunError(f"--model: {TEACHER} is the label of {models[TEACHER]} and of --teacher {path}. Write another.")
    others = dict(models)
    models.clear()
    models.update({TEACHER: path} | others)
    return TEACHER


def _labelled(word: str, root: Path) -> tuple[str, str]:
    """Read PATH or LABEL=PATH; of a run the weights are its export."""
    label, equals, path = word.partition("=")
    if not equals or not LABEL.fullmatch(label):
        label, path = "", word
    weights = _weights(path, root)
    if not label:
        parts = [part for part in Path(weights).parts if part not in ("export", "/")]
        label = re.sub(r"[^A-Za-z0-9_.-]", "_", parts[-1]) if parts else "model"
    return label, weights


def _weights(path: str, root: Path) -> str:
    """Return the folder of a model that a path, a run or a run's name under root stands for, or the hub id it is."""
    for folder in (Path(path).expanduser(), root / path):
        if (folder / "config.json").exists():
            return str(folder)
        if (folder / "export" / "config.json").exists():
            return str(folder / "export")
        if (folder / "recipe.yaml").exists():
            raise RunError(f"--model: {folder} is a run without an export yet. Let it finish, or write another model.")
        if not path:
            raise RunError("--model: an empty path. Write a run, the folder of a model or a hub id.")
    return path


def _command(request: Request, compared: CompareSettings) -> list[str]:
    """Return the command that takes a share of the same question."""
    # A path alone has its label back: `train=...`, of a run that is named train, would be read as a setting.
    own = {label: _labelled(path, Path())[0] == label for label, path in compared.models.items()}
    models = [path if own[label] else f"{label}={path}" for label, path in compared.models.items()]
    options = [
        "--protocol",
        request.protocol,
        "--baseline",
        compared.baseline,
        "--name",
        request.name or request.protocol,
    ]
    options += ["--teacher", compared.teacher or NOBODY, *(["--target"] if request.to_target else [])]
    words = [request.recipe, *request.overrides, *options, "--model", *models]
    return [sys.executable, "-m", "deltakd", "evaluate", *words]


def _follow(plan: Plan, command: Sequence[str], num_processes: int, console: Console) -> None:
    plan.folder.mkdir(parents=True, exist_ok=True)
    with bar_of(console) as bar:
        tasks: Mapping[int, object] = {id(one): bar.add_task(one.label, total=one.total) for one in plan.questions}

        def show() -> None:
            for one in plan.questions:
                bar.update(tasks[id(one)], completed=one.done)  # type: ignore[arg-type]

        follow_shares(command, plan.folder, num_processes, show)
        show()
