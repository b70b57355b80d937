"""`deltakd cache`: write what the frozen models say of a recipe's micro-batches, once, so that training asks nobody."""

import gc
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from deltakd.recipe.load import Loaded, load
from deltakd.recipe.paths import check_paths
from deltakd.recipe.split import open_frozen
from deltakd.teacher.cache import CacheWriter, Key, cache_folder, find_folder, record_key
from deltakd.teacher.messages import Terms
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
    cache_for([loaded], num_students)


def cache_for(several: Sequence[Loaded], num_students: int) -> list[Path]:
    """Write what is missing of the payloads of several recipes' trainings; return the folders of their caches.

    What lies in one cache is asked for together: its models are loaded once, and a payload that several trainings
    share is written once. The recipes have been checked, and share their root. Raises as `cache` does.
    """
    use_threads()
    together: dict[str, list[Inputs]] = {}
    # Those that ask most models come first: their cache serves the others too.
    for inputs in sorted((read_inputs(one.recipe, one.where) for one in several), key=lambda one: -len(one.frozen)):
        together.setdefault(cache_folder(*_stands_for(inputs))[0].name, []).append(inputs)
    folders = []
    for group in together.values():
        folder, about = find_folder(*_stands_for(group[0]))
        write_payloads(folder, about, group[0], lambda group=group: _asked_by_all(group, num_students))  # type: ignore[misc]
        folders.append(folder)
    return list(dict.fromkeys(folders))


def _stands_for(inputs: Inputs) -> tuple[Path, Terms, dict[str, str]]:
    """Return what tells a cache from others: its root, what payloads mean, and whose they are."""
    identities = {role: facts.identity for role, facts in frozen_facts(inputs).items()}
    return Path(inputs.recipe.root), terms(inputs, ""), identities


def open_cache(inputs: Inputs) -> tuple[Path, dict[str, object]]:
    """Return where the payloads of a recipe's frozen models lie, or shall lie, and what that stands for."""
    return find_folder(*_stands_for(inputs))


def write_payloads(
    folder: Path, about: dict[str, object], inputs: Inputs, asked: Callable[[], Iterator[Asked]]
) -> None:
    """Write those payloads that are asked for and not there yet, after saying how much that is; `asked` is read twice.

    Raises RunError if the disk cannot hold it, TeacherError if a number is not finite.
    """
    with CacheWriter(folder, about) as writer:
        for damaged in writer.damaged:
            print(damaged, file=sys.stderr, flush=True)
        # The same payload may be asked for twice: in an epoch that has only one order.
        wanted = {key: size for key, _, _, size in asked()}
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
            _write(inputs, writer, missing, asked())
            # Else what the models took stays this process's, and a sweep's trainings share the accelerator with it.
            gc.collect()
            torch.cuda.empty_cache()
    print(f"{folder}: complete; train with references.from=cache", flush=True)


def _asked_by_all(several: Sequence[Inputs], num_students: int) -> Iterator[Asked]:
    for inputs in several:
        yield from _asked(inputs, num_students)


def _asked(inputs: Inputs, num_students: int) -> Iterator[Asked]:
    recipe = inputs.recipe
    examples = read_examples(recipe, inputs.tokenizer, progress=True)
    for rank in range(num_students):
        role = assign_role(Placement(rank, num_students, rank, num_students), 0)
        yield from asked_about(inputs, planned(inputs, examples, role))


def asked_about(inputs: Inputs, batches: Iterable[tuple[PackedBatch, float]]) -> Iterator[Asked]:
    """Yield what frozen models are asked about some batches, each with the target's alpha."""
    spec, facts = inputs.spec, frozen_facts(inputs)
    for batch, alpha in batches:
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
