"""A student rank's book of teachers: who has joined, what each serves, who has fallen silent, who is dead.

Teachers come and go at any time; whoever joins on the run's terms may be asked. A teacher of this node is dead when its
process is; one that is not heard for `silent_s` counts as gone until it is heard again. Whatever is malformed, foreign
or unexpected is refused and counted here, and goes no further.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from deltakd.base.errors import TeacherError
from deltakd.base.processes import is_alive
from deltakd.losses.frozen import TARGET
from deltakd.teacher.addresses import (
    Address,
    interface_address,
    listen,
    local_socket,
    make_keys,
    new_context,
    own_host,
    remove_address,
    write_address,
)
from deltakd.teacher.messages import (
    MAX_MESSAGE_BYTES,
    Alive,
    Bye,
    Failed,
    Join,
    Leave,
    Refused,
    Score,
    Scored,
    Terms,
    Welcome,
    decode,
    differences,
    encode,
)

LOOK_S = 0.1
MOST_MEMBERS = 4096  # teachers that one student rank takes; more is a mistake or an attack


@dataclass
class Member:
    """One teacher rank that has joined."""

    identity: bytes
    join: Join
    socket: Any
    is_local: bool
    heard: float
    gone: str = ""  # why it is not asked now
    stuck: bool = False  # its heart beats, but an answer is overdue

    @property
    def name(self) -> str:
        """Who it is, for a person who has to find it."""
        join = self.join
        return (
            f"teacher {join.name} on {join.host} (process {join.pid}, {', '.join(sorted(join.models))}; log {join.log})"
        )

    def serves(self, model: str, needed: frozenset[str]) -> bool:
        """Tell whether it can be asked about a model, or about the target of all that are needed."""
        return needed <= set(self.join.models) if model == TARGET else model in self.join.models


@dataclass(frozen=True)
class Front:
    """What a student rank shows to teachers: its place, its terms, and the weights that each model must have."""

    rank: int
    num_students: int
    num_local_students: int
    terms: Terms
    identities: Mapping[str, str]
    scratch: Path
    welcome: Welcome


class Members:
    """The sockets of one student rank and the teachers behind them; use with `with`."""

    def __init__(self, front: Front, silent_s: float, service: Path | None, host: str | None) -> None:
        """Listen on the node, and with keys on a TCP port whose address is written to `service`, if that is given.

        Raises RunError if `host` cannot be listened on.
        """
        self.counts: Counter[str] = Counter()
        self._front, self._silent_s = front, silent_s
        self._members: dict[bytes, Member] = {}
        self._lost: list[Member] = []  # that have said so
        self._looked = 0.0  # when the others were last looked after
        self._context = new_context()
        self._path = local_socket(front.scratch, front.rank)
        self._path.unlink(missing_ok=True)
        self._local = self._context.socket(zmq.ROUTER)
        self._local.maxmsgsize = MAX_MESSAGE_BYTES
        self._local.bind(f"ipc://{self._path}")
        self._sockets: list[Any] = [self._local]
        self._written: Path | None = None
        self._guard: ThreadAuthenticator | None = None
        if service is not None:
            self._listen_on_network(service, host)
        for socket in self._sockets:
            socket.router_mandatory = True  # a teacher that is gone is an error to us, not silence

    def _listen_on_network(self, service: Path, host: str | None) -> None:
        front, keys = self._front, make_keys()
        host = interface_address(host)
        try:
            router, port, self._guard = listen(self._context, host or "*", keys)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        router.maxmsgsize = front.welcome.slot_bytes + MAX_MESSAGE_BYTES
        router.heartbeat_ivl, router.heartbeat_timeout = 1000, 10_000
        self._sockets.append(router)
        endpoint = f"tcp://{host or own_host()}:{port}"
        pair = (keys.teacher_public.decode(), keys.teacher_secret.decode())
        address = Address(endpoint, front.rank, front.num_students, front.terms.launch, keys.public.decode(), *pair)
        self._written = write_address(service, address)

    def __enter__(self) -> "Members":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self._members.values():
            self.send(member, Bye(self._front.rank))
        for socket in self._sockets:
            socket.close()
        if self._guard is not None:
            self._guard.stop()
        self._context.term()
        self._path.unlink(missing_ok=True)
        if self._written is not None:
            remove_address(self._written)

    def send(self, member: Member, message: Score | Bye | Welcome | Refused) -> bool:
        """Send to one teacher; False if it is not there any more."""
        try:
            member.socket.send_multipart([member.identity, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:  # no route, or a queue that nobody empties
            return False
        return True

    @property
    def num_local_students(self) -> int:
        """Student ranks of the node, which share its teachers."""
        return self._front.num_local_students

    def serving(self, model: str) -> list[Member]:
        """Return who can be asked about a model now."""
        needed = frozenset(self._front.identities)
        return [m for m in self._members.values() if not m.gone and m.serves(model, needed)]

    def everyone(self) -> list[Member]:
        """Return every teacher that has joined and is not known to be dead."""
        return list(self._members.values())

    def receive(self, timeout_s: float) -> Iterator[tuple[Member, Scored | Failed, Any]]:
        """Yield the answers that have come, with payload bytes or None; waits at most `timeout_s` for the first."""
        poller = zmq.Poller()
        for socket in self._sockets:
            poller.register(socket, zmq.POLLIN)
        for socket, _ in poller.poll(int(timeout_s * 1000)):
            # Everything that lies there is taken, so that a heartbeat is never older than it looks.
            while socket.poll(0):
                taken = self._take(socket, socket.recv_multipart(copy=False))
                if taken is not None:
                    yield taken

    def lost(self) -> Iterator[tuple[Member, bool]]:
        """Yield teachers lost since the last call, and whether they are known to write into no slot any more."""
        now = time.monotonic()
        while self._lost:
            yield self._lost.pop(), True
        if now - self._looked < LOOK_S:  # asking the kernel for every process costs more than asking a teacher
            return
        self._looked = now
        for member in list(self._members.values()):
            if member.is_local and not is_alive(member.join.pid):
                del self._members[member.identity]
                yield member, True
            elif not member.gone and now - member.heard > self._silent_s:
                member.gone = f"not heard for {self._silent_s:g} s"
                self.counts["silent"] += 1
                yield member, not member.is_local

    def shun(self, member: Member, reason: str) -> None:
        """Ask a teacher no more until it has answered something: its heart beats, but it does not work."""
        member.gone, member.stuck = reason, True
        self.counts["stuck"] += 1

    def _take(self, socket: Any, frames: list[Any]) -> tuple[Member, Scored | Failed, Any] | None:
        identity = frames[0].bytes
        member = self._members.get(identity)
        try:
            if len(frames) not in (2, 3):
                raise TeacherError(f"teacher service: {len(frames) - 1} frames. Refused.")
            message = decode(frames[1].buffer)
        except TeacherError:
            self.counts["refused_malformed"] += 1
            return None
        if isinstance(message, Join) and len(frames) == 2:
            self._welcome(socket, identity, message)
        elif isinstance(message, Alive) and message.member in self._members:
            self._hear(self._members[message.member], works=False)
        elif isinstance(message, Leave) and member is not None:
            self._lost.append(self._members.pop(identity))
        elif isinstance(message, Scored | Failed) and member is not None and not (len(frames) == 3 and member.is_local):
            self._hear(member, works=True)
            return member, message, frames[2].buffer if len(frames) == 3 else None
        else:
            self.counts["refused_unexpected"] += 1
        return None

    def _hear(self, member: Member, works: bool) -> None:
        member.heard = time.monotonic()
        if works or not member.stuck:
            member.gone, member.stuck = "", False

    def _welcome(self, socket: Any, identity: bytes, join: Join) -> None:
        front = self._front
        member = Member(identity, join, socket, socket is self._local, time.monotonic())
        wrong = differences(join.terms, front.terms)
        for name, weights in join.models.items():
            wanted = front.identities.get(name, "not asked for")
            if weights != wanted:
                wrong.append(f"weights of {name}: {weights} there, {wanted} here")
        if not wrong and len(self._members) >= MOST_MEMBERS:
            wrong.append(f"{MOST_MEMBERS} teachers have joined already")
        if wrong:
            self.counts["refused_join"] += 1
            self.send(member, Refused("; ".join(wrong)))
            return
        if identity in self._members:  # the network broke and is back: what was on its way is lost
            self._lost.append(self._members.pop(identity))
        if self.send(member, front.welcome):
            self._members[identity] = member
            self.counts["joined"] += 1
