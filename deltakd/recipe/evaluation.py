"""The evaluate stage: every model of the comparison answers the same held-out prompts; one table comes of it.

A model whose scores lie there already, for the same weights, rows, teacher and settings, is not asked again. `compare`
and the verb `evaluate` (evaluating.py) go the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deltakd.base.errors import RecipeError, RunError
from deltakd.base.machine import machine_facts
from deltakd.base.rundir import FINISHED, MODELS, RunDirectory
from deltakd.engine.protocol import device_name
from deltakd.evaluate.compare import Comparison, ModelScores, compare, results_of, write_comparison
from deltakd.evaluate.protocols import PROTOCOLS, Protocol
from deltakd.evaluate.settings import CompareSettings
from deltakd.losses.objectives import objective
from deltakd.losses.schedules import alpha_over_steps
from deltakd.models.load import resolve
from deltakd.models.settings import WeightsSettings, role_key
from deltakd.recipe.asked import Asked, HeldOut, Shelf, Target, Weights
from deltakd.recipe.card import CARD, card_scores
from deltakd.recipe.held_out import held_out_conversations
from deltakd.recipe.load import Loaded
from deltakd.recipe.paths import check_held_out
from deltakd.recipe.scoring import Scoring, gather

RAW = "student_raw"


@dataclass(frozen=True)
class Plan:
    """Which models are scored, how, and where the scores go; `where` names a model's place in errors, by its label."""

    loaded: Loaded
    settings: CompareSettings
    folder: Path
    where: str  # with LABEL in it
    protocol_name: str = "paper"
    to_target: bool = False  # whether the KL to the recipe's target is taken
    local_index: int = 0  # of the accelerator

    @cached_property
    def protocol(self) -> Protocol:
        """How the models are asked."""
        return PROTOCOLS[self.protocol_name](self.loaded.recipe.evaluation)

    @cached_property
    def models(self) -> dict[str, Weights]:
        """The models by label. Raises ModelError for one that is not there."""
        found = {}
        for label, weights in self.settings.models.items():
            key = self.where.replace("LABEL", label)
            given = self._given(label, weights)
            found[label] = Weights(key, resolve(key, given), given.load_in_8bit)
        return found

    def _given(self, label: str, weights: str) -> WeightsSettings:
        """Return what the recipe says of weights, as the role that the label names has them, else the first that does.

        So a teacher is the one that the student learnt from: of its revision, and in 8 bit if that served.
        """
        roles = self.loaded.recipe.models.roles
        named = [roles[label]] if label in roles else []
        alike = (one for one in (*named, *roles.values()) if one.weights == weights)
        return next(alike, WeightsSettings(weights=weights))

    @cached_property
    def asked(self) -> list[Asked]:
        """Every model with its question, in the table's order."""
        return [self._ask(label, weights) for label, weights in self.models.items()]

    @cached_property
    def before(self) -> Asked | None:
        """The raw student, of which only `kept` is asked; None where nothing is kept, or it is not there."""
        models, kept = self.loaded.recipe.models, self.loaded.recipe.evaluation.kept
        raw = Path(models.roles[RAW].weights).expanduser()
        if not any(kept.values()) or not (raw / "config.json").exists():
            return None
        for one in self.asked:
            if one.weights.path.resolve() == raw.resolve():
                return one
        return self._ask(RAW, Weights(self.loaded.where(f"{role_key(RAW)}.weights"), raw), only_kept=True)

    @property
    def questions(self) -> list[Asked]:
        """All that is asked: the models, and the raw student if it is none of them."""
        return [*self.asked, *([self.before] if self.before is not None and self.before.only_kept else [])]

    def _ask(self, label: str, weights: Weights, only_kept: bool = False) -> Asked:
        recipe, teacher = self.loaded.recipe, self.settings.teacher
        against = None if teacher is None or only_kept else self.models[teacher]
        target = None if only_kept else self._target
        return Asked(
            recipe, self.protocol, label, weights, self._shelf, self._held_out, against, target, self.folder, only_kept
        )

    @property
    def facts(self) -> dict[str, Any]:
        """Return what was asked, of whom and where, for records."""
        recipe = self.loaded.recipe
        assert recipe.data.validation is not None  # whose rows were asked
        facts = {**machine_facts(), "seed": recipe.seed, "rows": recipe.data.validation.path}
        asked = {"asked": self.protocol.facts(), "num_prompts": len(self._held_out.rows)}
        return facts | {"protocol": self.protocol.name} | asked

    @cached_property
    def _shelf(self) -> Shelf:
        return Shelf(self.loaded.recipe.models, device_name(self.local_index))

    @cached_property
    def _held_out(self) -> HeldOut:
        recipe = self.loaded.recipe
        return HeldOut(held_out_conversations(recipe, recipe.evaluation.num_prompts), recipe.data.format == "math")

    @cached_property
    def _target(self) -> Target | None:
        if not self.to_target:
            return None
        recipe, where = self.loaded.recipe, self.loaded.where
        settings = recipe.objective.model_copy(update={"sft_weight": 0.0, "policy_gradient": None})
        of = objective(settings).at(alpha_over_steps(settings.target, recipe.train.steps).final)
        if recipe.objective.sft_weight == 1 or not of.needs:
            raise RecipeError(f"{where('objective')}: no frozen model is learnt from. Leave --target out.")
        frozen = {}
        for role in sorted(of.needs):
            given = recipe.models.roles.get(role)
            if given is None:
                raise RecipeError(
                    f"{where(role_key(role))}: missing, and --target reads it. Write it, or leave --target out."
                )
            key = where(f"{role_key(role)}.weights")
            frozen[role] = Weights(key, resolve(key, given), given.load_in_8bit)
        return Target(of, frozen)


