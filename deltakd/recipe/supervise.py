"""Keeping teacher ranks running. Imports no torch: whoever supervises should be there at once and cost nothing.

A teacher rank is two processes. The one that the launcher knows supervises: it starts the one that holds the weights,
and starts it again when it dies, within `teachers.restarts`. So a crash is not the launcher's business, which would end
the whole run. A student that is alone on its node supervises its teacher itself.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from deltakd.base.errors import EXIT_USER_ERROR, TeacherError
from deltakd.base.processes import launch_identity
from deltakd.base.rundir import RunDirectory, write_text
from deltakd.base.scratch import SHARED_MEMORY, Scratch
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
    teachers = recipe.teachers

    def say(text: str) -> None:
        print(f"teacher {post.index}: {text}", file=sys.stderr, flush=True)

    # Twice as patient as the students: by then they ask others already.
    return Supervisor(command, log, teachers.restarts, 2 * teachers.silent_s, say, wanted)


def supervise(loaded: Loaded, post: Post) -> None:
    """Keep a teacher running until the students of this node have left, or hold a place in another rank's group.

    Of `teachers.tensor_parallel` ranks in a row the first has the teacher, which starts its other processes itself.
    Raises TeacherError if its recipe cannot be served. If it cannot be started again the others go on without it.
    """
    recipe = loaded.recipe
    run = RunDirectory(Path(recipe.directory))
    launch = post.launch or launch_identity(run.path)
    wanted = _Wanted(SHARED_MEMORY, launch)
    index, place = divmod(post.index, recipe.teachers.tensor_parallel)
    if place:  # what was launched here is its accelerator, for the first of the group
        while run.finished() is None and wanted():  # one that is finished has no students to come
            time.sleep(1)
        return
    post = replace(post, index=index, launch=launch)
    supervisor = _supervisor(recipe, run, post, wanted)
    code = supervisor.run()
    if code == EXIT_USER_ERROR and supervisor.failed:
        raise TeacherError(f"teacher {post.index} {supervisor.failed}. Look at its log, {supervisor.log}.")
    if supervisor.failed:
        print(f"teacher {post.index} {supervisor.failed}; the others go on without it", file=sys.stderr, flush=True)
        while wanted():  # a launcher ends the whole run when one of its processes ends badly
            time.sleep(1)


class _Wanted:
    """Whether students are still to come or still there, on this node."""

    def __init__(self, parent: Path, launch: str) -> None:
        self._folder = Scratch.folder(parent, launch)
        self._seen = False
        self._left_at: float | None = None

    def __call__(self) -> bool:
        if any(self._folder.glob("student-*.sock")):
            self._seen, self._left_at = True, None
            return True
        if not self._seen:
            return True
        self._left_at = self._left_at or time.monotonic()
        return time.monotonic() - self._left_at < LEAVE_S
