"""A teacher's models, in its own process or split over several: what serving and writing a cache have in common."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deltakd.base.errors import RunError
from deltakd.losses.objectives import objective
from deltakd.models.settings import role_key
from deltakd.recipe.build import build_frozen
from deltakd.recipe.inputs import Inputs
from deltakd.teacher.payloads import FrozenModels
from deltakd.teacher.shards import Job, ShardGroup


@contextmanager
def open_frozen(inputs: Inputs, name: str, device: str, names: frozenset[str]) -> Iterator[FrozenModels]:
    """Yield a teacher's models: here alone, or split over as many processes as the recipe says, which this one leads.

    Raises RunError if there are not as many GPUs.
    """
    recipe, teachers = inputs.recipe, inputs.recipe.teachers
    if teachers.tensor_parallel == 1:
        yield build_frozen(inputs, device, names)
        return
    folders: dict[str, str] = {}
    weights = {}
    for role, facts_ in inputs.frozen.items():
        if role in names:
            folder = folders.setdefault(facts_.identity, facts_.weights)
            weights[role] = (inputs.where(f"{role_key(role)}.weights"), folder)
    devices = _consecutive(device, teachers.tensor_parallel)
    job = Job(
        recipe.models.model_dump(mode="json"),
        weights,
        inputs.spec.layout,
        devices,
        teachers.heartbeat_s,
        teachers.start_s,
    )
    with ShardGroup(job, name, teachers.silent_s, teachers.answer_s) as group:
        yield FrozenModels(group.load(), inputs.spec, objective(recipe.objective), recipe.seed, group)


def _consecutive(device: str, count: int) -> list[str]:
    """Return the devices of a group: those that are listed, or one and those behind it; a CPU is any number."""
    listed = device.split(",")
    first, _, index = listed[0].partition(":")
    if first != "cuda":
        return [device] * count
    devices = listed if len(listed) > 1 else [f"cuda:{int(index or 0) + place}" for place in range(count)]
    there = torch.cuda.device_count()
    if len(devices) != count or any(int(one.partition(":")[2]) >= there for one in devices):
        raise RunError(
            f"teachers.tensor_parallel: {count} processes on {', '.join(devices)}, and this one sees {there} GPUs. "
            "Give each process of a node all of its GPUs, or write a smaller number."
        )
    return devices
