"""A run is asked to stop: by SIGTERM, SIGUSR1, Ctrl-C or a closed terminal, or since a launcher above it has gone.

Whoever is asked finishes what cannot be cut, keeps its state and leaves with exit code 75, within a grace period. The
period runs in a thread that a signal reaches through a pipe, so a process that hangs in a collective ends as well.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

from deltakd.base.errors import EXIT_STOPPED
from deltakd.base.processes import EXIT_ORPHANED, outlive_parent, when_orphaned

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Whether this process has been asked to stop; use with `with`, in the main thread."""

    def __init__(self, grace_s: float, say: Callable[[str], None] | None = None) -> None:
        """`say` gets one line when a stop is asked for, and one if the grace period was too short."""
        self._grace_s = grace_s
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._reason: str | None = None
        self._lock = threading.Lock()
        self._left = threading.Event()

    def __enter__(self) -> "StopRequest":
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        heard = [number for number in ASKING if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores one
        self._before = {number: signal.signal(number, self._noted) for number in heard}
        # Python's own handler waits for the main thread, which a dead peer can keep in C++ for ever; this does not.
        self._former = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), name="stop", daemon=True).start()
        outlive_parent()  # which a group's signal ends before our grace is over; the watcher of launchers stays
        when_orphaned(lambda: self.ask("the end of its launcher", EXIT_ORPHANED))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        when_orphaned(None)
        signal.set_wakeup_fd(self._former)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writing)  # ends the listening thread
        self._left.set()

    @property
    def reason(self) -> str | None:
        """Why this process shall stop, in words; None if it may go on."""
        return self._reason

    def ask(self, reason: str, exit_code: int = EXIT_STOPPED) -> None:
        """Ask this process to stop; returns when it has left in good order, and ends it when its time is over."""
        with self._lock:
            first = self._reason is None and not self._left.is_set()
            self._reason = self._reason or reason
        if first:
            self._say(f"stopping ({reason}): what is trained is being kept, for at most {self._grace_s:g} s")
        if not self._left.wait(self._grace_s):
            self._say(f"stopped without a checkpoint: checkpoints.grace_s, {self._grace_s:g} s, was too short")
            os._exit(exit_code)

    @staticmethod
    def _noted(number: int, frame: FrameType | None) -> None:
        """Leave everything to the thread that reads the pipe."""

    def _listen(self, pipe: int) -> None:
        interrupts = 0
        with suppress(OSError):
            while heard := os.read(pipe, 1):
                number = signal.Signals(heard[0])
                interrupts += number is signal.SIGINT
                if interrupts == 2:  # a person who means it
                    os._exit(128 + number)
                threading.Thread(target=self.ask, args=(number.name,), name="grace", daemon=True).start()
        os.close(pipe)
