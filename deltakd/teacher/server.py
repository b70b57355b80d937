"""A teacher rank: answers Score requests about its frozen models, one at a time, until its students have left.

It keeps no state but its weights, so any rank that serves a model can answer any request for it. One forward per
request, one copy of the payload into the student's slot. What it is asked wrongly it refuses and counts; it lives on.
"""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
import zmq
from torch import Tensor, nn

from deltakd.base.errors import DeltaKDError, TeacherError
from deltakd.models.forward import TokenBatch
from deltakd.models.frozen import PayloadSpec, count_bad, payload
from deltakd.teacher.arena import Arena
from deltakd.teacher.messages import (
    PROTOCOL,
    Bye,
    Failed,
    Hello,
    Refused,
    Score,
    Scored,
    Welcome,
    batch_digest,
    decode,
    encode,
)

POLL_MS = 200


@dataclass(frozen=True)
class Served:
    """One frozen model that this rank serves."""

    model: nn.Module
    identity: str


class TeacherServer:
    """Serves frozen models on one socket; use with `with`."""

    def __init__(
        self,
        index: int,
        scratch: Path,
        launch: str,
        models: dict[str, Served],
        tokenizer: str,
        spec: PayloadSpec,
        device: str = "cpu",
    ) -> None:
        """Bind the socket. `spec` is what this rank's recipe says of payloads; who says otherwise is refused."""
        self.index = index
        self.counts: Counter[str] = Counter()
        self._scratch = scratch
        self._launch = launch
        self._models = models
        self._tokenizer = tokenizer
        self._spec = spec
        self._device = device
        self._arenas: dict[bytes, Arena] = {}
        self._left: set[int] = set()
        self._stopped = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 1000
        self._socket.bind(f"ipc://{socket_path(scratch, index)}")

    def __enter__(self) -> "TeacherServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._context.term()
        socket_path(self._scratch, self.index).unlink(missing_ok=True)

    def serve(self, num_students: int, start_s: float, on_first: Callable[[], None]) -> None:
        """Answer until `num_students` student ranks have said Bye; `on_first` is called when the first is welcome.

        Raises TeacherError if no student comes within `start_s` seconds.
        """
        self._on_first = on_first
        deadline = time.monotonic() + start_s
        while len(self._left) < num_students and not self._stopped:
            if not self._socket.poll(POLL_MS):
                if not self._left and not self._arenas and time.monotonic() > deadline:
                    raise TeacherError(
                        f"teacher {self.index}: no student has come for {start_s:g} s. Start the students with the "
                        "same recipe and --launch, or raise teachers.start_s."
                    )
                continue
            parts = self._socket.recv_multipart()
            received = time.perf_counter()
            try:
                if len(parts) != 2:
                    raise TeacherError(f"teacher service: {len(parts)} frames instead of 2. Refused.")
                message = decode(parts[1])
            except TeacherError:
                self.counts["refused_malformed"] += 1
                continue
            self._answer(parts[0], message, received)

    def stop(self) -> None:
        """Have `serve` return soon, whoever is still there; callable from another thread."""
        self._stopped = True

    def _answer(self, peer: bytes, message: object, received: float) -> None:
        match message:
            case Hello():
                self._reply(peer, self._greet(peer, message))
            case Score() if peer in self._arenas:
                self._reply(peer, self._score(self._arenas[peer], message, received))
            case Bye() if peer in self._arenas:
                del self._arenas[peer]
                self._left.add(message.student_rank)
            case _:
                self.counts["refused_unexpected"] += 1

    def _reply(self, peer: bytes, message: Welcome | Refused | Scored | Failed) -> None:
        self._socket.send_multipart([peer, encode(message)])

    def _greet(self, peer: bytes, hello: Hello) -> Welcome | Refused:
        spec = self._spec
        ours = {"protocol": PROTOCOL, "launch": self._launch, "tokenizer": self._tokenizer} | {
            name: getattr(spec, name) for name in ("kind", "dtype", "layout", "vocab_size")
        }
        differing = [
            f"{key}: {getattr(hello, key)} asked, {value} here"
            for key, value in ours.items()
            if getattr(hello, key) != value
        ]
        for name, identity in hello.models.items():
            here = self._models[name].identity if name in self._models else "not served"
            if here != identity:
                differing.append(f"weights of {name}: {identity} asked, {here} here")
        if differing or "/" in hello.arena:
            self.counts["refused_hello"] += 1
            return Refused("; ".join(differing) or f"arena {hello.arena!r} is not a file name")
        try:
            self._arenas[peer] = Arena(self._scratch / hello.arena, hello.slot_bytes, hello.num_slots, owner=False)
        except (OSError, DeltaKDError) as error:
            return Refused(f"arena {hello.arena}: {error}")
        if len(self._arenas) == 1:
            self._on_first()
        return Welcome(self.index, os.getpid())

    def _score(self, arena: Arena, score: Score, received: float) -> Scored | Failed:
        if score.model not in self._models:
            return Failed(score.request, score.slot, f"{score.model} is not served here")
        started = time.perf_counter()
        batch = read_batch(score, self._device)
        answer = payload(self._models[score.model].model, batch, self._spec)
        if bad := count_bad(answer):
            return Failed(
                score.request, score.slot, f"{bad:,} of {answer.numel():,} numbers are not finite in {self._spec.dtype}"
            )
        slot = arena.slot(score.slot, tuple(answer.shape), answer.dtype)
        slot.copy_(answer)
        self.counts["scored"] += 1
        self.counts["tokens"] += len(batch.tokens)
        return Scored(
            score.request,
            score.slot,
            answer.numel() * answer.element_size(),
            batch_digest(score.tokens, score.starts, score.supervised),
            queue_s=started - received,
            forward_s=time.perf_counter() - started,
        )


def read_batch(score: Score, device: str) -> TokenBatch:
    """Turn a Score's bytes into tensors; positions restart at every document."""

    def tensor(data: bytes) -> Tensor:
        return torch.from_numpy(np.frombuffer(data, dtype="<i8").copy()).to(device)

    tokens, starts, supervised = tensor(score.tokens), tensor(score.starts), tensor(score.supervised)
    lengths = starts.diff()
    positions = torch.arange(len(tokens), device=device) - torch.repeat_interleave(starts[:-1], lengths)
    return TokenBatch(tokens, positions, starts, supervised)


def socket_path(scratch: Path, index: int) -> Path:
    """Return where a teacher rank's socket lies."""
    return scratch / f"teacher-{index}.sock"
