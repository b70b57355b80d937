"""References: what the frozen models say of each batch, whoever says it.

`ahead(batches)` yields each batch with its payloads and keeps the next requests in flight. A live service and models in
this process have one face; nothing above knows the difference, and on a CPU not a bit differs between them.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from torch import Tensor, nn

from deltakd.base.errors import TeacherError
from deltakd.models.forward import Batch
from deltakd.models.frozen import PayloadSpec, count_bad, payload

B = TypeVar("B", bound=Batch)

# A frozen model's word on the N supervised tokens of a batch: logits [N, V], or hidden states [N, H] with their head.
Payloads = dict[str, Tensor | tuple[Tensor, Tensor]]


class References(Protocol):
    """Where the frozen models' payloads come from."""

    def ahead(self, batches: Iterable[B]) -> Iterator[tuple[B, Payloads]]:
        """Yield each batch with its payloads, in order; payloads are valid until the next one is asked for."""


class NoReferences:
    """For objectives that need no frozen model."""

    def ahead(self, batches: Iterable[B]) -> Iterator[tuple[B, Payloads]]:
        for batch in batches:
            yield batch, {}


class InProcessReferences:
    """Frozen models beside the student, in its own process: for comparison, and where memory is no question."""

    def __init__(self, models: Mapping[str, nn.Module], heads: Mapping[str, Tensor], spec: PayloadSpec) -> None:
        self._models = models
        self._heads = heads
        self._spec = spec

    def ahead(self, batches: Iterable[B]) -> Iterator[tuple[B, Payloads]]:
        for batch in batches:
            yield batch, {name: self._ask(name, batch) for name in self._models} if len(batch.supervised) else {}

    def _ask(self, name: str, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        answer = payload(self._models[name], batch, self._spec)
        if bad := count_bad(answer):
            raise TeacherError(
                f"{name}, in process: {bad:,} of {answer.numel():,} numbers are not finite in {self._spec.dtype}. "
                "Write references.dtype=float32, or look at the model."
            )
        return with_head(answer, name, self._heads)


def with_head(answer: Tensor, name: str, heads: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """Pair hidden states with the frozen head that turns them into logits; logits stand alone."""
    return (answer, heads[name]) if name in heads else answer
