"""`deltakd cache`: write what the frozen models say of a recipe's micro-batches, once, so that training asks nobody."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from deltakd.base.errors import RunError, TeacherError
from deltakd.base.processes import use_threads
from deltakd.base.ranks import Placement, assign_role
from deltakd.data.packing import PackedBatch
from deltakd.engine.protocol import device_name
from deltakd.losses.settings import needed_references
from deltakd.recipe.build import frozen_facts, planned, terms
from deltakd.recipe.checks import check_recipe
from deltakd.recipe.inputs import Inputs, read_examples, read_inputs
from deltakd.recipe.load import load
from deltakd.recipe.paths import check_paths
from deltakd.recipe.split import open_frozen
from deltakd.teacher.cache import CacheWriter, Key, cache_folder, record_key
from deltakd.teacher.payloads import hidden_size
from deltakd.teacher.references import asked_names

Asked = tuple[Key, PackedBatch, float, int]  # a payload's key, its batch, the target's alpha, its size in bytes


def cache(name: str, overrides: Sequence[str], stage: str | None, num_students: int) -> None:
    """Write every payload of a recipe's training that is not there yet, after saying how much that is.

    Raises RunError if the disk cannot hold it, TeacherError if a number is not finite.
    """
    loaded = load(name, overrides, stage)
    recipe = loaded.recipe
    check_recipe(recipe, loaded.where)
    check_paths(recipe, loaded.where, name)
    if not needed_references(recipe.objective):
        raise RunError(f"{loaded.where('objective')}: no frozen model is asked. There is nothing to cache.")
    use_threads()
    inputs = read_inputs(recipe, loaded.where)
    identities = {role: facts.identity for role, facts in frozen_facts(inputs).items()}
    folder, about = cache_folder(Path(recipe.root), terms(inputs, ""), identities)
    with CacheWriter(folder, about) as writer:
        for damaged in writer.damaged:
            print(damaged, file=sys.stderr, flush=True)
        # The same payload may be asked for twice: in an epoch that has only one order.
        wanted = {key: size for key, _, _, size in _asked(inputs, num_students)}
        missing = {key: size for key, size in wanted.items() if key not in writer.records}
        to_write = sum(missing.values())
        free = shutil.disk_usage(folder).free
        print(
            f"{folder}: {inputs.why}; {len(wanted):,} payloads, {len(wanted) - len(missing):,} are there, "
            f"{to_write:,} bytes to write, {free / 2**20:,.0f} MiB are free",
            flush=True,
        )
        if to_write > free:
            raise RunError(
                f"{folder}: {to_write / 2**30:,.2f} GiB do not fit into the {free / 2**30:,.2f} GiB that are free. "
                "Write root=... on a larger disk, references.payload=top_k, or fewer train.steps."
            )
        if missing:
            _write(inputs, writer, missing, _asked(inputs, num_students))
    print(f"{folder}: complete; train with references.from=cache", flush=True)


def _asked(inputs: Inputs, num_students: int) -> Iterator[Asked]:
    recipe, spec, facts = inputs.recipe, inputs.spec, frozen_facts(inputs)
    examples = read_examples(recipe, inputs.tokenizer, progress=True)
    for rank in range(num_students):
        role = assign_role(Placement(rank, num_students, rank, num_students), 0)
        for batch, alpha in planned(inputs, examples, role):
            for name in asked_names(spec, facts) if batch.asks else []:
                size = spec.num_bytes(batch.num_supervised, hidden_size(name, facts))
                yield record_key(name, batch, alpha, spec), batch, alpha, size


def _write(inputs: Inputs, writer: CacheWriter, missing: dict[Key, int], asked: Iterator[Asked]) -> None:
    device = device_name(0)
    console = Console(stderr=True)
    columns = (TextColumn("payloads"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    with open_frozen(inputs, "of the cache", device, frozenset(inputs.frozen)) as frozen, progress as bar:
        task = bar.add_task("payloads", total=len(missing))
        for key, batch, alpha, _ in asked:
            if missing.pop(key, None) is None:
                continue
            bar.advance(task)
            name, digest, _ = key
            try:
                writer.write(key, frozen.fill(name, batch.to(device), alpha, bytes.fromhex(digest), _zeros))
            except TeacherError as error:
                raise TeacherError(f"{name}: {error}") from error


def _zeros(num_bytes: int) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)  # so that the gaps between arrays have one checksum
