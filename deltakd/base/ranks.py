"""Who a process is: its place among the launched processes, its role in the run, and the world of the students.

Launchers (deepspeed, torchrun, srun) say where a process stands; `assign_role` decides from that alone who trains and
who serves, so every rank comes to the same answer without a message. Teachers never join the students' world.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from deltakd.base.errors import RunError

T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """Where the launcher put this process. A process that no launcher started is alone: rank 0 of 1."""

    rank: int
    num_ranks: int
    local_rank: int
    num_local_ranks: int

    @property
    def node(self) -> int:
        """Index of this process's node; launchers number ranks node by node."""
        return self.rank // self.num_local_ranks

    @property
    def num_nodes(self) -> int:
        """Nodes of the launch."""
        return self.num_ranks // self.num_local_ranks


def read_placement(environ: Mapping[str, str]) -> Placement:
    """Read the placement that deepspeed, torchrun or srun wrote into the environment."""

    def first(default: int, *names: str) -> int:
        name = next((name for name in names if name in environ), None)
        if name is None:
            return default
        if not environ[name].isdecimal():
            raise RunError(f"launch: {name}={environ[name]!r} is no number. Start with deepspeed, torchrun or srun.")
        return int(environ[name])

    num_ranks = first(1, "WORLD_SIZE", "SLURM_NTASKS")
    placement = Placement(
        rank=first(0, "RANK", "SLURM_PROCID"),
        num_ranks=num_ranks,
        local_rank=first(0, "LOCAL_RANK", "SLURM_LOCALID"),
        num_local_ranks=first(num_ranks, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"),
    )
    if not placement.num_local_ranks or placement.num_ranks % placement.num_local_ranks:
        raise RunError(
            f"launch: {placement.num_ranks} processes do not split over nodes of {placement.num_local_ranks}. "
            "Start the same number of processes on every node."
        )
    return placement


PLACEMENT = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "CROSS_", "GROUP_", "ROLE_", "TORCHELASTIC_")


def forget_placement(environ: MutableMapping[str, str]) -> None:
    """Remove what a launcher wrote of this process's place, for a process group that is none of the launcher's."""
    for name in [name for name in environ if name.startswith(PLACEMENT)]:
        del environ[name]


@dataclass(frozen=True)
class Role:
    """What a process does: `rank` counts students over all nodes, or teachers within the node."""

    kind: Literal["student", "teacher"]
    rank: int
    num_students: int
    local_index: int
    num_local_students: int
    num_local_teachers: int
    teachers_beside: bool  # the students start the teachers themselves: one process has one accelerator


def assign_role(placement: Placement, teachers_per_node: int, external_teachers: bool = False) -> Role:
    """Give the last `teachers_per_node` local ranks of a node to teachers and the others to students.

    A node with a single process has no rank to spare: its student starts one teacher beside itself, on the same device.
    With `teachers_per_node` 0, or with teachers that are started elsewhere, everyone trains. Raises RunError if no
    student would be left.
    """
    local = placement.num_local_ranks
    if teachers_per_node == 0 or external_teachers:
        return Role(
            "student", placement.rank, placement.num_ranks, placement.local_rank, local, teachers_per_node, False
        )
    if local == 1:
        return Role("student", placement.rank, placement.num_ranks, placement.local_rank, local, 1, True)
    num_local_students = local - teachers_per_node
    if num_local_students < 1:
        raise RunError(
            f"teachers.per_node: {teachers_per_node} teachers leave no student among {local} processes of a node. "
            f"Start at least {teachers_per_node + 1} processes or write a smaller number."
        )
    num_students = num_local_students * placement.num_nodes
    is_student = placement.local_rank < num_local_students
    index = placement.local_rank if is_student else placement.local_rank - num_local_students
    rank = placement.node * num_local_students + index if is_student else index
    kind: Literal["student", "teacher"] = "student" if is_student else "teacher"
    return Role(kind, rank, num_students, index, num_local_students, teachers_per_node, False)


_GONE = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "pair closure",
    "NCCL communicator was aborted",
    "ncclRemoteError",
)


def says_gone(error: Exception) -> bool:
    """Tell whether a collective failed because another rank has gone."""
    return any(words in str(error) for words in _GONE)


class World(Protocol):
    """The students of a run, as far as the loop needs them."""

    rank: int
    size: int

    def sum(self, values: list[float]) -> list[float]:
        """Add values over all ranks, in float64."""

    def any(self, flag: bool) -> bool:
        """Tell every rank whether the flag is set on one of them."""

    def gather(self, values: T) -> list[T]:
        """Return every rank's values, on every rank."""

    def barrier(self) -> None:
        """Wait for every rank."""


class SoloWorld:
    """A world of one: nothing to add, nobody to wait for."""

    rank = 0
    size = 1

    def sum(self, values: list[float]) -> list[float]:
        return values

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, values: T) -> list[T]:
        return [values]

    def barrier(self) -> None:
        return None


class TorchWorld:
    """The default torch.distributed group, which the engine has set up."""

    def __init__(self, device: str) -> None:
        import torch.distributed

        self._distributed = torch.distributed
        self._device = device
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def sum(self, values: list[float]) -> list[float]:
        import torch

        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        self._distributed.all_reduce(total)
        return list(total.tolist())

    def any(self, flag: bool) -> bool:
        return self.sum([float(flag)])[0] > 0

    def gather(self, values: T) -> list[T]:
        told: list[Any] = [None] * self.size
        self._distributed.all_gather_object(told, values)
        return told

    def barrier(self) -> None:
        self._distributed.barrier()