def compare_checkpoints(loaded: Loaded, run_name: str, only: int | None) -> str:
    """Score the models that a run kept with its checkpoints; returns their table, or `only` one's name.

    Raises RunError if there is none, RecipeError if there are no held-out rows.
    """
    check_held_out(loaded.recipe, loaded.where)
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
    folder = run.path / "evaluation"
    if only is None:
        evaluate(loaded, run_name, settings, folder, console)
        return f"{(folder / 'table.md').read_text()}\n{results_in(folder)}"
    one = settings.model_copy(update={"models": {folders[only - 1].name: str(folders[only - 1])}})
    score_models(loaded, run_name, one, folder, console)
    return f"{folders[only - 1].name}: scored"


def results_in(folder: Path) -> str:
    """Say where a comparison's results lie."""
    return f"Results: {folder}/results.json, answers in {folder}/predictions/"


def evaluate(loaded: Loaded, stage: str, settings: CompareSettings, folder: Path, console: Console) -> None:
    """Score every model of a stage's comparison and write results.json, table.md and all answers."""
    finish(_plan(loaded, stage, settings, folder), console)


def score_models(
    loaded: Loaded, stage: str, settings: CompareSettings, folder: Path, console: Console, on_cards: bool = False
) -> list[ModelScores]:
    """Return the scores of every model of the comparison, row by row; what lies in `folder` is not taken again.

    Where the comparison names a teacher, `kl_to_teacher` is among them. They are said `on_cards` of runs, if asked for.
    """
    plan = _plan(loaded, stage, settings, folder)
    scores = _score(plan.asked, console)
    if on_cards:
        _write_cards(plan, results_of(_compare(plan, scores, None), plan.facts), console)
    return scores


def _plan(loaded: Loaded, stage: str, settings: CompareSettings, folder: Path) -> Plan:
    return Plan(loaded, settings, folder, loaded.where("pipeline").replace("pipeline", f"{stage}.models.LABEL"))


def finish(plan: Plan, console: Console) -> None:
    """Take what is missing of a plan's scores and write its results; `console` hears of warnings."""
    by_label = dict(zip([id(one) for one in plan.questions], _score(plan.questions, console), strict=True))
    before = None if plan.before is None else by_label[id(plan.before)]
    result, facts = _compare(plan, [by_label[id(one)] for one in plan.asked], before), plan.facts
    write_comparison(result, facts, plan.folder)
    _write_cards(plan, results_of(result, facts), console)
    for warning in result.warnings:
        console.print(f"warning: {warning}", style="yellow")


def _compare(plan: Plan, scores: Sequence[ModelScores], before: ModelScores | None) -> Comparison:
    settings, evaluation = plan.settings, plan.loaded.recipe.evaluation
    return compare(scores, settings.baseline, settings.teacher, evaluation.num_resamples, evaluation.seed, before)


def _write_cards(plan: Plan, results: Mapping[str, Any], console: Console) -> None:
    """Say on the card of every run's export among the models how it has scored, where it may be written."""
    for label, weights in plan.models.items():
        run = RunDirectory(weights.path.parent)
        if weights.path.resolve() == run.export.resolve() and (run.path / FINISHED).exists():
            try:
                card_scores(run, results, label)
            except OSError as error:  # another user's run
                said = f"{run.export / CARD}: its scores are not put there ({error.strerror})"
                console.print(f"warning: {said}", style="yellow", soft_wrap=True)


def take_share(plan: Plan, index: int, count: int) -> None:
    """Take one share of all parts that a plan's scores are made of."""
    taken = 0
    for asked in plan.questions:
        if asked.stored() is None:
            mine = asked.parts[(index - taken) % count :: count]  # rows of shares go on from model to model
            Scoring(asked).take(mine, lambda _: None)
        taken += len(asked.parts)


def _score(questions: Sequence[Asked], console: Console) -> list[ModelScores]:
    scores = []
    with bar_of(console) as bar:
        for asked in questions:
            task = bar.add_task(asked.label, total=asked.total)
            stored = asked.stored()
            if stored is None:
                Scoring(asked).take(asked.parts, lambda n, t=task: bar.advance(t, n))  # type: ignore[misc]
            scores.append(stored or gather(asked))
            bar.update(task, completed=asked.total)
    return scores


def bar_of(console: Console) -> Progress:
    """Return a bar of answers and rows, a line for each model."""
    columns = (TextColumn("{task.description:<14}"), BarColumn(bar_width=24), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
