"""Keeps one process running: restarts it when it dies or no longer shows a pulse, within a budget.

The process gets the writing end of a pipe (DELTAKD_PULSE) and writes a byte to it now and then. Once it has begun to,
silence means that it is stuck. An exit code of 2 is a fault that another start would meet again, so there is none.
"""

import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from deltakd.base.errors import EXIT_USER_ERROR

PULSE = "DELTAKD_PULSE"
MOST_BACKOFF_S = 5.0
ENDS_S = 60.0  # how long a process may take to end after its last word


class Pulse:
    """What a process shows to its supervisor; nothing where it has none."""

    def __init__(self, pipe: int | None) -> None:
        self._pipe = pipe

    def __call__(self) -> None:
        """Show that this process lives."""
        if self._pipe is not None:
            with suppress(OSError):  # nobody reads: the watcher of launchers ends this process soon
                os.write(self._pipe, b".")

    def leave(self) -> None:
        """Say that this process has done its work: to end may take a busy machine longer than it may be silent."""
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None


def pulse_from_environment() -> Pulse:
    """Return the pulse that this process was given."""
    descriptor = os.environ.pop(PULSE, "")
    if not descriptor.isdecimal():
        return Pulse(None)
    pipe = int(descriptor)
    os.set_inheritable(pipe, False)
    os.set_blocking(pipe, False)
    return Pulse(pipe)


class Supervisor:
    """One process and its restarts; `run` in a thread that lives as long as the process may."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        restarts: int,
        silent_s: float,
        say: Callable[[str], None],
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """`log` gets the process's output, appended at every start; `say` gets one line for each restart.

        Once `wanted` says False, asked every second, the process is ended for good.
        """
        self._command, self.log, self._say, self._wanted = list(command), log, say, wanted
        self._left, self._silent_s = restarts, silent_s
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self.failed: str | None = None  # why it will not run again

    def run(self) -> int:
        """Keep the process running until it ends well, cannot be started again, or `stop` is called.

        Returns its last exit code.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        backoff_s = 0.1
        while True:
            started = time.monotonic()
            code, why = self._live_once()
            if code == 0 or self._ended.is_set() or not self._wanted():
                return 0
            words = self.log.read_text(errors="replace").strip().splitlines()
            why += f" ({words[-1]})" if words else ""
            if code == EXIT_USER_ERROR or self._left == 0:
                self.failed = why if code == EXIT_USER_ERROR else f"{why}, and no restart is left"
                return code
            self._left -= 1
            self._say(f"{why}; starting it again, {self._left} restarts left")
            if time.monotonic() - started > 60:
                backoff_s = 0.1
            self._ended.wait(backoff_s)
            backoff_s = min(2 * backoff_s, MOST_BACKOFF_S)

    def stop(self) -> None:
        """Kill the process, if it runs, and start it no more."""
        self._ended.set()
        process = self._process
        if process is not None:
            process.kill()

    def _live_once(self) -> tuple[int, str]:
        """Start the process and wait for its end; returns its exit code and what happened, in words."""
        reading, writing = os.pipe()
        try:
            with self.log.open("ab") as output:
                process = self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[writing],
                    start_new_session=True,  # Ctrl-C asks us, who know when it may leave
                    env={**os.environ, PULSE: str(writing)},
                )
            os.close(writing)
            if self._ended.is_set():
                process.kill()
            is_stuck = self._watch(reading)
            if is_stuck or self._ended.is_set():
                process.kill()
            try:
                code = process.wait(ENDS_S)
            except subprocess.TimeoutExpired:  # it has left, and hangs on its way out
                process.kill()
                process.wait()
                code = 0  # only who has done its work leaves
            return code, f"was stuck for {self._silent_s:g} s" if is_stuck else f"ended with exit code {code}"
        finally:
            os.close(reading)

    def _watch(self, pipe: int) -> bool:
        """Wait until the process has closed its pipe or is not wanted; True if it has shown no pulse for too long."""
        heard: float | None = None
        while self._wanted():
            ready, _, _ = select.select([pipe], [], [], 1.0)
            if ready:
                heard = time.monotonic()
                if not os.read(pipe, 4096):
                    return False
            elif heard is not None and time.monotonic() - heard > self._silent_s:
                return True
        self._ended.set()
        return False
