"""A student rank's side of the service: asks teachers ahead of time, checks every answer, never trains without one.

For each of the next `look_ahead` micro-batches one request per model is in flight, each with a slot of its own; no free
slot means no request. A request goes to the teacher with the fewest outstanding tokens: which one answers changes
nothing in the numbers.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType

import torch
import zmq
from torch import Tensor

from deltakd.base.errors import TeacherError
from deltakd.models.forward import Batch
from deltakd.models.frozen import PayloadSpec
from deltakd.teacher.arena import Arena, slot_bytes_for
from deltakd.teacher.messages import (
    PROTOCOL,
    Bye,
    Failed,
    Hello,
    Message,
    Refused,
    Score,
    Scored,
    Welcome,
    batch_digest,
    decode,
    encode,
)
from deltakd.teacher.references import B, Payloads, with_head
from deltakd.teacher.server import socket_path

POLL_MS = 100


@dataclass(frozen=True)
class FrozenFacts:
    """What a student knows of a frozen model that others hold."""

    identity: str
    hidden_size: int


@dataclass(frozen=True)
class TeacherRank:
    """One teacher rank of this node: its index, where its log is, and a way to learn that it has ended."""

    index: int
    log: str
    ended: Callable[[int | None], str | None]  # from its pid, if it has said it: a reason once it has ended


@dataclass
class Request:
    """One request in flight."""

    score: Score
    num_supervised: int
    teacher: int
    sent: float
    answered: bool = False


@dataclass(frozen=True)
class ServiceSettings:
    """The numbers of one student rank's side: how far ahead, how patient, for how many tokens at most."""

    look_ahead: int
    start_s: float
    answer_s: float
    max_tokens: int


def make_arena(
    scratch: Path, student_rank: int, models: Mapping[str, FrozenFacts], spec: PayloadSpec, settings: ServiceSettings
) -> Arena:
    """Allocate a student rank's slots: one per model for every batch that can be in flight.

    Raises RunError if shared memory cannot hold them.
    """
    per_token = max(spec.bytes_per_token(facts.hidden_size) for facts in models.values())
    num_slots = (settings.look_ahead + 1) * len(models)
    slot_bytes = slot_bytes_for(settings.max_tokens * per_token)
    return Arena(scratch / f"arena-{student_rank}", slot_bytes, num_slots, owner=True)


