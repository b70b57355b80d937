"""A teacher rank: goes to the student ranks that it finds, and answers their requests, one at a time, until they leave.

It keeps no state but its weights, so any rank that serves a model can answer any request for it, and one that comes
back after a crash joins as it did the first time. One forward per request, one copy of the payload into the student's
slot, or into the network's buffer for a student of another node. What it is asked wrongly it refuses and counts.
"""

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import zmq
import zmq.utils.monitor
from torch import Tensor

from deltakd.base.errors import DeltaKDError, RunError, TeacherError
from deltakd.models.forward import TokenBatch
from deltakd.teacher.addresses import Address, connect, new_context, new_identity
from deltakd.teacher.arena import Arena
from deltakd.teacher.heart import Heart
from deltakd.teacher.messages import (
    Bye,
    Failed,
    Join,
    Leave,
    Refused,
    Score,
    Scored,
    Terms,
    Welcome,
    batch_digest,
    decode,
    encode,
)
from deltakd.teacher.payloads import FrozenModels

POLL_MS = 200


@dataclass(frozen=True)
class Offer:
    """What a teacher rank brings: its models with the identity of their weights, and on which terms."""

    frozen: FrozenModels
    identities: Mapping[str, str]
    terms: Terms
    name: str
    log: str = "the terminal's"


@dataclass
class Seat:
    """One student rank that this teacher has gone to."""

    address: Address
    identity: bytes
    socket: Any
    monitor: Any
    arena: Arena | None = None
    welcome: bool = False
    left: bool = False
    lost_at: float | None = None


