"""The frozen models' side of a run: who starts teacher ranks, keeps them running, and lives their lives.

A teacher rank is two processes. The one that the launcher knows supervises: it starts the one that holds the weights,
and starts it again when it dies, within `teachers.restarts`. So a crash is not the launcher's business, which would end
the whole run. A student that is alone on its node supervises its teacher itself.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from deltakd.base.errors import EXIT_USER_ERROR, RunError, TeacherError
from deltakd.base.processes import launch_identity
from deltakd.base.ranks import Role
from deltakd.base.rundir import RunDirectory, write_json, write_text
from deltakd.base.scratch import Scratch
from deltakd.base.supervisor import Supervisor, pulse_from_environment
from deltakd.losses.settings import needed_references
from deltakd.recipe.build import Inputs, Service, build_arena, build_frozen, frozen_facts, read_inputs, terms
from deltakd.recipe.checks import check_paths
from deltakd.recipe.load import Loaded, dump_recipe
from deltakd.recipe.schema import Recipe
from deltakd.teacher.addresses import Address, local_addresses, remote_addresses
from deltakd.teacher.members import Front, Members
from deltakd.teacher.messages import Welcome
from deltakd.teacher.server import Offer, TeacherServer

SHARED_MEMORY = Path("/dev/shm")
LEAVE_S = 10.0  # how long a teacher may take to leave after its last student
SERVICE = "service"  # folder of a run directory in which teachers from elsewhere find the students
STATUS = "status"  # folder of a run directory in which every student rank shows how its teachers do


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


def open_service(
    loaded: Loaded, run: RunDirectory, inputs: Inputs, role: Role, launch: str, stack: ExitStack
) -> Service:
    """Take this rank's slots and listen; the teachers that are ours to start load while the engine is built."""
    recipe, teachers = loaded.recipe, loaded.recipe.teachers
    scratch = stack.enter_context(Scratch(SHARED_MEMORY, launch))
    arena = stack.enter_context(build_arena(inputs, role, scratch.path))
    front = Front(
        role.rank,
        role.num_students,
        terms(inputs, launch),
        {name: facts.identity for name, facts in frozen_facts(inputs).items()},
        scratch.path,
        Welcome(role.rank, arena.path.name, arena.slot_bytes, arena.num_slots),
    )
    service = run.path / SERVICE if teachers.network else None
    members = stack.enter_context(Members(front, teachers.silent_s, service, teachers.host))
    failed: Callable[[], str | None] = lambda: None  # noqa: E731
    if role.teachers_beside:
        post = Post(0, role.num_local_students, launch, "cuda:0")
        failed = stack.enter_context(_beside(recipe, run, post))
    path = run.path / STATUS / f"student-{role.rank}.json"
    return Service(members, arena, failed, lambda status: write_json(path, status))


@contextmanager
def _beside(recipe: Recipe, run: RunDirectory, post: Post) -> Iterator[Callable[[], str | None]]:
    """Supervise a teacher rank from a thread of this process; yields what says why it cannot come back."""
    supervisor = _supervisor(recipe, run, post, lambda: True)
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
    log, written = run.path / "logs" / f"{name}.log", run.path / "logs" / f"{name}.yaml"
    write_text(written, dump_recipe(recipe))
    command = [sys.executable, "-m", "deltakd", "serve", str(written), "--index", str(post.index)]
    command += ["--students", str(post.num_students), "--device", post.device, "--log", str(log)]
    command += [*(["--launch", post.launch] if post.launch else []), *(["--run", post.run] if post.run else [])]
    teachers = recipe.teachers

    def say(text: str) -> None:
        print(f"teacher {post.index}: {text}", file=sys.stderr, flush=True)

    # Twice as patient as the students: by then they ask others already.
    return Supervisor(command, log, teachers.restarts, 2 * teachers.silent_s, say, wanted)


def supervise(loaded: Loaded, post: Post) -> None:
    """Keep a teacher rank running until the students of this node have left.

    Raises TeacherError if its recipe cannot be served. If it cannot be started again the others go on without it.
    """
    recipe = loaded.recipe
    run = RunDirectory(Path(recipe.directory))
    launch = post.launch or launch_identity(run.path)
    wanted = _Wanted(SHARED_MEMORY, launch)
    supervisor = _supervisor(recipe, run, replace(post, launch=launch), wanted)
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


def serve(loaded: Loaded, post: Post) -> None:
    """Serve frozen models to a run's students until all of them have left: those of this node, or of `post.run`."""
    recipe = loaded.recipe
    use_threads()
    run = RunDirectory(Path(post.run or recipe.directory))
    if not wants_service(recipe):
        print(f"teacher {post.index}: nothing to serve for {run.path}", flush=True)
        return
    device = post.device if torch.cuda.is_available() else "cpu"
    check_paths(recipe, loaded.where, Path(recipe.root).name)
    inputs = read_inputs(recipe, loaded.where)
    with ExitStack() as stack:
        scratch, launch, find = _find_students(post, run, recipe, stack)
        frozen = build_frozen(inputs, device, _served_names(recipe, post.index))
        offer = Offer(
            frozen,
            {name: inputs.frozen[name].identity for name in frozen.models},
            terms(inputs, launch),
            str(post.index),
            post.log,
        )
        teachers = recipe.teachers
        server = stack.enter_context(
            TeacherServer(
                offer, find, scratch, device, teachers.heartbeat_s, teachers.silent_s, pulse_from_environment()
            )
        )
        server.serve(
            teachers.start_s,
            on_first=lambda: run.record_process("teacher", post.index, device, list(frozen.models)),
        )
        counts = ", ".join(f"{name} {number:,}" for name, number in sorted(server.counts.items()))
        print(f"teacher {post.index}: {counts or 'nothing was asked'}", flush=True)


def _find_students(
    post: Post, run: RunDirectory, recipe: Recipe, stack: ExitStack
) -> tuple[Path | None, str, Callable[[], Sequence[Address]]]:
    """Return the node's scratch folder, the launch's name, and what finds its student ranks."""
    if post.run is None:
        launch = post.launch or launch_identity(run.path)
        scratch = stack.enter_context(Scratch(SHARED_MEMORY, launch))
        return scratch.path, launch, lambda: local_addresses(scratch.path, launch, post.num_students)
    service, deadline = run.path / SERVICE, time.monotonic() + recipe.teachers.start_s
    while not (found := remote_addresses(service)):
        if time.monotonic() > deadline:
            raise RunError(
                f"{service}: no student has listened for {recipe.teachers.start_s:g} s. Start the run first."
            )
        time.sleep(0.2)
    launch = found[0].launch
    return None, launch, lambda: [address for address in remote_addresses(service) if address.launch == launch]


def _served_names(recipe: Recipe, index: int) -> frozenset[str]:
    needed = needed_references(recipe.objective)
    serves = recipe.teachers.serves
    return needed & frozenset(serves[index]) if serves is not None and index < len(serves) else needed


def use_threads() -> None:
    """Take one thread per process unless OMP_NUM_THREADS says otherwise, so that sums do not depend on the node."""
    threads = os.environ.get("OMP_NUM_THREADS", "1").partition(",")[0]
    if not threads.isdigit() or int(threads) < 1:
        raise RunError(f"OMP_NUM_THREADS: {threads!r} is no number of threads. Write 1 or more.")
    torch.set_num_threads(int(threads))
