"""A run's corner of shared memory on one node: arenas and sockets in one folder that cannot be left behind.

    /dev/shm/deltakd-<launch>/        mode 0700
        lock                          every process of the run holds it shared
        arena-<student rank>          slots for payloads
        student-<rank>.sock           where student ranks listen for teachers

The kernel drops a dead process's lock, whatever killed it. A janitor, one tiny process per node, waits for the lock
alone: it gets it when the last process of the run is gone, removes the folder and ends. Should the janitor be killed as
well, the next run on the node sweeps what nobody holds.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from deltakd.base.errors import RunError

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "deltakd-"
ABANDONED_S = 60.0  # after which a folder without a lock is one whose maker was killed before it made that

# Runs isolated (-I -S): no site packages, about 8 MB. The lock file is opened before the folder can vanish.
_JANITOR = """
import fcntl, shutil, signal, sys
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
try:
    with open(sys.argv[1] + "/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(sys.argv[1], ignore_errors=True)
except FileNotFoundError:
    pass
"""


class Scratch:
    """This process's hold on the run's folder in shared memory; use with `with`."""

    def __init__(self, parent: Path, launch: str) -> None:
        """Join the folder of the launch, making it if this process is the first. Raises RunError if it cannot be."""
        sweep(parent)
        self.path = self.folder(parent, launch)
        self._lock = _join(self.path)

    @staticmethod
    def folder(parent: Path, launch: str) -> Path:
        """Return where the folder of a launch is, if it is there."""
        return parent / f"{PREFIX}{launch}"

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)


def _join(path: Path) -> int:
    while True:
        try:
            path.mkdir(mode=0o700)
            first = True
        except FileExistsError:
            first = False
        except OSError as error:
            raise RunError(f"{path}: cannot be made ({error.strerror}). Free shared memory on this node.") from error
        try:
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # swept between the two calls
            continue
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            still_there = (path / "lock").stat().st_ino == os.fstat(lock).st_ino
        except FileNotFoundError:
            still_there = False
        if still_there:
            if first:
                _start_janitor(path)
            return lock
        os.close(lock)


def _start_janitor(path: Path) -> None:
    subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _JANITOR, str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


def sweep(parent: Path) -> list[Path]:
    """Remove the folders of runs of which no process lives on this node; return them."""
    removed = []
    for path in _abandoned(parent):
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    return removed


def leftovers(parent: Path) -> list[Path]:
    """Return the folders that `sweep` would remove."""
    return list(_abandoned(parent))


def _abandoned(parent: Path) -> Iterator[Path]:
    """Yield the folders of dead runs, each while its lock is held so that nobody joins it."""
    for path in parent.glob(f"{PREFIX}*"):
        try:
            lock = os.open(path / "lock", os.O_RDWR)
        except (PermissionError, NotADirectoryError):  # another user's, or none of ours
            continue
        except FileNotFoundError:  # being made or removed at this moment, unless it has been so for long
            if _age_s(path) > ABANDONED_S:
                yield path
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