class ServiceReferences:
    """References answered by the teacher ranks of this node; use with `with`."""

    def __init__(
        self,
        arena: Arena,
        launch: str,
        student_rank: int,
        teachers: Sequence[TeacherRank],
        models: Mapping[str, FrozenFacts],
        heads: Mapping[str, Tensor],
        tokenizer: str,
        spec: PayloadSpec,
        settings: ServiceSettings,
        device: str = "cpu",
    ) -> None:
        """Greet every teacher whose socket lies beside the arena.

        `heads` holds the frozen head of each model for `hidden` payloads and is empty for `logits`. Raises TeacherError
        if a teacher ends, refuses or does not answer in time.
        """
        self._teachers = {teacher.index: teacher for teacher in teachers}
        self._models = models
        self._heads = heads
        self._spec = spec
        self._settings = settings
        self._student_rank = student_rank
        self._device = device
        self._requests = count()
        self._open: dict[int, Request] = {}
        self._pids: dict[int, int] = {}
        self._arena = arena
        self._free = deque(range(arena.num_slots))
        self._context = zmq.Context()
        self._sockets = {index: self._connect(arena.path.parent, index) for index in self._teachers}
        self._poller = zmq.Poller()
        for socket in self._sockets.values():
            self._poller.register(socket, zmq.POLLIN)
        try:
            self._greet(launch, tokenizer)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _connect(self, scratch: Path, index: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 1000
        socket.connect(f"ipc://{socket_path(scratch, index)}")
        return socket

    def __enter__(self) -> "ServiceReferences":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for socket in self._sockets.values():
            socket.send(encode(Bye(self._student_rank)))
            socket.close()
        self._context.term()

    def _greet(self, launch: str, tokenizer: str) -> None:
        spec = self._spec
        hello = Hello(
            protocol=PROTOCOL,
            launch=launch,
            student_rank=self._student_rank,
            models={name: facts.identity for name, facts in self._models.items()},
            tokenizer=tokenizer,
            kind=spec.kind,
            dtype=spec.dtype,
            layout=spec.layout,
            vocab_size=spec.vocab_size,
            arena=self._arena.path.name,
            slot_bytes=self._arena.slot_bytes,
            num_slots=self._arena.num_slots,
        )
        for socket in self._sockets.values():
            socket.send(encode(hello))
        waiting = set(self._teachers)
        deadline = time.monotonic() + self._settings.start_s
        while waiting:
            for index, message in self._receive():
                if isinstance(message, Refused):
                    raise TeacherError(f"{self._name(index)}: refused ({message.reason}). Start both from one recipe.")
                if isinstance(message, Welcome):
                    self._pids[index] = message.pid
                    waiting.discard(index)
            if waiting and time.monotonic() > deadline:
                raise TeacherError(
                    f"{self._name(min(waiting))}: no answer for {self._settings.start_s:g} s after the start. "
                    "Look at its log, or raise teachers.start_s."
                )

    def ahead(self, batches: Iterable[B]) -> Iterator[tuple[B, Payloads]]:
        """Yield each batch with its payloads, valid until the next is asked for; the next ones are in flight."""
        window: deque[tuple[B, list[Request]]] = deque()
        upcoming = iter(batches)
        while True:
            while len(window) <= self._settings.look_ahead and (batch := next(upcoming, None)) is not None:
                window.append((batch, self._ask(batch)))
            if not window:
                return
            batch, requests = window.popleft()
            self._await(requests)
            yield batch, {request.score.model: self._read(request) for request in requests}
            self._free.extend(request.score.slot for request in requests)

    def _ask(self, batch: Batch) -> list[Request]:
        if not len(batch.supervised):
            return []
        tokens, starts, supervised = (_bytes(part) for part in (batch.tokens, batch.starts, batch.supervised))
        digest = batch_digest(tokens, starts, supervised)
        requests = []
        for model in sorted(self._models):
            score = Score(next(self._requests), model, self._free.popleft(), tokens, starts, supervised, digest)
            request = Request(score, len(batch.supervised), self._least_loaded(), time.monotonic())
            self._open[score.request] = request
            self._sockets[request.teacher].send(encode(score))
            requests.append(request)
        return requests

    def _least_loaded(self) -> int:
        load = dict.fromkeys(self._teachers, 0)
        for request in self._open.values():
            load[request.teacher] += len(request.score.tokens)
        return min(load, key=lambda index: load[index])

    def _await(self, requests: Sequence[Request]) -> None:
        while not all(request.answered for request in requests):
            for index, message in self._receive():
                self._take(index, message)
            late = [r for r in requests if not r.answered and time.monotonic() - r.sent > self._settings.answer_s]
            if late:
                raise TeacherError(
                    f"{self._name(late[0].teacher)}: no answer about {late[0].score.model} (request "
                    f"{late[0].score.request}) for {self._settings.answer_s:g} s. Look at its log, or raise "
                    "teachers.answer_s."
                )

    def _take(self, index: int, message: Message) -> None:
        """Accept one answer; what does not fit an open request is dropped here and never reaches a loss."""
        if not isinstance(message, Scored | Failed):
            return
        request = self._open.pop(message.request, None)
        if request is None:
            return
        where = f"{self._name(index)}: {request.score.model} (request {message.request})"
        if isinstance(message, Failed):
            raise TeacherError(f"{where}: {message.reason}. Write references.dtype=float32, or look at the model.")
        width = self._spec.width(self._models[request.score.model].hidden_size)
        expected = request.num_supervised * width * getattr(torch, self._spec.dtype).itemsize
        if (message.slot, message.num_bytes, message.digest) != (request.score.slot, expected, request.score.digest):
            raise TeacherError(
                f"{where}: answered {message.num_bytes:,} bytes in slot {message.slot} where {expected:,} in slot "
                f"{request.score.slot} were asked, or about other tokens. Start both from one recipe and one version."
            )
        request.answered = True

    def _receive(self) -> Iterator[tuple[int, Message]]:
        ready = dict(self._poller.poll(POLL_MS))
        for index, socket in self._sockets.items():
            if socket in ready:
                yield index, decode(socket.recv())
        if not ready:
            for teacher in self._teachers.values():
                if reason := teacher.ended(self._pids.get(teacher.index)):
                    raise TeacherError(f"{self._name(teacher.index)}: {reason}. Look at its log.")

    def _read(self, request: Request) -> Tensor | tuple[Tensor, Tensor]:
        shape = (request.num_supervised, self._spec.width(self._models[request.score.model].hidden_size))
        values = self._arena.slot(request.score.slot, shape, getattr(torch, self._spec.dtype))
        return with_head(values.to(self._device), request.score.model, self._heads)

    def _name(self, index: int) -> str:
        return f"teacher {index} ({', '.join(sorted(self._models))}; log {self._teachers[index].log})"


def _bytes(values: Tensor) -> bytes:
    return values.cpu().numpy().astype("<i8").tobytes()
