"""Nobody outlives the run: every process watches those that started it and ends when one of them is gone.

Launchers leave orphans behind when they are killed (a SIGKILLed `deepspeed` leaves its ranks running), so a process
does not rely on them. It asks the kernel to end it with its parent, and a thread watches the launchers above.
"""

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from deltakd.base.errors import RunError

# A process above us belongs to the launch if a word of its command line is one of these programs, scripts or modules. A
# shell that was given a whole command in one word (`ssh host "nohup ... &"`) is none: it may end before its command.
LAUNCHERS = frozenset(
    {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run"}
    | {"deltakd", "train.py", "teacher.py", "local.sh"}
)
HANDED_DOWN = "DELTAKD_LAUNCHERS"
PR_SET_PDEATHSIG = 1
EXIT_ORPHANED = 3
LEAVE_S = 10.0


def launching_ancestors() -> list[int]:
    """Return the pids above this process that belong to its launch, nearest first.

    The walk ends at the first ancestor that is not a launcher (a login shell, sshd, slurmstepd), so closing a terminal
    does not end a run that was started to outlive it.
    """
    pids: list[int] = []
    for ancestor in psutil.Process().parents():
        try:
            command = ancestor.cmdline()
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            break
        if not LAUNCHERS & {Path(word).name for word in command}:
            break
        pids.append(ancestor.pid)
    return pids


def end_with_launchers() -> None:
    """End this process when a process that launched it ends: without cleaning up, and at once but for `when_orphaned`.

    The first thing that a process of ours does: until then a launcher's death goes unnoticed. Those above us are found
    by their command lines and in DELTAKD_LAUNCHERS, which every process of ours hands down (`pid:start` or `pid`), so
    that a launcher that died while we started is missed as well. What must be removed then is removed by the scratch
    folder's own janitor, which no death can skip.
    """
    ancestors = launching_ancestors()
    handed_down = [entry for entry in os.environ.get(HANDED_DOWN, "").split(",") if entry]
    if _is_orphan(ancestors) or not all(_is_same(entry) for entry in handed_down):
        os._exit(EXIT_ORPHANED)
    parent = os.getppid()
    if parent in ancestors:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(EXIT_ORPHANED)
    descriptors = []
    for pid in {*ancestors, *(int(entry.partition(":")[0]) for entry in handed_down)} - {os.getpid()}:
        try:
            descriptors.append(os.pidfd_open(pid))
        except ProcessLookupError:
            os._exit(EXIT_ORPHANED)
    own = f"{os.getpid()}:{psutil.Process().create_time()}"
    os.environ[HANDED_DOWN] = ",".join(dict.fromkeys([*handed_down, own]))
    if descriptors:
        threading.Thread(target=_end_with_first, args=(descriptors,), name="launcher-watch", daemon=True).start()


def _is_orphan(ancestors: list[int]) -> bool:
    """Tell whether one of deepspeed's launchers above us is gone already, and what it started is init's now."""
    chain = [psutil.Process(pid) for pid in ancestors if psutil.pid_exists(pid)]
    launchers = [process for process in chain if "deepspeed.launcher.launch" in process.cmdline()]
    started_by_one = any(word.startswith("--local_rank") for word in sys.argv)  # which passes it, as no other does
    return (started_by_one and not launchers) or any(
        process.ppid() == 1 and 1 not in ancestors for process in launchers
    )


def _is_same(entry: str) -> bool:
    """Tell whether a process that was handed down still runs, and is not another one under its number."""
    pid, _, started = entry.partition(":")
    try:
        return not started or psutil.Process(int(pid)).create_time() == float(started)
    except psutil.NoSuchProcess:
        return False


def outlive_parent() -> None:
    """Take back that the kernel ends this process with its parent."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)


_farewell: Callable[[], None] | None = None


def when_orphaned(farewell: Callable[[], None] | None) -> None:
    """Have this called before the process ends for want of its launchers; it may take its time. None: at once."""
    global _farewell
    _farewell = farewell


def _end_with_first(descriptors: list[int]) -> None:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    poll.poll()
    if _farewell is not None:
        _farewell()
        time.sleep(LEAVE_S)  # it is leaving by itself, with words of its own
    os._exit(EXIT_ORPHANED)


def is_alive(pid: int) -> bool:
    """Tell whether a process of this node runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def launch_identity(directory: Path) -> str:
    """Name this launch on this node: equal for all processes that one launcher started for one run directory."""
    import hashlib

    given = os.environ.get("DELTAKD_LAUNCH")
    if given:
        return given
    parent = psutil.Process(os.getppid())
    text = f"{directory.resolve()}|{parent.pid}|{parent.create_time()}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def use_threads() -> None:
    """Take one thread per process unless OMP_NUM_THREADS says otherwise, so that sums do not depend on the node."""
    threads = os.environ.get("OMP_NUM_THREADS", "1").partition(",")[0]
    if not threads.isdecimal() or int(threads) < 1:
        raise RunError(f"OMP_NUM_THREADS: {threads!r} is no number of threads. Write 1 or more.")
    import torch

    torch.set_num_threads(int(threads))


def resident_bytes(pid: int | None = None) -> int:
    """Return the resident memory of a process, by default of this one."""
    return int(psutil.Process(pid).memory_info().rss)
