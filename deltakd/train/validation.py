"""Validation while a run trains: held-out rows through the same forward and loss, now and then answers to prompts.

It changes nothing in the training: nothing is updated, no random number is drawn. The target stands still at the alpha
that the run ends with, so that losses of different steps can be compared. Every rank takes its share.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf, isnan
from typing import Any

from deltakd.base.ranks import World
from deltakd.data.packing import PackedBatch
from deltakd.engine.protocol import Engine
from deltakd.evaluate.generate import generate
from deltakd.evaluate.scores import ROUGE, rouge_rows
from deltakd.evaluate.settings import EvaluationSettings
from deltakd.train.settings import ValidationSettings
from deltakd.train.step import Scored

MEASURED = ("loss", "cross_entropy", "divergence", "kl_to_target")
NUM_SHOWN = 3


@dataclass(frozen=True)
class ValidationRecord:
    """One line of validation.jsonl. Losses are means per supervised token, ROUGE is F1 between 0 and 1.

    None: the objective has no such number, or no prompts were answered this time.
    """

    step: int
    loss: float
    cross_entropy: float
    divergence: float | None
    kl_to_target: float | None
    rouge1: float | None
    rouge2: float | None
    rougeL: float | None
    is_best: bool
    num_supervised: int
    validation_s: float


@dataclass(frozen=True)
class Sample:
    """One answer, and what was asked."""

    prompt: str
    reference: str
    answer: str


@dataclass(frozen=True)
class Prompts:
    """A rank's held-out prompts. All ranks answer as many: what comes after `num_own` is another rank's."""

    encoded: Sequence[list[int]]
    texts: Sequence[str]
    references: Sequence[str]
    num_own: int
    tokenizer: Any
    end_id: int
    settings: EvaluationSettings

    def answer(self, model: Any, synced: bool, heed: Callable[[], None]) -> list[Sample]:
        """Return the model's answers to this rank's own prompts; calls `heed` after each batch."""
        answers = generate(
            model, self.tokenizer, self.encoded, self.end_id, self.settings, lambda _: heed(), synced=synced
        )
        texts = [answer.text for answer in answers]
        samples = [Sample(*parts) for parts in zip(self.texts, self.references, texts, strict=True)]
        return samples[: self.num_own]


@dataclass
class Validation:
    """When to validate, on what, and which step has been the best so far."""

    settings: ValidationSettings
    num_steps: int
    batches: list[PackedBatch]
    alpha: float  # the target's, at the end of the run
    prompts: Prompts | None = None
    keep: Callable[[int], None] = lambda step: None  # writes the weights of the best step
    last_step: int = 0
    best: float = inf
    best_step: int = 0
    num_done: int = 0
    num_worse: int = 0  # in a row

    def due(self, step: int) -> bool:
        """Tell whether a step is followed by a validation."""
        every = self.settings.every_steps
        return every is not None and step > 0 and (step % every == 0 or step == self.num_steps)

    def ended_at(self, step: int) -> bool:
        """Tell whether training ends with a step: there have been too many validations without a better one."""
        most = self.settings.stop_after
        return most is not None and self.num_worse >= most and self.last_step == step

    def take(
        self, engine: Engine, world: World, scored: Scored, step: int, heed: Callable[[], None] = lambda: None
    ) -> tuple[ValidationRecord, list[Sample]]:
        """Validate after a step, all ranks together; `scored` yields this rank's batches with their payloads.

        Now and then it calls `heed`, which raises if the ranks shall not go on; the validation is then as if not begun.
        """
        started = time.perf_counter()
        sums, samples = [0.0] * len(MEASURED), list[Sample]()
        every = self.settings.answers_every
        with engine.evaluating() as model:
            for batch, payloads in islice(scored, len(self.batches)):
                result = engine.loss(batch.to(engine.device), payloads, self.alpha)
                sums = [total + result.sum(name) for total, name in zip(sums, MEASURED, strict=True)]
            if self.prompts is not None and every is not None and self.num_done % every == 0:
                samples = self.prompts.answer(model, world.size > 1, heed)
        counted = float(sum(batch.num_supervised for batch in self.batches))
        *totals, num_supervised = world.sum([*sums, counted])
        means = {name: total / num_supervised for name, total in zip(MEASURED, totals, strict=True)}
        values: dict[str, Any] = means | _mean_rouge(samples, world)
        for name in ("divergence", "kl_to_target"):  # an objective may have none; of the others, no number is a fault
            values[name] = None if isnan(means[name]) else means[name]
        is_best = self._observe(step, means[self.settings.best_by])
        if is_best:
            self.keep(step)
        seconds = time.perf_counter() - started
        record = ValidationRecord(
            step, **values, is_best=is_best, num_supervised=int(num_supervised), validation_s=seconds
        )
        return record, samples[:NUM_SHOWN]

    def _observe(self, step: int, value: float) -> bool:
        is_best = value < self.best
        if is_best:
            self.best, self.best_step, self.num_worse = value, step, 0
        else:
            self.num_worse += 1
        self.last_step, self.num_done = step, self.num_done + 1
        return is_best

    def state(self) -> dict[str, float | str]:
        """Return what the validations to come depend on."""
        names = ("last_step", "best", "best_step", "num_done", "num_worse")
        return {name: getattr(self, name) for name in names} | {"measure": self._measure}

    @property
    def _measure(self) -> str:
        return f"{self.settings.best_by} of {self.settings.num_rows} rows at alpha {self.alpha:g}"

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned, {} for nothing; a best that was measured otherwise is none."""
        self.last_step, self.num_done = state.get("last_step", 0), state.get("num_done", 0)
        if state.get("measure") == self._measure:
            self.best, self.best_step, self.num_worse = state["best"], state["best_step"], state["num_worse"]


def _mean_rouge(samples: Sequence[Sample], world: World) -> dict[str, float | None]:
    """Return the mean F1 over all ranks' samples; None where there are none."""
    rows: Mapping[str, Sequence[float]] = {}
    if samples:
        rows = rouge_rows([one.answer for one in samples], [one.reference for one in samples])
    *totals, count = world.sum([*(sum(rows.get(name, ())) for name in ROUGE), float(len(samples))])
    return {name: total / count if count else None for name, total in zip(ROUGE, totals, strict=True)}
