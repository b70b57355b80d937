"""The lives of the processes of a run: a student rank from its claim to its export, a teacher rank from load to Bye.

What launchers start comes here. A process decides its role from its place, checks everything that can be checked before
anything is loaded, and leaves nothing behind, however it ends.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from deltakd.base.errors import RunError
from deltakd.base.processes import is_alive, launch_identity, resident_bytes
from deltakd.base.ranks import Placement, Role, assign_role
from deltakd.base.rundir import RunDirectory
from deltakd.base.scratch import Scratch
from deltakd.engine.protocol import device_name
from deltakd.losses.settings import needed_references
from deltakd.models.load import identity
from deltakd.models.settings import role_key
from deltakd.recipe.build import (
    Inputs,
    Service,
    build_arena,
    build_parts,
    build_served,
    read_examples,
    read_inputs,
)
from deltakd.recipe.checks import check_paths, check_recipe
from deltakd.recipe.load import Loaded, dump_recipe
from deltakd.recipe.schema import Recipe
from deltakd.teacher.client import TeacherRank
from deltakd.teacher.server import Served, TeacherServer
from deltakd.train.loop import train
from deltakd.train.records import Records

SHARED_MEMORY = Path("/dev/shm")
LEAVE_S = 10.0  # how long a teacher may take to leave after its last student


@dataclass(frozen=True)
class Launch:
    """How this process was started, beyond the recipe."""

    placement: Placement
    identity: str | None = None  # given where teachers and students do not share a launcher
    external_teachers: bool = False  # someone else starts the teachers of this node


def run_rank(loaded: Loaded, launch: Launch) -> None:
    """Live this process's life in the run: train or serve, by its local rank."""
    use_threads()
    recipe = loaded.recipe
    num_teachers = recipe.teachers.per_node if _wants_service(recipe) else 0
    check_recipe(recipe, loaded.where)
    role = assign_role(launch.placement, num_teachers, launch.external_teachers)
    if recipe.engine.name == "single" and role.num_students > 1:
        raise RunError(
            f"{loaded.where('engine.name')}: single trains in one process, {role.num_students} were started. "
            "Write engine: {name: deepspeed}, or start one."
        )
    if role.kind == "teacher":
        serve(loaded, role.rank, role.num_local_students, launch.identity, f"cuda:{launch.placement.local_rank}")
        return
    student(loaded, role, launch.identity)


def _wants_service(recipe: Recipe) -> bool:
    return recipe.references.source == "service" and bool(needed_references(recipe.objective))


def use_threads() -> None:
    """Take one thread per process unless OMP_NUM_THREADS says otherwise, so that sums do not depend on the node."""
    threads = os.environ.get("OMP_NUM_THREADS", "1").partition(",")[0]
    if not threads.isdigit() or int(threads) < 1:
        raise RunError(f"OMP_NUM_THREADS: {threads!r} is no number of threads. Write 1 or more.")
    torch.set_num_threads(int(threads))


def student(loaded: Loaded, role: Role, launch_name: str | None) -> None:
    """Train: claim the directory, check, start teachers if they are ours to start, join, train, export."""
    recipe = loaded.recipe
    run = RunDirectory(Path(recipe.directory))
    with ExitStack() as stack:
        if role.rank == 0:
            stack.enter_context(run.claim())
        if is_finished(run, recipe):
            if role.rank == 0:
                print(f"{run.path}: finished; nothing to do. Remove the folder to train again.", flush=True)
            return
        check_paths(recipe, loaded.where, Path(recipe.root).name)
        inputs = read_inputs(recipe, loaded.where)
        examples = read_examples(recipe, inputs.tokenizer, progress=role.rank == 0)
        if role.rank == 0:
            print(f"{run.path}: {examples.counts.describe()}", flush=True)
            run.start(dump_recipe(recipe), {"seed": recipe.seed, "data": vars(examples.counts)})
        launch = launch_name or launch_identity(run.path)
        service = _open_service(loaded, run, inputs, role, launch, stack) if role.num_local_teachers else None
        parts = build_parts(inputs, examples, role, service, stack)
        beside = [] if service else list(inputs.frozen)
        heads = list(inputs.frozen) if service and inputs.spec.kind == "hidden" else []
        _record_process(run, "student", role.rank, parts.engine.device, ["student", *beside], heads)
        parts.world.barrier()
        if role.rank == 0:
            records = stack.enter_context(Records(run, recipe.records, recipe.run, recipe.train.steps))
            last = train(parts, records.write)
        else:
            last = train(parts, lambda record: None)
        parts.engine.save(run.export, inputs.tokenizer)
        if role.rank == 0:
            run.finish({"steps": last.step, "loss": last.loss, "inputs": _identities(inputs)})
            print(f"{run.path}: finished after {last.step} steps; the model lies in {run.export}", flush=True)


