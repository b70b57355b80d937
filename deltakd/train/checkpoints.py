"""Checkpoints: what a run needs to go on as if it had never been stopped, whole or not there at all.

    checkpoints/step-00000120/        after 120 steps
        engine/                       weights and optimizer, as the engine writes them; every rank its share
        random-<rank>.safetensors     the state of each rank's random numbers
        rollouts.safetensors          what the student has written and not trained on yet, where it writes
        progress.json                 the step, tokens so far, what alpha depends on, and what the run was
        sums-<rank>.json              a checksum of every file; each rank sums a share of them

It is written under `.part` and renamed when all ranks are done, so a kill or a full disk costs at most the one that is
being written. Where the data stands is the step's number alone (data/stream.py).
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deltakd.base.errors import PeerLost, RunError
from deltakd.base.files import put_in_place, remove, write_json
from deltakd.base.ranks import World, says_gone
from deltakd.base.rundir import MODELS
from deltakd.data.packing import PackedBatch
from deltakd.engine.protocol import Engine
from deltakd.losses.schedules import Alpha
from deltakd.rollout.stream import Rollouts
from deltakd.train.settings import CheckpointsSettings
from deltakd.train.validation import Validation

FOLDER = "checkpoints"
FAULTY = "faulty"  # micro-batches of a step whose loss or gradient was not finite
ROLLOUTS = "rollouts.safetensors"
_PREFIX = "step-"
_READ = 2**20


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint that lies on the disk."""

    folder: Path
    step: int
    alpha: Mapping[str, float | None]
    num_tokens: int
    num_supervised: int
    facts: Mapping[str, Any]  # what the run was: ranks, engine, models
    validation: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Checkpoints:
    """Keeps a run's state; every student rank makes one and calls it in step with the others."""

    directory: Path  # the run's
    settings: CheckpointsSettings
    world: World
    engine: Engine
    alpha: Alpha
    facts: Mapping[str, Any]
    validation: Validation | None = None
    keep_model: Callable[[Path], None] | None = None  # writes it as a Hugging Face folder
    written: Rollouts | None = None
    num_tokens: int = 0
    num_supervised: int = 0
    _newest: int = field(default=0, init=False)

    def restore(self, saved: Saved) -> None:
        """Go on from a checkpoint, on the ranks that wrote it or on others."""
        self.engine.load_state(saved.folder / "engine")
        own = saved.folder / f"random-{self.world.rank}.safetensors"
        if own.exists():  # more ranks than before: theirs begin with the seed's
            _set_random(load_file(own))
        self.alpha.restore(saved.alpha)
        if self.written is not None and (saved.folder / ROLLOUTS).exists():
            self.written.restore(load_file(saved.folder / ROLLOUTS))
        if self.validation is not None:
            self.validation.restore(saved.validation)
        self.num_tokens, self.num_supervised, self._newest = saved.num_tokens, saved.num_supervised, saved.step

    def count(self, num_tokens: int, num_supervised: int) -> None:
        """Add a step's tokens over all ranks."""
        self.num_tokens += num_tokens
        self.num_supervised += num_supervised

    def save_if_due(self, step: int, last: bool) -> None:
        """Keep the state after a step if the settings want one there; after the last one an export can still fail."""
        every = self.settings.every_steps
        if every is not None and (last or step % every == 0):
            if self.keep_model is not None:  # first: a run that goes on from the checkpoint does not come here again
                self.keep_model(self.directory / MODELS / f"{_PREFIX}{step:08}")
            self.save(step)

    def save(self, step: int) -> Path | None:
        """Keep the state after a step; returns where it lies, None where nothing is trained yet.

        Raises RunError, with the last checkpoint in place, if it cannot be written.
        """
        if not step:
            return None
        folder = _folder(self.directory, step)
        if step == self._newest:
            return folder
        part = folder.with_name(folder.name + ".part")
        try:
            self._write(part, step)
            if self.world.rank == 0:
                put_in_place(part, folder)
            self.world.barrier()
        except (OSError, RuntimeError, SafetensorError) as error:
            with suppress(OSError):
                remove(part)
            why = str(error).splitlines()[0][:160]
            gone = says_gone(error)  # in a collective that the rank with the real fault did not come to
            if gone:
                why = "another student rank has ended: its own line says why"
            kept = f"that of step {self._newest:,} is kept" if self._newest else "there is none before it"
            raise (PeerLost if gone else RunError)(
                f"{folder}: the checkpoint cannot be written ({why}); {kept}. "
                "Free space or rights and start the same command again."
            ) from error
        if self.world.rank == 0:
            self._remove_older(folder)
        self._newest = step
        return folder

    def _remove_older(self, folder: Path) -> None:
        # Newer ones are damaged, or they would have been gone on from: they count for nothing here.
        older = [path for path in _folders(self.directory) if path.name < folder.name]
        for path in older[self.settings.keep_last - 1 :]:
            try:
                remove(path)
            except OSError as error:
                print(f"{path}: cannot be removed ({error.strerror}); it stays", flush=True)

    def keep_batches(self, step: int, batches: Sequence[PackedBatch]) -> None:
        """Write this rank's micro-batches of a step that went wrong, for whoever looks into it."""
        arrays = {
            f"{index}.{name}": array for index, batch in enumerate(batches) for name, array in batch.tensors().items()
        }
        folder = self.directory / FAULTY
        folder.mkdir(exist_ok=True)
        save_file(arrays, folder / f"{_PREFIX}{step:08}-rank-{self.world.rank}.safetensors")

    def _write(self, part: Path, step: int) -> None:
        rank, size = self.world.rank, self.world.size
        if rank == 0:
            remove(part)
            (part / "engine").mkdir(parents=True)
            progress = {
                "step": step,
                "alpha": self.alpha.state(),
                "num_tokens": self.num_tokens,
                "num_supervised": self.num_supervised,
                "validation": self.validation.state() if self.validation is not None else {},
                "facts": {**self.facts, "num_ranks": size},
            }
            write_json(part / "progress.json", progress)
            if self.written is not None and (state := self.written.state(step)):
                save_file(state, part / ROLLOUTS)
        self.world.barrier()
        self.engine.save_state(part / "engine")
        save_file(_random(), part / f"random-{rank}.safetensors")
        self.world.barrier()
        mine = _files(part)[rank::size]
        self.world.barrier()  # everyone has listed them before the sums appear
        write_json(part / f"sums-{rank}.json", {str(file.relative_to(part)): _sum(file, flush=True) for file in mine})
        self.world.barrier()


