"""The run directory: everything a run leaves for its reader, written so that nothing in it is ever half there.

recipe.yaml      the resolved recipe            run.json        commit, versions, machine
processes.jsonl  who ran, with what             steps.jsonl     one line per optimizer step
checkpoints/     where it goes on from          resumed.jsonl   a line each time that it did
models/          models of checkpoints          attempts.jsonl  a line for every life that a job gave it
validation.jsonl, samples.jsonl, best/          what held-out rows say while it trains, and its best weights
export/          a Hugging Face folder          finished.json   written last: the run's success, and nothing else is
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import yaml

from deltakd.base.errors import RunError
from deltakd.base.files import put_in_place, remove, write_json, write_text
from deltakd.base.machine import machine_facts, timestamp
from deltakd.base.processes import resident_bytes

FINISHED = "finished.json"
GLANCES, LOOK_S = 3, 0.1
MODELS = "models"
SERVICE = "service"  # folder in which teachers from elsewhere find the students
STATUS = "status"  # folder in which every student rank shows how its teachers do
BEST_STEP = "validated.json"  # in `best`: of which step it is
ROLLOUTS = "rollouts.jsonl"  # what a student that writes its own batches has written, and how fast
VALIDATIONS = ("validation.jsonl", "samples.jsonl")
BY_STEP = ("steps.jsonl", *VALIDATIONS, ROLLOUTS)
# Parts of a recipe that a finished training does not depend on, and those that may change while it is stopped.
FREE = frozenset({"pipeline", "evaluation", "generation", "records", "checkpoints", "engine.meet_s", "teachers.host"})
CHANGEABLE = FREE | {"teachers", "references.from", "train.steps", "train.gradient_checkpointing", "validation"}
CHANGEABLE |= {"train.tokens_per_micro_batch", "train.examples_per_micro_batch"}


def _that_writes(method: Callable[..., None]) -> Callable[..., None]:
    """Turn what a full or read-only disk says into one sentence."""

    @wraps(method)
    def writing(run: "RunDirectory", *arguments: Any) -> None:
        try:
            method(run, *arguments)
        except OSError as error:
            raise RunError(
                f"{run.path}: cannot be written ({error.strerror}). Free space or rights and start the same "
                "command again."
            ) from error

    return writing


class RunDirectory:
    """One run's folder. Any process may append records; only the student of rank 0 holds the claim on it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def export(self) -> Path:
        """Where the trained model lies, as a normal Hugging Face folder."""
        return self.path / "export"

    @property
    def best(self) -> Path:
        """Where the weights of the best validation lie, as such a folder."""
        return self.path / "best"

    @property
    def best_step(self) -> int:
        """The step whose weights lie in `best`; 0 if none does."""
        try:
            return int(json.loads((self.best / BEST_STEP).read_text())["step"])
        except (OSError, ValueError, KeyError):
            return 0

    def export_best(self) -> None:
        """Let the run's model be that of its best validation. Raises RunError if it cannot be written."""
        part = self.export.with_name("export.part")
        try:
            remove(part)
            shutil.copytree(self.best, part, ignore=shutil.ignore_patterns(BEST_STEP))
            put_in_place(part, self.export)
        except (OSError, shutil.Error) as error:
            raise RunError(
                f"{self.export}: cannot be written ({str(error)[:160]}). Free space or rights and start the same "
                "command again: it goes on from its last checkpoint."
            ) from error

    @contextmanager
    def claim(self, patience_s: float = 0.0) -> Iterator[None]:
        """Hold the directory for this process; raises RunError if a live run has it or it cannot be written."""
        lock = self._open_lock()
        try:
            try:
                _take(lock, patience_s)
            except BlockingIOError:
                holder = os.pread(lock, 4096, 0).decode(errors="replace").strip() or "an unknown process"
                raise RunError(
                    f"{self.path}: in use by a live run ({holder}). Wait for it, end it, or write another run=... or "
                    "root=..."
                ) from None
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield
        finally:
            os.close(lock)

    def _open_lock(self) -> int:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except (OSError, ValueError) as error:  # ValueError: a name that holds a null byte
            raise RunError(
                f"{self.path}: cannot be written ({getattr(error, 'strerror', error)}). "
                "Write root=... with a folder that can."
            ) from error

    @_that_writes
    def start(self, recipe_text: str, facts: Mapping[str, Any]) -> None:
        """Clear what an unfinished run left and write who runs now, and by which recipe."""
        for name in (
            *BY_STEP,
            "processes.jsonl",
            "resumed.jsonl",
            "tensorboard",
            "best",
            MODELS,
            "export",
            "export.part",
        ):
            remove(self.path / name)
        write_text(self.path / "recipe.yaml", recipe_text)
        write_json(self.path / "run.json", {**machine_facts(), **facts})

    @_that_writes
    def go_on(self, recipe_text: str, step: int, validated: int) -> None:
        """Take back what was written after a checkpoint's step, and note that the run goes on from there.

        `validated` is the last step of which the checkpoint knows a validation: one after the same step comes again.
        """
        for name in BY_STEP:
            self._take_back(self.path / name, validated if name in VALIDATIONS else step)
        for folder in (self.path / MODELS).glob("step-*"):
            number = folder.name.removeprefix("step-")
            if not number.isdecimal() or int(number) > step:
                remove(folder)
        remove(self.path / FINISHED)  # what it exported stays until there is something better
        write_text(self.path / "recipe.yaml", recipe_text)
        self.append("resumed.jsonl", {"step": step, **machine_facts()})

    def _take_back(self, path: Path, step: int) -> None:
        if not path.exists():
            return
        kept = []
        for number, text in enumerate(path.read_text().splitlines(), start=1):
            try:
                if json.loads(text)["step"] <= step:
                    kept.append(text + "\n")
            except (ValueError, KeyError, TypeError):
                print(f"{path}: line {number} is no record, left out", flush=True)
        write_text(path, "".join(kept))

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one line to a .jsonl file; a single write, so lines of several processes never mix."""
        line = json.dumps(record) + "\n"
        try:
            with (self.path / name).open("ab", buffering=0) as file:
                written = file.write(line.encode())
                if written != len(line.encode()):  # a disk that is just full
                    file.truncate(file.tell() - written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RunError(
                f"{self.path / name}: cannot be written ({error.strerror}). Free space or rights and start the same "
                "command again: it goes on from its last checkpoint."
            ) from error

    def record_process(
        self, role: str, rank: int, device: str, models: Sequence[str], heads: Sequence[str] = ()
    ) -> None:
        """Write down that this process takes part, and what it holds."""
        facts = {"pid": os.getpid(), "role": role, "rank": rank, "host": socket.gethostname(), "device": device}
        held = {"models": list(models), "heads": list(heads), "memory_bytes": resident_bytes()}
        self.append("processes.jsonl", facts | held)

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Read a .jsonl file whole; a line that is still being written is left out."""
        path = self.path / name
        if not path.exists():
            return []
        lines = []
        for line in path.read_text().splitlines(keepends=True):
            with suppress(ValueError):  # torn by a node that died
                if line.endswith("\n"):
                    lines.append(json.loads(line))
        return lines

    def last_line(self, name: str) -> dict[str, Any] | None:
        """Read the last whole line of a .jsonl file; costs the same however long the file is."""
        try:
            with (self.path / name).open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 2**16))
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return None
        return dict(json.loads(whole.rpartition(b"\n")[2])) if whole else None

    def is_live(self) -> bool:
        """Tell whether a process holds the claim on this directory, as far as this node can see."""
        try:
            lock = os.open(self.path / ".lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    @_that_writes
    def finish(self, facts: Mapping[str, Any]) -> None:
        """Mark the run as successful."""
        write_json(self.path / FINISHED, {"finished": timestamp(), **facts})

    def finished(self) -> dict[str, Any] | None:
        """Return what `finish` wrote, or None."""
        path = self.path / FINISHED
        try:
            facts = dict(json.loads(path.read_text()))
            if "inputs" in facts and not isinstance(facts.get("steps"), int):
                raise ValueError("no number of steps")
            return facts
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise RunError(f"{path}: not what a run writes ({error}). Remove the folder {self.path}.") from error

    def changes(
        self, recipe_text: str, free: Set[str] = FREE, complete: Callable[[Any], Any] = lambda tree: tree
    ) -> list[str]:
        """List what differs between this directory's recipe and another outside `free`, as `key: old, now new`.

        `complete` adds to a recipe's tree what an older version did not know of.
        """
        path = self.path / "recipe.yaml"
        try:
            old = _flat(complete(yaml.safe_load(path.read_text())))
        except (OSError, yaml.YAMLError) as error:
            raise RunError(
                f"{path}: cannot be read ({type(error).__name__}), so nobody knows what lies here. Put it back, "
                "or write run=... with another name."
            ) from error
        new = _flat(yaml.safe_load(recipe_text))
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key) and not free & set(_prefixes(key))]
        return [f"{key}: {old.get(key)}, now {new.get(key)}" for key in keys]


def _take(lock: int, patience_s: float) -> None:
    """Lock a file for this process alone; raises BlockingIOError if another has it for longer than a moment."""
    for _ in range(GLANCES + int(patience_s / LOOK_S)):
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # perhaps only somebody who looks whether the run is live
            time.sleep(LOOK_S)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
