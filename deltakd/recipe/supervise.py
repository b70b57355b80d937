"""Keeping teacher ranks running. Imports no torch: whoever supervises should be there at once and cost nothing.

A teacher rank is two processes. The one that the launcher knows supervises: it starts the one that holds the weights,
and starts it again when it dies, within `teachers.restarts`. So a crash is not the launcher's business, which would end
the whole run. A student that is alone on its node supervises its teacher itself.

A launcher that stops a run signals every rank alike. A teacher then stays until its students have left: if it went
first, the launcher would take that for a fault and kill them while they keep their state.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from deltakd.base.errors import EXIT_USER_ERROR, Stopped, TeacherError
from deltakd.base.files import write_text
from deltakd.base.processes import launch_identity
from deltakd.base.rundir import SERVICE, RunDirectory
from deltakd.base.scratch import SHARED_MEMORY, Scratch
from deltakd.base.stop import ASKING
from deltakd.base.supervisor import Supervisor
from deltakd.losses.settings import needed_references
from deltakd.recipe.load import Loaded, dump_recipe
from deltakd.recipe.schema import Recipe

LEAVE_S = 10.0  # how long a teacher may take to leave after its last student


@dataclass(frozen=True)
class Post:
    """Where a teacher rank stands, beyond the recipe."""

    index: int = 0
    num_students: int = 1  # of this node
    launch: str | None = None
    device: str = "cpu"
    log: str = "the terminal's"
    run: str | None = None  # the directory of a run to join from elsewhere


def wants_service(recipe: Recipe) -> bool:
    """Tell whether the recipe's frozen models answer from processes of their own."""
    return recipe.references.source == "service" and bool(needed_references(recipe.objective))


@contextmanager
def beside(
    recipe: Recipe, run: RunDirectory, post: Post, stop: Callable[[], str | None] = lambda: None
) -> Iterator[Callable[[], str | None]]:
    """Supervise a teacher rank in a thread until `stop` gives a reason; yields what says why it cannot come back."""
    supervisor = _supervisor(recipe, run, post, lambda: stop() is None)
    thread = threading.Thread(target=supervisor.run, name="supervisor", daemon=True)
    thread.start()
    try:
        yield lambda: supervisor.failed and f"teacher {post.index} {supervisor.failed} (log {supervisor.log})"
    except BaseException:  # it has no Bye to wait for
        supervisor.stop()
        raise
    finally:
        thread.join(LEAVE_S)
        supervisor.stop()
        thread.join()


def _supervisor(recipe: Recipe, run: RunDirectory, post: Post, wanted: Callable[[], bool]) -> Supervisor:
    name = f"teacher-{os.uname().nodename}-{post.index}"
    # A launch that is refused because the run is live must not change what the live one starts its teacher from.
    log, written = run.path / "logs" / f"{name}.log", run.path / "logs" / f"{name}-{post.launch or 'alone'}.yaml"
    write_text(written, dump_recipe(recipe))
    command = [sys.executable, "-m", "deltakd", "serve", str(written), "--index", str(post.index)]
    command += ["--students", str(post.num_students), "--device", post.device, "--log", str(log)]
    command += ["--launch", post.launch] if post.launch else []
    command += ["--run", post.run] if post.run else []
    teachers = recipe.teachers

    def say(text: str) -> None:
        print(f"teacher {post.index}: {text}", file=sys.stderr, flush=True)

    # Twice as patient as the students: by then they ask others already.
    return Supervisor(command, log, teachers.restarts, 2 * teachers.silent_s, say, wanted)


def supervise(loaded: Loaded, post: Post) -> None:
    """Keep a teacher running until its students have left, or hold a place in another rank's group.

    Of `teachers.tensor_parallel` ranks in a row the first has the teacher, which starts its other processes itself.
    Raises TeacherError if its recipe cannot be served. If it cannot be started again the others go on without it.
    """
    recipe = loaded.recipe
    run = RunDirectory(Path(post.run or recipe.directory))
    launch = post.launch or launch_identity(run.path)
    wanted = _Wanted(_on_this_node(launch) if post.run is None else _in_run(run, launch), recipe.checkpoints.grace_s)
    index, place = divmod(post.index, recipe.teachers.tensor_parallel)
    if place:  # what was launched here is its accelerator, for the first of the group
        while run.finished() is None and wanted():  # one that is finished has no students to come
            time.sleep(1)
        return
    post = replace(post, index=index, launch=launch)
    supervisor = _supervisor(recipe, run, post, wanted)
    code = supervisor.run()
    if wanted.asked_in_vain:
        raise Stopped(f"teacher {post.index}: stopped by a signal before a student came.")
    while code == 0 and post.run is not None and _stays(wanted):  # the network was away, its students were not
        code = supervisor.run()
    if code == EXIT_USER_ERROR and supervisor.failed:
        raise TeacherError(f"teacher {post.index} {supervisor.failed}. Look at its log, {supervisor.log}.")
    if supervisor.failed:
        print(f"teacher {post.index} {supervisor.failed}; the others go on without it", file=sys.stderr, flush=True)
        while wanted():  # a launcher ends the whole run when one of its processes ends badly
            time.sleep(1)


def _stays(wanted: Callable[[], bool]) -> bool:
    if wanted():
        time.sleep(LEAVE_S)
    return wanted()


class _Wanted:
    """Whether students are still to come or still there."""

    def __init__(self, there: Callable[[], bool], grace_s: float) -> None:
        self._there, self._grace_s = there, grace_s
        self._seen = False
        self._left_at: float | None = None
        self._stop_at: float | None = None
        for number in ASKING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._asked)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._stop_at is not None:  # a person who means it
            raise KeyboardInterrupt
        self._stop_at = self._stop_at or time.monotonic() + self._grace_s

    @property
    def asked_in_vain(self) -> bool:
        """Whether it was asked to stop before a student was there: the launcher must not take that for success."""
        return self._stop_at is not None and not self._seen

    def __call__(self) -> bool:
        now = time.monotonic()
        if self._there():
            self._seen, self._left_at = True, None
            return self._stop_at is None or now < self._stop_at
        if not self._seen:
            return self._stop_at is None
        self._left_at = self._left_at or now
        return self._stop_at is None and now - self._left_at < LEAVE_S


def _on_this_node(launch: str) -> Callable[[], bool]:
    """Return what tells whether a student rank of this node listens; the socket of a killed one answers nobody."""
    folder = Scratch.folder(SHARED_MEMORY, launch)
    return lambda: any(_listens(path) for path in folder.glob("student-*.sock"))


def _in_run(run: RunDirectory, launch: str) -> Callable[[], bool]:
    """Return what tells whether a run has students of this launch that teachers of other nodes may join."""
    from deltakd.teacher.addresses import remote_addresses

    return lambda: any(address.launch == launch for address in remote_addresses(run.path / SERVICE))


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:  # it has not looked for long, but it is there
            return True
        except OSError:
            return False
    return True