def newest(directory: Path) -> tuple[Saved | None, list[str]]:
    """Return a run's newest whole checkpoint, and a sentence for each damaged one that it passed over.

    Reads every byte of it once. Raises RunError if there are some and none is whole.
    """
    passed: list[str] = []
    for folder in _folders(directory):
        damage = _damage(folder)
        if damage is None:
            return _read(folder), passed
        passed.append(f"{folder}: damaged ({damage}), passed over")
    if passed:
        raise RunError(
            f"{'; '.join(passed)}. No whole checkpoint is left: remove {directory / FOLDER} to begin with step 1."
        )
    return None, []


def agree(world: World, saved: Saved | None, directory: Path) -> Saved | None:
    """Return rank 0's choice of a checkpoint on every rank."""
    step = int(world.sum([float(saved.step) if saved is not None and world.rank == 0 else 0.0])[0])
    return _read(_folder(directory, step)) if step else None


def last_kept(directory: Path) -> tuple[int, float]:
    """Return the step of the checkpoint that a run has written last, whole or not, and when; (0, 0.0): none."""
    kept = [(folder.stat().st_mtime, int(folder.name.removeprefix(_PREFIX))) for folder in _folders(directory)]
    when, step = max(kept, default=(0.0, 0))
    return step, when


def has_some(directory: Path) -> bool:
    """Tell whether a run has kept a checkpoint, whole or not."""
    return bool(_folders(directory))


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed run was writing, or putting in another's place."""
    for ending in ("part", "old"):
        for folder in (directory / FOLDER).glob(f"{_PREFIX}*.{ending}"):
            remove(folder)


def _read(folder: Path) -> Saved:
    return Saved(folder, **json.loads((folder / "progress.json").read_text()))


def _folder(directory: Path, step: int) -> Path:
    return directory / FOLDER / f"{_PREFIX}{step:08}"


def _folders(directory: Path) -> list[Path]:
    """Return checkpoints, whole or damaged, newest first."""
    found = [path for path in (directory / FOLDER).glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, reverse=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("sums-"))


def _sum(file: Path, flush: bool = False) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as data:
        while block := data.read(_READ):
            digest.update(block)
        if flush:  # by the rank that wrote it: another node cannot
            os.fsync(data.fileno())
    return digest.hexdigest()


def _damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint; None if it is whole."""
    try:
        sums: dict[str, str] = {}
        for file in folder.glob("sums-*.json"):
            sums |= json.loads(file.read_text())
        ranks = json.loads((folder / "progress.json").read_text())["facts"]["num_ranks"]
        if len(list(folder.glob("sums-*.json"))) != ranks:
            return "checksums are missing"
        if strange := set(sums) ^ {str(file.relative_to(folder)) for file in _files(folder)}:
            return f"{min(strange)} is missing, or was never written"
        for name, expected in sums.items():
            if _sum(folder / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _random() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
