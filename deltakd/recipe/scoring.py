"""One model's scores, part by part: who takes a part, when, and what was taken before it, changes no digit of them.

When all parts are there they become scores/<label>.json and predictions/<label>.parquet.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from deltakd.base.errors import DataError, RunError
from deltakd.base.files import remove, write_json
from deltakd.base.processes import use_threads
from deltakd.data.examples import Example
from deltakd.data.packing import PackedBatch, pack
from deltakd.data.settings import DataSettings, SourceSettings
from deltakd.data.sources import load_rows
from deltakd.data.template import ChatTemplate
from deltakd.data.tokenise import build_examples
from deltakd.evaluate.answers import Judge
from deltakd.evaluate.compare import ANSWER, CROSS_ENTROPY, KEPT, KL_TO_TARGET, KL_TO_TEACHER, ModelScores
from deltakd.evaluate.cross_entropy import cross_entropy_rows, kl_rows, target_rows
from deltakd.evaluate.generate import generate
from deltakd.evaluate.predictions import write_predictions
from deltakd.evaluate.responses import chunk_seed
from deltakd.evaluate.scores import ROUGE, rouge_rows
from deltakd.models.vocabulary import refuse_foreign
from deltakd.recipe.asked import Asked, Part

Advance = Callable[[int], object]


class Scoring:
    """A model at work on its parts; it is loaded for the first of them."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._judge = Judge()

    def take(self, parts: Sequence[Part], advance: Advance) -> None:
        """Take those parts that are not there; `advance` hears of the rows of each."""
        with self._judge:
            for part in parts:
                path = self._asked.path(part)
                if path.exists():
                    advance(self._asked.size(part))
                elif part.kind == "prompts":
                    write_json(path, self._answers(part, advance))
                else:
                    write_json(path, self._rows(part) if part.kind == "rows" else self._kept(part))
                    advance(self._asked.size(part))

    @cached_property
    def _tokenizer(self) -> Any:
        asked, tokenizer = self._asked, self._asked.shelf.tokenizer(self._asked.weights)
        against = [] if asked.teacher is None else [asked.teacher]
        against += [] if asked.target is None else list(asked.target.frozen.values())
        for frozen in against:
            refuse_foreign(asked.weights.key, asked.shelf.tokenizer(frozen), tokenizer)
        return tokenizer

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer)

    @cached_property
    def _model(self) -> Any:
        use_threads()
        asked = self._asked
        is_teacher = asked.teacher is not None and asked.teacher.path == asked.weights.path
        shared = is_teacher or asked.shelf.holds(asked.weights)
        return asked.shelf.model(asked.weights) if shared else asked.shelf.fresh(asked.weights)

    def _answers(self, part: Part, advance: Advance) -> dict[str, list[Any]]:
        asked, rows = self._asked, self._asked.held_out.rows[part.rows]
        protocol, template = asked.protocol, self._template
        prompts = [protocol.cut(template.encode_prompt(row.prompt, row.where)) for row in rows]
        sampling = protocol.sampling.model_copy(update={"seed": chunk_seed(part.seed, part.number)})
        answers = generate(self._model, self._tokenizer, prompts, template.end_of_turn_id, sampling, advance)
        texts = [answer.text for answer in answers]
        return {
            "answer": texts,
            "num_tokens": [answer.num_tokens for answer in answers],
            "ended": [answer.ended for answer in answers],
            **rouge_rows(texts, [protocol.references(row) for row in rows]),
            "answer_correct": self._judge.rows(asked.held_out.golds[part.rows], texts),
        }

    def _rows(self, part: Part) -> dict[str, list[float]]:
        asked, rows = self._asked, self._asked.held_out.rows[part.rows]
        batches = _packed(asked.recipe.data, [self._template.encode([row])[0] for row in rows])
        model, shelf, vocab_size = self._model, asked.shelf, len(self._tokenizer)
        values = {CROSS_ENTROPY: cross_entropy_rows(model, batches, vocab_size)}
        if asked.teacher is not None:
            values[KL_TO_TEACHER] = kl_rows(model, shelf.model(asked.teacher), batches, vocab_size)
        if asked.target is not None:
            frozen = {role: shelf.model(one) for role, one in asked.target.frozen.items()}
            values[KL_TO_TARGET] = target_rows(model, frozen, asked.target.objective, batches, vocab_size)
        return values

    def _kept(self, part: Part) -> dict[str, list[float]]:
        """Return the cross-entropy of every row of a file of raw-domain text; its format shows in its first row."""
        recipe = self._asked.recipe
        source = SourceSettings(path=self._asked.kept[part.kept])
        _, first = next(iter(load_rows(source)))
        data = recipe.data.model_copy(update={"format": "text" if "text" in first else recipe.data.format})
        examples = list(build_examples(data, source, self._tokenizer, None, progress=False))
        if not examples:
            raise DataError(f"{source.path}: no row fits into data.max_tokens {data.max_tokens:,}. Raise it.")
        return {CROSS_ENTROPY: cross_entropy_rows(self._model, _packed(data, examples), len(self._tokenizer))}


