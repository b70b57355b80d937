"""A teacher's heartbeat: a thread with sockets of its own, so that students hear it whatever the rank computes."""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import zmq

from deltakd.teacher.addresses import Address, connect, new_context, new_identity
from deltakd.teacher.messages import Alive, encode


@dataclass
class Heart:
    """Tells every student, from a thread with sockets of its own, that this process lives, whatever it computes."""

    every_s: float
    pulse: Callable[[], None]
    _new: list[tuple[Address, bytes]] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begin to beat."""
        self._thread = threading.Thread(target=self._live, name="heart", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait for the thread's end."""
        self._ended.set()
        self._thread.join()

    def beat_for(self, address: Address, member: bytes) -> None:
        """Let one more student hear it; `member` is the identity under which it is asked."""
        self._new.append((address, member))

    def _live(self) -> None:
        context = new_context()
        sockets = []
        while not self._ended.wait(self.every_s):
            while self._new:
                address, member = self._new.pop(0)
                sockets.append((connect(context, address, new_identity()), encode(Alive(member))))
            for dealer, beat in sockets:
                with suppress(zmq.Again):  # the student has not looked for long: it has enough of them
                    dealer.send(beat, zmq.NOBLOCK)
            self.pulse()
        for dealer, _ in sockets:
            dealer.close(linger=0)
        context.term()
