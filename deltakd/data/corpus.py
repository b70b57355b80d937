"""Plain text beside the steps of any other stream: each step then also learns some of it, by cross-entropy alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from deltakd.data.packing import PackedBatch
from deltakd.data.stream import Stream

Steps = Callable[[int], Iterator[list[PackedBatch]]]


def with_corpus(steps: Steps, corpus: Stream, weight: float) -> Steps:
    """Return steps that hold the corpus's micro-batches behind their own; as many on every rank, as both are."""

    def both(first: int = 0) -> Iterator[list[PackedBatch]]:
        for own, plain in zip(steps(first), corpus.steps(first), strict=False):
            yield [*own, *(replace(batch, corpus_weight=weight) for batch in plain)]

    return both
