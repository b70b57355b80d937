"""A student rank's side of the service: asks teachers ahead of time, checks every answer, never trains without one.

For each of the next `look_ahead` micro-batches one request per payload is in flight, each with a slot of its own; no
free slot means no request. A request goes to the teacher with the fewest outstanding tokens, and to another one when
that teacher is lost: which one answers changes nothing in the numbers. A lost teacher that may still write keeps its
slots until it has answered or is dead.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltakd.base.errors import RunError, Stopped, TeacherError
from deltakd.losses.frozen import Reference
from deltakd.teacher.accounts import Accounts
from deltakd.teacher.arena import Arena, slot_bytes_for
from deltakd.teacher.members import Member, Members
from deltakd.teacher.messages import Failed, Score, Scored, ask_again, batch_digest
from deltakd.teacher.payloads import FrozenFacts, PayloadSpec, hidden_size, unpack_payload
from deltakd.teacher.references import AskedBatch, B, Payloads, asked_names, batch_bytes, bursts

POLL_S = 0.1
BOARD_S = 1.0


@dataclass
class Request:
    """One payload of one batch: asked, perhaps of several teachers one after the other, and answered once."""

    score: Score  # of the last time it was asked; request and slot are -1 before
    num_supervised: int
    since: float
    member: Member | None = None  # who is asked now
    answered: bool = False


@dataclass(frozen=True)
class ServiceSettings:
    """The numbers of one student rank's side: how far ahead, how patient, for how many tokens at most."""

    look_ahead: int
    start_s: float
    answer_s: float
    give_up_s: float
    max_tokens: int
    slots: int | None = None


def make_arena(
    scratch: Path, student_rank: int, models: Mapping[str, FrozenFacts], spec: PayloadSpec, settings: ServiceSettings
) -> Arena:
    """Allocate a student rank's slots: one per payload for every batch that can be in flight, and one batch's more.

    Those are for requests that are asked again while a silent teacher keeps a slot. Raises RunError if shared memory
    cannot hold them, or if the settings' number holds no batch.
    """
    names = asked_names(spec, models)
    most = max(spec.num_bytes(settings.max_tokens, hidden_size(name, models)) for name in names)
    num_slots = settings.slots or (settings.look_ahead + 2) * len(names)
    if num_slots < len(names):
        raise RunError(
            f"teachers.slots: {num_slots} hold no micro-batch, which has {len(names)} payloads ({', '.join(names)}). "
            f"Write {len(names)} or more, or null."
        )
    return Arena(scratch / f"arena-{student_rank}", slot_bytes_for(most), num_slots, owner=True)


