"""References: what the frozen models say of each batch, whoever says it.

`ahead(batches)` yields each batch with its payloads and keeps the next requests in flight. A live service and models in
this process have one face; nothing above knows the difference, and on a CPU not a bit differs between them.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from torch import Tensor

from deltakd.base.errors import TeacherError
from deltakd.losses.frozen import TARGET, Reference
from deltakd.models.forward import Batch
from deltakd.teacher.messages import batch_digest
from deltakd.teacher.payloads import FrozenModels, PayloadSpec, read_payload


class AskedBatch(Batch, Protocol):
    """A batch that may be no business of frozen models."""

    @property
    def asks(self) -> bool:
        """Whether frozen models are asked about it: there are supervised tokens, and an objective that needs them."""


B = TypeVar("B", bound=AskedBatch)
T = TypeVar("T")

# What the loss reads of the N supervised tokens of a batch, by model, or of the whole target.
Payloads = dict[str, Reference]


class References(Protocol):
    """Where the frozen models' payloads come from."""

    def ahead(self, batches: Iterable[tuple[B, float] | None]) -> Iterator[tuple[B, Payloads]]:
        """Yield each batch with its payloads at the target's alpha, in order; valid until the next is asked for.

        None among the batches: those behind it are looked at when all before it have been taken, and no earlier.
        """

    def shortage(self) -> str | None:
        """Say how much faster references would have to come, if training has waited for them."""


class NeverShort:
    """References that nobody is waited for."""

    def shortage(self) -> str | None:
        return None


class NoReferences(NeverShort):
    """For objectives that need no frozen model."""

    def ahead(self, batches: Iterable[tuple[B, float] | None]) -> Iterator[tuple[B, Payloads]]:
        for batch, _ in filter(None, batches):
            yield batch, {}


class InProcessReferences(NeverShort):
    """Frozen models beside the student, in its own process: for comparison, and where memory is no question."""

    def __init__(self, frozen: FrozenModels, heads: Mapping[str, Tensor]) -> None:
        self._frozen = frozen
        self._heads = heads

    def ahead(self, batches: Iterable[tuple[B, float] | None]) -> Iterator[tuple[B, Payloads]]:
        names = asked_names(self._frozen.spec, self._frozen.models)
        for batch, alpha in filter(None, batches):
            yield batch, {name: self._ask(name, batch, alpha) for name in names} if batch.asks else {}

    def _ask(self, name: str, batch: Batch, alpha: float) -> Reference:
        try:
            arrays = self._frozen.payload(name, batch, alpha, batch_digest(*batch_bytes(batch)))
        except TeacherError as error:
            raise TeacherError(f"{name}, in process: {error}") from error
        return read_payload(arrays, self._frozen.spec, self._heads.get(name))


def bursts(batches: Iterable[T | None]) -> Iterator[Iterator[T]]:
    """Cut at None: yield, one after the other, what may be asked together; each must be read to its end."""
    source, more = iter(batches), True

    def burst() -> Iterator[T]:
        nonlocal more
        for one in source:
            if one is None:
                return
            yield one
        more = False

    while more:
        yield burst()


def asked_names(spec: PayloadSpec, models: Iterable[str]) -> list[str]:
    """Name the payloads of one batch: one for each model, or one for the target."""
    return sorted(models) if spec.keeps_models_apart else [TARGET]


def batch_bytes(batch: Batch) -> tuple[bytes, bytes, bytes]:
    """Return a batch's tokens, starts and supervised positions as they travel."""

    def as_bytes(values: Tensor) -> bytes:
        return values.cpu().numpy().astype("<i8").tobytes()

    return as_bytes(batch.tokens), as_bytes(batch.starts), as_bytes(batch.supervised)
