"""The evaluate stage: every model of the comparison answers the same held-out prompts; one table comes of it.

A model whose scores lie there already, for the same weights, teacher and settings, is not asked again.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deltakd.base.errors import RunError
from deltakd.base.files import write_json
from deltakd.base.machine import machine_facts
from deltakd.base.rundir import MODELS, RunDirectory
from deltakd.data.conversation import Conversation
from deltakd.data.examples import Example
from deltakd.data.packing import PackedBatch, pack
from deltakd.data.settings import DataSettings, SourceSettings
from deltakd.data.sources import load_rows
from deltakd.data.template import ChatTemplate
from deltakd.data.tokenise import build_examples
from deltakd.data.tokenizer import load_tokenizer
from deltakd.engine.protocol import device_name
from deltakd.evaluate.compare import (
    CROSS_ENTROPY,
    KEPT,
    KL_TO_TEACHER,
    ModelScores,
    compare,
    write_comparison,
    write_predictions,
)
from deltakd.evaluate.cross_entropy import cross_entropy_rows, kl_rows
from deltakd.evaluate.generate import generate
from deltakd.evaluate.scores import rouge_rows
from deltakd.evaluate.settings import CompareSettings
from deltakd.models.load import identity, load_model, resolve
from deltakd.models.settings import ModelsSettings, WeightsSettings
from deltakd.models.vocabulary import refuse_foreign
from deltakd.recipe.held_out import held_out_conversations
from deltakd.recipe.load import Loaded
from deltakd.recipe.schema import Recipe

RULES_VERSION = 1  # raise it when the same models and rows would get other scores; stored ones are not read then


@dataclass(frozen=True)
class Teacher:
    """The model that all others are held against: loaded when the first of them asks, and once."""

    key: str
    path: Path
    settings: ModelsSettings

    @cached_property
    def model(self) -> Any:
        return load_model(self.key, self.path, self.settings).to(device_name(0))

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(str(self.path), self.settings.trust_remote_code)


def compare_checkpoints(loaded: Loaded, run_name: str, only: int | None) -> str:
    """Score the models that a run kept with its checkpoints; returns their table, or `only` one's name.

    Raises RunError if there is none.
    """
    console = Console(stderr=True)
    run = RunDirectory(Path(loaded.recipe.root) / run_name)
    folders = sorted((run.path / MODELS).glob("step-*[0-9]"))
    if not run.path.is_dir():
        there = sorted(path.parent.name for path in Path(loaded.recipe.root).glob("*/steps.jsonl"))
        raise RunError(f"{run.path}: there is no such run. Write --run with one of {', '.join(there) or 'none yet'}.")
    if not folders or (only is not None and not 1 <= only <= len(folders)):
        raise RunError(
            f"{run.path / MODELS}: {len(folders)} models are kept there"
            + (f", {only} is none of them." if folders else ". Train with checkpoints.models=true.")
        )
    settings = CompareSettings(models={one.name: str(one) for one in folders}, baseline=folders[0].name)
    if only is None:
        evaluate(loaded, run_name, settings, run.path / "evaluation", console)
        folder = run.path / "evaluation"
        return f"{(folder / 'table.md').read_text()}\nResults: {folder}/results.json, answers in {folder}/predictions/"
    one = settings.model_copy(update={"models": {folders[only - 1].name: str(folders[only - 1])}})
    score_models(loaded, run_name, one, run.path / "evaluation", console)
    return f"{folders[only - 1].name}: scored"


def evaluate(loaded: Loaded, stage: str, settings: CompareSettings, folder: Path, console: Console) -> None:
    """Score every model of the comparison and write results.json, table.md and all answers."""
    recipe = loaded.recipe
    scores = score_models(loaded, stage, settings, folder, console)
    result = compare(
        scores, settings.baseline, settings.teacher, recipe.evaluation.num_resamples, recipe.evaluation.seed
    )
    write_comparison(result, {**machine_facts(), "seed": recipe.seed}, folder)
    for warning in result.warnings:
        console.print(f"warning: {warning}", style="yellow")


def score_models(
    loaded: Loaded, stage: str, settings: CompareSettings, folder: Path, console: Console
) -> list[ModelScores]:
    """Return the scores of every model of the comparison, row by row; what lies in `folder` is not taken again.

    Where the comparison names a teacher, `kl_to_teacher` is among them.
    """
    recipe = loaded.recipe
    conversations = held_out_conversations(recipe, recipe.evaluation.num_prompts)
    scores = []
    where = loaded.where("pipeline")

    def find(label: str) -> tuple[str, Path]:
        key = where.replace("pipeline", f"{stage}.models.{label}")
        return key, resolve(key, WeightsSettings(weights=settings.models[label]))

    teacher = None if settings.teacher is None else Teacher(*find(settings.teacher), recipe.models)
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        for label in settings.models:
            key, path = find(label)
            task = bar.add_task(label, total=len(conversations))
            model = _Asked(recipe, key, label, path, teacher, folder)
            scores.append(_score_once(model, conversations, lambda n, t=task: bar.advance(t, n)))
            bar.update(task, completed=len(conversations))
    return scores


@dataclass(frozen=True)
class _Asked:
    """A model that is scored: under which label, from which folder, against whom, and where its scores go."""

    recipe: Recipe
    key: str
    label: str
    path: Path
    teacher: Teacher | None
    folder: Path


def _score_once(asked: _Asked, conversations: Sequence[Conversation], advance: Any) -> ModelScores:
    recipe = asked.recipe
    question = {"rules": RULES_VERSION, "identity": identity(asked.path), "data": recipe.data.model_dump(mode="json")}
    question["evaluation"] = recipe.evaluation.model_dump(mode="json")
    if asked.teacher is not None:  # without one the question is the one that was always asked
        question["teacher"] = identity(asked.teacher.path)
    kept = asked.folder / "scores" / f"{asked.label}.json"
    if kept.exists() and (stored := json.loads(kept.read_text()))["question"] == question:
        return ModelScores(**stored["scores"])
    scores = _score(asked, conversations, advance)
    write_json(kept, {"question": question, "scores": asdict(scores)})
    return scores


def _score(asked: _Asked, conversations: Sequence[Conversation], advance: Any) -> ModelScores:
    recipe, label, path, teacher = asked.recipe, asked.label, asked.path, asked.teacher
    tokenizer = load_tokenizer(str(path), recipe.models.trust_remote_code)
    if teacher is not None:
        refuse_foreign(asked.key, teacher.tokenizer, tokenizer)
    if teacher is not None and path == teacher.path:
        model = teacher.model
    else:
        model = load_model(asked.key, path, recipe.models).to(device_name(0))
    template = ChatTemplate(tokenizer)
    prompts = [template.encode_prompt(conversation.prompt, conversation.where) for conversation in conversations]
    answers = generate(model, tokenizer, prompts, template.end_of_turn_id, recipe.evaluation, advance)
    texts, references = [answer.text for answer in answers], [conversation.reference for conversation in conversations]
    batches = _packed(recipe.data, [template.encode([conversation])[0] for conversation in conversations])
    rows = {**rouge_rows(texts, references), CROSS_ENTROPY: cross_entropy_rows(model, batches, len(tokenizer))}
    if teacher is not None:
        rows[KL_TO_TEACHER] = kl_rows(model, teacher.model, batches, len(tokenizer))
    prompted = [conversation.prompt[-1].content for conversation in conversations]
    kept_rows = zip(prompted, references, texts, zip(*rows.values(), strict=True), strict=True)
    write_predictions(
        asked.folder,
        label,
        [
            {"prompt": prompt, "reference": reference, "answer": text, **dict(zip(rows, values, strict=True))}
            for prompt, reference, text, values in kept_rows
        ],
    )
    for name, file in recipe.evaluation.kept.items():
        if file is not None:
            rows[f"{KEPT}{name}"] = _kept(model, recipe, file, tokenizer)
    return ModelScores(label, str(path), identity(path), rows, sum(not answer.ended for answer in answers))


def _kept(model: Any, recipe: Recipe, file: str, tokenizer: Any) -> list[float]:
    """Return the cross-entropy of every row of a file of raw-domain text; its format shows in its first row."""
    source = SourceSettings(path=file)
    _, first = next(iter(load_rows(source)))
    data = recipe.data.model_copy(update={"format": "text" if "text" in first else recipe.data.format})
    examples = build_examples(data, source, tokenizer, None, progress=False)
    return cross_entropy_rows(model, _packed(data, list(examples)), len(tokenizer))


def _packed(data: DataSettings, examples: Sequence[Example]) -> list[PackedBatch]:
    """Pack rows in their order, as many together as data.max_tokens holds."""
    groups: list[list[Example]] = [[]]
    for row in examples:
        if groups[-1] and sum(len(one.tokens) for one in groups[-1]) + len(row.tokens) > data.max_tokens:
            groups.append([])
        groups[-1].append(row)
    return [pack(group) for group in groups]