class ServiceReferences:
    """References answered by whichever teacher ranks have joined."""

    def __init__(
        self,
        members: Members,
        arena: Arena,
        models: Mapping[str, FrozenFacts],
        heads: Mapping[str, Tensor],
        spec: PayloadSpec,
        settings: ServiceSettings,
        failed: Callable[[], str | None] = lambda: None,
        board: Callable[[Mapping[str, Any]], None] = lambda status: None,
        stop: Callable[[], str | None] = lambda: None,
        device: str = "cpu",
    ) -> None:
        """Wait until somebody serves every payload.

        `heads` holds the frozen head of each model for `hidden` payloads and is empty for the others. `failed` says
        why this node's teachers cannot come back, once they cannot; `board` gets the `status` every second; `stop`
        says why nobody shall wait any longer. Raises TeacherError if teachers cannot come back, or if nobody has come
        in time, and Stopped.
        """
        self._members, self._arena, self._models, self._heads = members, arena, models, heads
        self._spec, self._settings, self._failed, self._device = spec, settings, failed, device
        self._board, self._posted, self._stop = board, 0.0, stop
        self._names = asked_names(spec, models)
        self._ids = count()
        self._open: dict[int, Request] = {}
        self._kept: dict[int, tuple[Member, int]] = {}  # slots of requests that a lost teacher may still write to
        self._waiting: deque[Request] = deque()  # that nobody has been asked for
        self._free = deque(range(arena.num_slots))
        self._last_lost = ""
        self.counts: Counter[str] = Counter()
        self._accounts = Accounts(members.num_local_students)
        deadline = time.monotonic() + settings.start_s
        while missing := [name for name in self._names if not members.serving(name)]:
            self._wait()
            if reason := self._failed():
                raise TeacherError(f"{missing[0]}: {reason}. Look at its log.")
            if time.monotonic() > deadline:
                raise TeacherError(
                    f"{missing[0]}: no teacher has joined for {settings.start_s:g} s since the start. Look at the "
                    "teachers' logs, or raise teachers.start_s."
                )

    def ahead(self, batches: Iterable[tuple[B, float] | None]) -> Iterator[tuple[B, Payloads]]:
        """Yield each batch with its payloads, valid until the next is asked for; the next ones are in flight."""
        for together in bursts(batches):
            yield from self._ahead(together)

    def _ahead(self, upcoming: Iterator[tuple[B, float]]) -> Iterator[tuple[B, Payloads]]:
        window: deque[tuple[B, list[Request]]] = deque()
        while True:
            while len(window) <= self._settings.look_ahead and (pair := next(upcoming, None)) is not None:
                window.append((pair[0], self._ask(*pair)))
            if not window:
                self._board(self.status())
                return
            batch, requests = window.popleft()
            self._accounts.stop_work()
            while not all(request.answered for request in requests):
                self._wait()
            self._accounts.start_work()
            yield batch, {request.score.model: self._read(request) for request in requests}
            self._free.extend(request.score.slot for request in requests)

    def _ask(self, batch: AskedBatch, alpha: float) -> list[Request]:
        if not batch.asks:
            return []
        parts = batch_bytes(batch)
        digest = batch_digest(*parts)
        requests = [
            Request(Score(-1, name, -1, alpha, *parts, digest), len(batch.supervised), time.monotonic())
            for name in self._names
        ]
        self._waiting.extend(requests)
        self._look(0)
        return requests

    def _wait(self) -> None:
        """Look for what comes, unless nobody shall wait any longer."""
        if reason := self._stop():
            raise Stopped(f"stopped by {reason}.")
        self._look(POLL_S)

    def _look(self, timeout_s: float) -> None:
        """Take what has come, let go of teachers that are gone, and ask whoever is there for what is open."""
        for member, message, data in self._members.receive(timeout_s):
            self._take(member, message, data)
        for member, is_dead in self._members.lost():
            self._lose(member, member.gone or "its process has ended", is_dead)
        now = time.monotonic()
        for request in list(self._open.values()):
            if request.member is not None and now - request.since > self._settings.answer_s:
                late = request.member
                self._members.shun(late, f"no answer for {self._settings.answer_s:g} s")
                self._lose(late, late.gone, is_dead=not late.is_local)
        while self._waiting and self._send(self._waiting[0]):
            self._waiting.popleft()
        if self._waiting:
            self._give_up_in_time(self._waiting[0], now)
        if now - self._posted >= BOARD_S:
            self._posted = now
            self._board(self.status())

    def _send(self, request: Request) -> bool:
        """Ask the least loaded teacher that serves it; False if there is none, or no slot."""
        load = {member.identity: 0 for member in self._members.serving(request.score.model)}
        for other in self._open.values():
            if other.member is not None and other.member.identity in load:
                load[other.member.identity] += len(other.score.tokens)
        candidates = sorted(self._members.serving(request.score.model), key=lambda member: load[member.identity])
        for member in candidates if self._free else []:
            slot, number = self._free[0], next(self._ids)
            score = ask_again(request.score, number, slot)
            if self._members.send(member, score):
                self._free.popleft()
                request.score, request.member, request.since = score, member, time.monotonic()
                self._open[number] = request
                return True
        return False

    def _lose(self, member: Member, reason: str, is_dead: bool) -> None:
        """Have others do what a teacher still owes; its slots are free once it cannot write into them any more."""
        self._last_lost = f"{member.name}: {reason}"
        if is_dead:
            for number in [number for number, (holder, _) in self._kept.items() if holder is member]:
                self._free.append(self._kept.pop(number)[1])
        owed = [number for number, request in self._open.items() if request.member is member]
        for number in reversed(owed):  # to the head of the queue: with few slots, later batches would hold them all
            request = self._open.pop(number)
            if is_dead:
                self._free.append(request.score.slot)
            else:
                self._kept[number] = (member, request.score.slot)
            request.member, request.since = None, time.monotonic()
            self._waiting.appendleft(request)
            self.counts["asked_again"] += 1

    def _give_up_in_time(self, request: Request, now: float) -> None:
        reason = None if self._members.serving(request.score.model) else self._failed()
        if reason is None and now - request.since < self._settings.give_up_s:
            return
        about = f"{request.score.model} (a request about {request.num_supervised:,} tokens)"
        last = self._last_lost or "; ".join(member.name for member in self._members.everyone())
        raise TeacherError(
            f"{about}: {reason or f'no teacher could be asked for {self._settings.give_up_s:g} s'}. "
            f"Last there was {last or 'nobody'}. Look at its log."
        )

    def _take(self, member: Member, message: Scored | Failed, data: Any) -> None:
        """Accept one answer; what does not fit an open request is dropped here and never reaches a loss."""
        if message.request in self._kept and self._kept[message.request][0] is member:
            self._free.append(self._kept.pop(message.request)[1])
            self.counts["refused_late"] += 1
            return
        request = self._open.get(message.request)
        if request is None or request.member is not member:
            self.counts["refused_unexpected"] += 1
            return
        where = f"{member.name}: {request.score.model} (request {message.request})"
        if isinstance(message, Failed):
            raise TeacherError(f"{where}: {message.reason}")
        expected = self._num_bytes(request)
        came = len(data) if data is not None else message.num_bytes if member.is_local else 0
        if (message.slot, message.num_bytes, came, message.digest) != (
            request.score.slot,
            expected,
            expected,
            request.score.digest,
        ):
            raise TeacherError(
                f"{where}: answered {came:,} bytes in slot {message.slot} where {expected:,} in slot "
                f"{request.score.slot} were asked, or about other tokens. Start both from one recipe and one version."
            )
        if data is not None:
            self._arena.slot(request.score.slot, expected).copy_(torch.frombuffer(data, dtype=torch.uint8))
        del self._open[message.request]
        request.answered = True
        self.counts["scored"] += 1
        self.counts["bytes"] += expected
        self._accounts.add(member.identity, request.score.model, len(request.score.tokens) // 8, message.forward_s)

    def shortage(self) -> str | None:
        """Say by what factor teachers are too slow, and how many would do, if waiting has taken over 2% of the time."""
        return self._accounts.shortage(len(self._members.everyone()))

    def status(self) -> dict[str, Any]:
        """Return what a person who watches wants to see of this student rank's teachers."""
        asked = Counter(request.member.identity for request in self._open.values() if request.member is not None)
        teachers = [
            {
                "name": member.join.name,
                "host": member.join.host,
                "pid": member.join.pid,
                "over": "memory" if member.is_local else "network",
                "models": sorted(member.join.models),
                "state": member.gone or "serving",
                "open": asked[member.identity],
                **self._accounts.of_teacher(member.identity),
            }
            for member in self._members.everyone()
        ]
        queue = {"open": len(self._open), "waiting": len(self._waiting), "kept": len(self._kept)}
        counts = dict(self.counts + self._members.counts)
        return {"teachers": teachers, **queue, "counts": counts, **self._accounts.shares()}

    def _num_bytes(self, request: Request) -> int:
        return self._spec.num_bytes(request.num_supervised, hidden_size(request.score.model, self._models))

    def _read(self, request: Request) -> Reference:
        name, num_tokens = request.score.model, request.num_supervised
        data = self._arena.slot(request.score.slot, self._num_bytes(request))
        width = hidden_size(name, self._models)
        return unpack_payload(data, self._spec, num_tokens, width, self._heads.get(name), self._device)