def _open_service(
    loaded: Loaded, run: RunDirectory, inputs: Inputs, role: Role, launch: str, stack: ExitStack
) -> Service:
    """Take this rank's slots and know its node's teachers; those we start load while the engine is built."""
    scratch = stack.enter_context(Scratch(SHARED_MEMORY, launch))
    arena = stack.enter_context(build_arena(inputs, role, scratch.path))
    start = _start_teacher if role.teachers_beside else _expect_teacher
    teachers = [
        stack.enter_context(start(loaded, run, launch, index, role)) for index in range(role.num_local_teachers)
    ]
    return Service(arena, launch, teachers)


def is_finished(run: RunDirectory, recipe: Recipe) -> bool:
    """Tell whether the directory holds this very run, finished.

    Raises RunError if another recipe has made it, or if a model that it came from has been made anew since.
    """
    finished = run.finished()
    if finished is None:
        return False
    if "inputs" not in finished:
        raise RunError(f"{run.path}: made by another stage, not by a training. Write run=... with another name.")
    changes = run.changes(dump_recipe(recipe))
    for role, before in finished["inputs"].items():
        folder = Path(recipe.models.roles[role].weights).expanduser()
        if folder.is_dir() and identity(folder) != before:
            changes.append(f"{role_key(role)}: {folder} has been made anew since")
    if changes:
        raise RunError(
            f"{run.path}: finished with another recipe ({'; '.join(changes[:3])}). "
            "Write run=... with another name (root=... moves all stages), or remove the folder."
        )
    return True


def _identities(inputs: Inputs) -> dict[str, str]:
    return {"student": identity(inputs.student)} | {name: facts.identity for name, facts in inputs.frozen.items()}


@contextmanager
def _start_teacher(loaded: Loaded, run: RunDirectory, launch: str, index: int, role: Role) -> Iterator[TeacherRank]:
    """Start a teacher rank beside this student, on the same device; it ends with us."""
    log = run.path / "logs" / f"teacher-{index}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "deltakd", "serve", str(run.path / "recipe.yaml"), "--launch", launch]
    command += ["--index", str(index), "--students", str(role.num_local_students), "--device", device_name(0)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)

    def ended(pid: int | None) -> str | None:
        if process.poll() is None:
            return None
        words = log.read_text(errors="replace").strip().splitlines()
        return f"ended with exit code {process.returncode}" + (f" ({words[-1]})" if words else "")

    try:
        yield TeacherRank(index, str(log), ended)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=LEAVE_S)
    finally:  # after an error it has no Bye to wait for
        process.kill()
        process.wait()


@contextmanager
def _expect_teacher(loaded: Loaded, run: RunDirectory, launch: str, index: int, role: Role) -> Iterator[TeacherRank]:
    """Know a teacher rank that the launcher has started."""

    def ended(pid: int | None) -> str | None:
        return None if pid is None or is_alive(pid) else f"process {pid} has ended"

    yield TeacherRank(index, "of the launcher", ended)


def serve(loaded: Loaded, index: int, num_students: int, launch: str | None, device: str) -> None:
    """Serve the run's frozen models to this node's students until all of them have left."""
    use_threads()
    recipe = loaded.recipe
    run = RunDirectory(Path(recipe.directory))
    if not _wants_service(recipe) or is_finished(run, recipe):
        print(f"teacher {index}: nothing to serve for {run.path}", flush=True)
        return
    device = device if torch.cuda.is_available() else "cpu"
    check_paths(recipe, loaded.where, Path(recipe.root).name)
    inputs = read_inputs(recipe, loaded.where)
    launch = launch or launch_identity(run.path)
    with Scratch(SHARED_MEMORY, launch) as scratch:
        models = {
            name: Served(model, inputs.frozen[name].identity) for name, model in build_served(inputs, device).items()
        }
        with TeacherServer(index, scratch.path, launch, models, inputs.fingerprint, inputs.spec, device) as server:
            server.serve(
                num_students,
                recipe.teachers.start_s,
                on_first=lambda: _record_process(run, "teacher", index, device, list(models), []),
            )
        print(f"teacher {index}: {server.counts['scored']:,} answers, {server.counts['tokens']:,} tokens", flush=True)


def _record_process(
    run: RunDirectory, role: str, rank: int, device: str, models: Sequence[str], heads: Sequence[str]
) -> None:
    run.append(
        "processes.jsonl",
        {
            "pid": os.getpid(),
            "role": role,
            "rank": rank,
            "host": socket.gethostname(),
            "device": device,
            "models": list(models),
            "heads": list(heads),
            "memory_bytes": resident_bytes(),
        },
    )