def _packed(data: DataSettings, examples: Sequence[Example]) -> list[PackedBatch]:
    """Pack rows in their order, as many together as data.max_tokens holds."""
    groups: list[list[Example]] = [[]]
    for row in examples:
        if groups[-1] and sum(len(one.tokens) for one in groups[-1]) + len(row.tokens) > data.max_tokens:
            groups.append([])
        groups[-1].append(row)
    return [pack(group) for group in groups]


def gather(asked: Asked) -> ModelScores:
    """Make a model's scores and its predictions of all parts. Raises RunError if one is missing."""
    missing = [part.name for part in asked.parts if not asked.path(part).exists()]
    if missing:
        raise RunError(
            f"{asked.chunks}: {len(missing)} of {len(asked.parts)} parts are not there. Start the same command again."
        )
    taken = {part: json.loads(asked.path(part).read_text()) for part in asked.parts}
    rows: dict[str, list[float]] = {}
    columns: dict[str, list[Any]] = {}
    if not asked.only_kept:
        columns = _columns(asked, taken)
        rows = _means(asked, columns)
        remove(asked.scores_path)  # those of another question, which would stand beside these answers after a kill
        write_predictions(asked.folder, asked.label, columns)
    rows |= {f"{KEPT}{part.kept}": values[CROSS_ENTROPY] for part, values in taken.items() if part.kind == "kept"}
    lengths = list(_by_prompt(asked, columns["num_tokens"])) if columns else []
    truncated = columns.get("ended", []).count(False)
    scores = ModelScores(asked.label, str(asked.weights.path), asked.weights.identity, rows, truncated, lengths)
    write_json(asked.scores_path, {"question": asked.question, "scores": asdict(scores)})
    remove(asked.chunks)
    return scores


def _columns(asked: Asked, taken: Mapping[Part, Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    """Return what predictions/<label>.parquet holds: every prompt of the first seed, then of the next."""
    rows, seeds = asked.held_out.rows, asked.protocol.seeds

    def joined(kind: str, name: str) -> list[Any]:
        return [one for part, values in taken.items() if part.kind == kind for one in values[name]]

    metrics = {CROSS_ENTROPY: True, KL_TO_TEACHER: asked.teacher is not None, KL_TO_TARGET: asked.target is not None}
    of_rows = {name: joined("rows", name) if has else [None] * len(rows) for name, has in metrics.items()}
    said = ("answer", "num_tokens", "ended", *ROUGE, "answer_correct")
    return {
        "prompt": [row.prompt[-1].content for row in rows] * len(seeds),
        "reference": [row.reference for row in rows] * len(seeds),
        "seed": [seed for seed in seeds for _ in rows],
        **{name: joined("prompts", name) for name in said},
        **{name: values * len(seeds) for name, values in of_rows.items()},
    }


def _means(asked: Asked, columns: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
    """Return the metrics by prompt; of several seeds, the mean."""
    rows = {name: list(_by_prompt(asked, columns[name])) for name in ROUGE}
    golds = asked.held_out.golds
    if any(gold is not None for gold in golds):
        right = _by_prompt(asked, [bool(one) for one in columns["answer_correct"]])
        rows[ANSWER] = [one for one, gold in zip(right, golds, strict=True) if gold is not None]
    for name in (CROSS_ENTROPY, KL_TO_TEACHER, KL_TO_TARGET):
        values = list(columns[name][: len(golds)])
        rows |= {} if None in values else {name: values}
    return rows


def _by_prompt(asked: Asked, values: Sequence[float]) -> Iterator[float]:
    by_seed = np.asarray(values, np.float64).reshape(len(asked.protocol.seeds), -1)
    yield from by_seed.mean(axis=0).tolist()
