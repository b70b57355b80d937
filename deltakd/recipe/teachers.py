"""The frozen models' side of a run: what student ranks listen through, and the life of a teacher rank."""

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from deltakd.base.errors import RunError
from deltakd.base.files import write_json
from deltakd.base.processes import launch_identity, resident_bytes, use_threads
from deltakd.base.ranks import Role
from deltakd.base.rundir import SERVICE, STATUS, RunDirectory
from deltakd.base.scratch import SHARED_MEMORY, Scratch
from deltakd.base.supervisor import pulse_from_environment
from deltakd.losses.settings import needed_references
from deltakd.recipe.build import Service, build_arena, frozen_facts, terms
from deltakd.recipe.finished import is_finished
from deltakd.recipe.inputs import Inputs, read_inputs
from deltakd.recipe.load import Loaded
from deltakd.recipe.paths import check_paths
from deltakd.recipe.schema import Recipe
from deltakd.recipe.split import open_frozen
from deltakd.recipe.supervise import Post, beside, wants_service
from deltakd.teacher.addresses import Address, local_addresses, remote_addresses
from deltakd.teacher.members import Front, Members
from deltakd.teacher.messages import Welcome
from deltakd.teacher.payloads import FrozenModels
from deltakd.teacher.server import Offer, TeacherServer


def open_service(
    loaded: Loaded,
    run: RunDirectory,
    inputs: Inputs,
    role: Role,
    launch: str,
    stack: ExitStack,
    stop: Callable[[], str | None],
) -> Service:
    """Take this rank's slots and listen; the teachers that are ours to start load while the engine is built.

    Once `stop` gives a reason they are started no more.
    """
    recipe, teachers = loaded.recipe, loaded.recipe.teachers
    scratch = stack.enter_context(Scratch(SHARED_MEMORY, launch))
    arena = stack.enter_context(build_arena(inputs, role, scratch.path))
    front = Front(
        role.rank,
        role.num_students,
        role.num_local_students,
        terms(inputs, launch),
        {name: facts.identity for name, facts in frozen_facts(inputs).items()},
        scratch.path,
        Welcome(role.rank, arena.path.name, arena.slot_bytes, arena.num_slots),
    )
    failed: Callable[[], str | None] = _others_will_say
    if role.teachers_beside:  # entered before the sockets, so left after their Bye
        post = Post(0, role.num_local_students, launch, ",".join(["cuda:0"] * teachers.tensor_parallel))
        alone = recipe.model_copy(update={"teachers": teachers.model_copy(update={"serves": None})})
        failed = stack.enter_context(beside(alone, run, post, stop))
    if role.rank == 0:
        _remove_former_ranks(run, role.num_students)
    service = run.path / SERVICE if teachers.network else None
    members = stack.enter_context(Members(front, teachers.silent_s, service, teachers.host))
    path = run.path / STATUS / f"student-{role.rank}.json"

    def show(status: object) -> None:
        with suppress(OSError):  # a disk that is full: what is trained says so
            write_json(path, status, lasting=False)

    return Service(members, arena, failed, show)


def _others_will_say() -> str | None:
    """Say nothing of teachers that a launcher has started: it ends the run if they cannot."""
    return None


def _remove_former_ranks(run: RunDirectory, num_students: int) -> None:
    """Remove what a killed launch with more ranks left; the ranks of this one write their own files anew."""
    for folder in (SERVICE, STATUS):
        for path in (run.path / folder).glob("student-*.json"):
            if int(path.stem.partition("-")[2]) >= num_students:
                path.unlink(missing_ok=True)


def serve(loaded: Loaded, post: Post) -> None:
    """Serve frozen models to a run's students until all of them have left: those of this node, or of `post.run`."""
    recipe = loaded.recipe
    use_threads()
    run = RunDirectory(Path(post.run or recipe.directory))
    if post.run is not None and post.launch is None and run.finished() is not None:
        raise RunError(f"{run.path}: finished, so there is nothing to join. Write the directory of a live run.")
    if not wants_service(recipe) or (post.run is None and is_finished(run, recipe)):
        print(f"teacher {post.index}: nothing to serve for {run.path}", flush=True)
        return
    device, pulse = post.device if torch.cuda.is_available() else "cpu", pulse_from_environment()
    check_paths(recipe, loaded.where, Path(recipe.root).name)
    inputs = read_inputs(recipe, loaded.where)
    with ExitStack() as stack:
        scratch, launch, find = _find_students(post, run, recipe, stack)
        frozen = stack.enter_context(open_frozen(inputs, str(post.index), device, _served_names(recipe, post.index)))
        offer = Offer(
            frozen,
            {name: inputs.frozen[name].identity for name in frozen.models},
            terms(inputs, launch),
            str(post.index),
            post.log,
        )
        device, teachers = device.partition(",")[0], recipe.teachers
        server = stack.enter_context(
            TeacherServer(offer, find, scratch, device, teachers.heartbeat_s, teachers.silent_s, pulse)
        )
        stack.callback(_say_counts, post.index, server.counts)  # it may leave by Ctrl-C as well
        server.serve(
            teachers.start_s,
            on_first=lambda: _record(run, post.index, device, frozen),
        )
        pulse.leave()


def _say_counts(index: int, counts: Mapping[str, int]) -> None:
    told = ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items()))
    print(f"teacher {index}: left; {told or 'nothing was asked'}", flush=True)


def _record(run: RunDirectory, index: int, device: str, frozen: FrozenModels) -> None:
    """Say and write down that this teacher takes part; one in several processes has a line for each, by its shard."""
    models, group = list(frozen.models), frozen.group
    print(f"teacher {index}: joined {run.path}, serves {', '.join(models)}", flush=True)
    run.record_process("teacher", index, device, models)
    for shard, (pid, where) in enumerate(group.others() if group else [], start=1):
        facts = {"pid": pid, "role": "teacher", "rank": index, "host": socket.gethostname(), "device": where}
        held = {"models": models, "heads": [], "memory_bytes": resident_bytes(pid), "shard": shard}
        run.append("processes.jsonl", facts | held)


def _find_students(
    post: Post, run: RunDirectory, recipe: Recipe, stack: ExitStack
) -> tuple[Path | None, str, Callable[[], Sequence[Address]]]:
    """Return the node's scratch folder, the launch's name, and what finds its student ranks."""
    if post.run is None:
        launch = post.launch or launch_identity(run.path)
        scratch = stack.enter_context(Scratch(SHARED_MEMORY, launch))
        return scratch.path, launch, lambda: local_addresses(scratch.path, launch, post.num_students)
    service, deadline = run.path / SERVICE, time.monotonic() + recipe.teachers.start_s

    def listening() -> list[Address]:  # what a killed launch has left is no one's
        return [address for address in remote_addresses(service) if post.launch in (None, address.launch)]

    if not listening():
        print(f"teacher {post.index}: waiting for a run to start in {run.path}", flush=True)
    while not (found := listening()):
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