class TeacherServer:
    """Serves frozen models to every student rank that `find` names; use with `with`."""

    def __init__(
        self,
        offer: Offer,
        find: Callable[[], Iterable[Address]],
        scratch: Path | None = None,
        device: str = "cpu",
        heartbeat_s: float = 1.0,
        silent_s: float = 10.0,
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        """`scratch` holds the arenas of students on this node; None where there are none.

        `pulse` is called at every heartbeat: a supervisor that hears nothing takes this process for stuck.
        """
        self.counts: Counter[str] = Counter()
        self._offer, self._find, self._scratch, self._device = offer, find, scratch, device
        self._silent_s = silent_s
        self._context = new_context()
        self._seats: dict[Address, Seat] = {}
        self._stopped = threading.Event()
        self._heart = Heart(heartbeat_s, pulse)

    def __enter__(self) -> "TeacherServer":
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heart.stop()
        for seat in self._seats.values():
            if seat.welcome and not seat.left:
                seat.socket.send(encode(Leave()))
            self._give_up_seat(seat)
        self._context.term()

    @staticmethod
    def _give_up_seat(seat: Seat) -> None:
        seat.socket.disable_monitor()
        seat.monitor.close(linger=0)
        seat.socket.close()

    def stop(self) -> None:
        """Have `serve` return soon, whoever is still there; callable from another thread."""
        self._stopped.set()

    def serve(self, start_s: float, on_first: Callable[[], None]) -> None:
        """Answer until all student ranks that were found have left; `on_first` is called at the first Welcome.

        Raises TeacherError if no student takes it within `start_s` seconds, or if one refuses it.
        """
        self._on_first = on_first
        deadline = time.monotonic() + start_s
        while not self._stopped.is_set() and not self._all_left():
            self._look_around()
            idle = not self._answer_all() and not any(seat.welcome for seat in self._seats.values())
            if idle and time.monotonic() > deadline:
                raise TeacherError(
                    f"teacher {self._offer.name}: no student has come for {start_s:g} s. Start the students with "
                    "the same recipe and --launch, or raise teachers.start_s."
                )

    def _all_left(self) -> bool:
        seats = self._seats.values()
        return (
            bool(seats)
            and all(seat.left for seat in seats)
            and len(seats) >= max(s.address.num_students for s in seats)
        )

    def _look_around(self) -> None:
        """Go to students that have come since, and notice those that have gone."""
        found = set(self._find())
        for address in found - set(self._seats):
            self._take_seat(address)
        for address in [address for address, seat in self._seats.items() if address not in found and not seat.welcome]:
            self._give_up_seat(self._seats.pop(address))  # of a launch that is no more
        for seat in self._seats.values():
            while seat.monitor.poll(0):
                event = zmq.utils.monitor.recv_monitor_message(seat.monitor)["event"]
                if event == zmq.EVENT_DISCONNECTED and not seat.left:
                    seat.lost_at = time.monotonic()
                elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED and seat.lost_at is not None:
                    seat.lost_at = None
                    self._join(seat)
            patience = self._silent_s if seat.address.server_key else 0.0
            if seat.lost_at is not None and time.monotonic() - seat.lost_at >= patience:
                seat.left, seat.arena, seat.lost_at = True, None, None

    def _take_seat(self, address: Address) -> None:
        identity = new_identity()
        dealer = connect(self._context, address, identity)
        monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        seat = self._seats[address] = Seat(address, identity, dealer, monitor)
        self._heart.beat_for(address, identity)
        self._join(seat)

    def _join(self, seat: Seat) -> None:
        offer = self._offer
        join = Join(offer.terms, dict(offer.identities), offer.name, socket.gethostname(), os.getpid(), offer.log)
        seat.socket.send(encode(join))

    def _answer_all(self) -> bool:
        """Take one message of every student that has sent some; tell whether there was one."""
        poller = zmq.Poller()
        for seat in self._seats.values():
            if not seat.left:
                poller.register(seat.socket, zmq.POLLIN)
        if not poller.sockets:
            self._stopped.wait(POLL_MS / 1000)
            return False
        ready = dict(poller.poll(POLL_MS))
        for seat in self._seats.values():
            if seat.socket in ready:
                parts = seat.socket.recv_multipart()
                self._take(seat, parts, time.perf_counter())
        return bool(ready)

    def _take(self, seat: Seat, parts: list[bytes], received: float) -> None:
        try:
            if len(parts) != 1:
                raise TeacherError(f"teacher service: {len(parts)} frames instead of 1. Refused.")
            message = decode(parts[0])
        except TeacherError:
            self.counts["refused_malformed"] += 1
            return
        match message:
            case Welcome() if not seat.welcome:
                self._settle(seat, message)
            case Refused():
                raise TeacherError(
                    f"teacher {self._offer.name}: student rank {seat.address.rank} refused it ({message.reason}). "
                    "Start both from one recipe and one version."
                )
            case Score() if seat.welcome:
                self._send(seat, *self._score(seat, message, received))
            case Bye():
                seat.left, seat.arena = True, None
            case _:
                self.counts["refused_unexpected"] += 1

    def _settle(self, seat: Seat, welcome: Welcome) -> None:
        if not seat.address.server_key:
            if "/" in welcome.arena or self._scratch is None:
                self.counts["refused_unexpected"] += 1
                return
            try:
                seat.arena = Arena(self._scratch / welcome.arena, welcome.slot_bytes, welcome.num_slots, owner=False)
            except OSError as error:
                raise RunError(f"arena {welcome.arena}: {error}. Start the run again.") from error
        first = not any(other.welcome for other in self._seats.values())
        seat.welcome = True
        if first:
            self._on_first()

    def _send(self, seat: Seat, message: Scored | Failed, data: Tensor | None) -> None:
        payload = [] if data is None else [data.numpy().data]
        seat.socket.send_multipart([encode(message), *payload], copy=False)

    def _score(self, seat: Seat, score: Score, received: float) -> tuple[Scored | Failed, Tensor | None]:
        """Answer one request; returns the payload's bytes as well where they do not go into a slot."""
        started = time.perf_counter()
        try:
            data, batch, digest = self._fill(seat, score)
        except DeltaKDError as error:
            self.counts["failed"] += 1
            return Failed(score.request, score.slot, str(error)), None
        self.counts["scored"] += 1
        self.counts["tokens"] += len(batch.tokens)
        spent = time.perf_counter() - started
        answer = Scored(score.request, score.slot, len(data), digest, started - received, spent)
        return answer, data if seat.arena is None else None

    def _fill(self, seat: Seat, score: Score) -> tuple[Tensor, TokenBatch, bytes]:
        """Form a payload in the slot that the request names, or in memory of its own for another node."""
        frozen = self._offer.frozen
        if not frozen.serves(score.model):
            raise TeacherError(f"{score.model} is not served here. Start both from one recipe.")
        batch = read_batch(score, frozen.num_tokens(), self._device)
        digest = batch_digest(score.tokens, score.starts, score.supervised)
        arena = seat.arena

        def place(num_bytes: int) -> Tensor:
            return torch.empty(num_bytes, dtype=torch.uint8) if arena is None else arena.slot(score.slot, num_bytes)

        return frozen.fill(score.model, batch, score.alpha, digest, place), batch, digest


def read_batch(score: Score, num_tokens: int, device: str) -> TokenBatch:
    """Turn a Score's bytes into tensors; positions restart at every document.

    Raises TeacherError for bytes that are no packed batch of a vocabulary of `num_tokens`, so that no index of a
    request reaches past what it indexes.
    """

    def tensor(data: bytes) -> Tensor:
        if len(data) % 8:
            raise TeacherError(f"{len(data)} bytes are no whole number of tokens. Start both from one version.")
        return torch.from_numpy(np.frombuffer(data, dtype="<i8").copy())

    tokens, starts, supervised = tensor(score.tokens), tensor(score.starts), tensor(score.supervised)
    lengths = starts.diff()
    well_cut = len(starts) > 1 and int(starts[0]) == 0 and int(starts[-1]) == len(tokens) and bool((lengths > 0).all())
    inside = len(supervised) > 0 and int(supervised.min()) >= 0 and int(supervised.max()) < len(tokens)
    if not well_cut or not inside or int(tokens.min()) < 0 or int(tokens.max()) >= num_tokens:
        raise TeacherError("starts, positions or tokens are not those of a packed batch. Start both from one version.")
    positions = torch.arange(len(tokens)) - torch.repeat_interleave(starts[:-1], lengths)
    return TokenBatch(*(part.to(device) for part in (tokens, positions, starts, supervised)))
