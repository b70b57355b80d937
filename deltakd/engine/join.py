"""Where the students meet: one torch.distributed group, whichever engine shards over it."""

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed

from deltakd.base.errors import EXIT_LOST, PeerLost, RunError
from deltakd.base.ranks import Role, TorchWorld, says_gone
from deltakd.engine.protocol import device_name


def join_students(role: Role, meet_s: float) -> TorchWorld:
    """Join the students' process group: teachers are launched with us but never belong to it.

    Raises RunError if the rendezvous port is taken. Ends the process with one sentence after `meet_s`.
    """
    os.environ |= {
        "RANK": str(role.rank),
        "WORLD_SIZE": str(role.num_students),
        "LOCAL_RANK": str(role.local_index),
        "LOCAL_SIZE": str(role.num_local_students),
        "LOCAL_WORLD_SIZE": str(role.num_local_students),
    }
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    device = device_name(role.local_index)
    if torch.distributed.is_initialized():  # an earlier training of this process
        return TorchWorld(device)
    launcher_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if role.num_students == 1 and not launcher_listens:
        os.environ["MASTER_PORT"] = str(_free_port())
    elif role.rank == 0 and not launcher_listens:
        _refuse_taken_port(int(os.environ.setdefault("MASTER_PORT", "29500")))
    if device != "cpu":
        torch.cuda.set_device(device)
    giving_up = threading.Timer(meet_s, _give_up, [role, meet_s])
    giving_up.daemon = True
    giving_up.start()
    try:
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
        torch.distributed.barrier()  # nccl connects at its first use
    except RuntimeError as error:  # a port that is taken, a host that nobody reaches
        kind = RunError if "EADDRINUSE" in str(error) or "in use" in str(error) else PeerLost
        raise kind(
            f"launch: the students cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({str(error).splitlines()[0][:120]}). Start with another port, as `deepspeed --master_port PORT ...`, "
            "or look whether the hosts reach each other."
        ) from error
    finally:
        giving_up.cancel()
    return TorchWorld(device)


def _give_up(role: Role, meet_s: float) -> None:
    """End this process from a thread: nothing interrupts a connection that is being waited for."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
    print(
        f"deltakd, rank {role.rank}: launch: {role.num_students} students have not met at {where} within {meet_s:g} s. "
        "One has not started, or its node cannot reach another: look at every rank's output, or raise engine.meet_s.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_LOST)


def by_first_rank(rank: int, device: str, work: Callable[[], None]) -> None:
    """Have rank 0 do what may fail, while the others wait; raises on all ranks if it does."""
    fault: Exception | None = None
    if rank == 0:
        try:
            work()
        except Exception as error:  # whatever it is: the others wait below
            fault = error
    failed = torch.tensor([float(fault is not None)], device=device)
    torch.distributed.all_reduce(failed)
    if fault is not None:
        raise fault
    if failed:
        raise PeerLost("another student rank cannot go on. Its own line says why.")


@contextmanager
def among_peers() -> Iterator[None]:
    """Turn what the process group says of a rank that has gone into one sentence. Raises PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if not says_gone(error):
            raise
        raise PeerLost(
            f"another student rank, or its node, has gone ({str(error).splitlines()[0][:120]}). Its own line says why, "
            "if it left one; the same command goes on from the last checkpoint."
        ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _refuse_taken_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RunError(
                f"launch: port {port} is taken on {socket.gethostname()}, so the students cannot meet. "
                f"Start with another, as `deepspeed --master_port {port + 1} ...`."
            ) from error
