"""Where the students meet: one torch.distributed group, whichever engine shards over it."""

import os
import socket
from collections.abc import Callable

import torch
import torch.distributed

from deltakd.base.errors import RunError
from deltakd.base.ranks import Role, TorchWorld
from deltakd.engine.protocol import device_name


def join_students(role: Role) -> TorchWorld:
    """Join the students' process group: teachers are launched with us but never belong to it.

    Raises RunError if the rendezvous port is taken.
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
    try:
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    except torch.distributed.DistNetworkError as error:
        raise RunError(
            f"launch: the students cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({str(error).splitlines()[0][:120]}). Start with another port, as `deepspeed --master_port PORT ...`."
        ) from error
    return TorchWorld(device)


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
        raise RunError("another student rank cannot go on. Its own line says why.")


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
