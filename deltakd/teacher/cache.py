"""Payloads on disk: frozen models and fixed data always say the same, so it can be kept and read instead of asked for.

    ROOT/cache/<key>/        key: weights, tokenizer and template, payload, and the target where the payload fixes it
        about.json           what the key stands for
        index.jsonl          one line per payload: whose, about which tokens, where it lies, its checksum
        00000.bin ...        payloads, one behind the other, up to 1 GiB a shard

A payload belongs to a micro-batch, token for token, so that reading gives the very bits that asking gives. Its bytes
are on disk before its line is; a line that is cut off, or whose bytes do not have its checksum, counts for nothing.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from deltakd.base.errors import RunError, TeacherError
from deltakd.base.files import write_json
from deltakd.losses.frozen import Reference
from deltakd.models.forward import Batch
from deltakd.teacher.messages import Terms, batch_digest
from deltakd.teacher.payloads import FrozenFacts, PayloadSpec, hidden_size, unpack_payload
from deltakd.teacher.references import AskedBatch, B, NeverShort, Payloads, asked_names, batch_bytes

SHARD_BYTES = 2**30
Key = tuple[str, str, float]  # whose payload, digest of the tokens, alpha where the payload depends on it


@dataclass(frozen=True)
class Record:
    """Where a payload lies, and the checksum of its bytes."""

    shard: int
    offset: int
    num_bytes: int
    check: str


def cache_folder(root: Path, terms: Terms, identities: Mapping[str, str]) -> tuple[Path, dict[str, object]]:
    """Return where payloads on these terms lie, and what that stands for."""
    about = {name: getattr(terms, name) for name in Terms.__struct_fields__ if name not in ("protocol", "launch")}
    stands_for = {**about, "models": dict(sorted(identities.items()))}
    text = json.dumps(stands_for, sort_keys=True)
    return root / "cache" / hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), stands_for


def find_folder(root: Path, terms: Terms, identities: Mapping[str, str]) -> tuple[Path, dict[str, object]]:
    """Return where payloads on these terms lie, or shall lie, and what that stands for.

    Where each model sends a payload of its own, a cache of more models serves as well: at alpha 0 nobody asks the raw
    models, and what the teacher says is the same.
    """
    own, about = cache_folder(root, terms, identities)
    if terms.objective or (own / "index.jsonl").exists():
        return own, about
    for path in sorted((root / "cache").glob("*/about.json")):
        other = json.loads(path.read_text())
        models = other.get("models", {})
        if {**other, "models": about["models"]} == about and identities.items() <= models.items():
            return path.parent, other
    return own, about


def record_key(name: str, batch: Batch, alpha: float, spec: PayloadSpec) -> Key:
    """Return under what a payload is kept."""
    return name, batch_digest(*batch_bytes(batch)).hex(), 0.0 if spec.keeps_models_apart else alpha


def checksum(data: Tensor) -> str:
    """Return the checksum of some bytes."""
    return hashlib.blake2b(data.numpy().data, digest_size=16).hexdigest()


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.bin"


def read_index(folder: Path) -> dict[Key, Record]:
    """Return all whole lines of an index; the last of several about one payload counts."""
    path = folder / "index.jsonl"
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            *key, shard, offset, num_bytes, check = json.loads(line)
            found[(str(key[0]), str(key[1]), float(key[2]))] = Record(shard, offset, num_bytes, check)
    return found


def read_record(folder: Path, record: Record) -> Tensor:
    """Map a payload's bytes [num_bytes]; raises TeacherError, naming the shard, if their checksum is another."""
    path = _shard(folder, record.shard)
    size = path.stat().st_size if path.exists() else 0
    if size >= record.offset + record.num_bytes:
        whole = torch.from_file(str(path), size=size, dtype=torch.uint8)
        data = whole[record.offset : record.offset + record.num_bytes]
        if checksum(data) == record.check:
            return data
    raise TeacherError(
        f"{path}: {record.num_bytes:,} bytes at {record.offset:,} are not those that were written. "
        "Run `deltakd cache` again: it makes them anew."
    )


class CacheWriter:
    """Adds payloads to a cache; use with `with`. One at a time: a second one is refused."""

    def __init__(self, folder: Path, about: Mapping[str, object]) -> None:
        """Open or make the cache. Raises RunError if another process writes to it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise RunError(f"{folder}: another process writes to it. Wait for it, or end it.") from None
        write_json(folder / "about.json", about)
        self.records = read_index(folder)
        self.damaged: list[str] = []
        for key, record in list(self.records.items()):
            try:
                read_record(folder, record)
            except TeacherError as error:
                self.damaged.append(str(error))
                del self.records[key]
        self._cut_unfinished_line()
        # What lies behind the last record of a shard was being written when a writer was killed: begin a new shard.
        self._number = len(list(folder.glob("*.bin")))
        self._file = _shard(folder, self._number).open("wb")
        self._index = (folder / "index.jsonl").open("ab", buffering=0)

    def _cut_unfinished_line(self) -> None:
        path = self._folder / "index.jsonl"
        if path.exists():
            data = path.read_bytes()
            os.truncate(path, data.rfind(b"\n") + 1)

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_empty = self._file.tell() == 0
        self._file.close()
        if is_empty:
            _shard(self._folder, self._number).unlink()
        self._index.close()
        os.close(self._lock)

    def write(self, key: Key, data: Tensor) -> None:
        """Add one payload's bytes. Raises RunError if the disk cannot hold them."""
        if self._file.tell() and self._file.tell() + len(data) > SHARD_BYTES:
            self._file.close()
            self._number += 1
            self._file = _shard(self._folder, self._number).open("wb")
        record = Record(self._number, self._file.tell(), len(data), checksum(data))
        try:
            self._file.write(data.numpy().data)
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self._folder}: {error.strerror}. Free the disk and run `deltakd cache` again.") from error
        line = [*key, record.shard, record.offset, record.num_bytes, record.check]
        self._index.write(json.dumps(line).encode() + b"\n")
        self.records[key] = record


class CachedReferences(NeverShort):
    """References that were written before; no frozen model is loaded."""

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, FrozenFacts],
        heads: Mapping[str, Tensor],
        spec: PayloadSpec,
        device: str = "cpu",
    ) -> None:
        """Read the index. Raises TeacherError if there is none."""
        self._folder, self._models, self._heads, self._spec, self._device = folder, models, heads, spec, device
        self._records = read_index(folder)
        if not self._records:
            raise TeacherError(f"{folder}: no payloads. Run `deltakd cache` with this recipe first.")

    def refuse_missing(self, batches: Iterable[tuple[AskedBatch, float]]) -> None:
        """Raise TeacherError if one of these batches has no payload."""
        for batch, alpha in batches:
            for name in asked_names(self._spec, self._models) if batch.asks else []:
                self._find(name, batch, alpha)

    def ahead(self, batches: Iterable[tuple[B, float] | None]) -> Iterator[tuple[B, Payloads]]:
        """Yield each batch with its payloads, checked by their checksums as they are read."""
        names = asked_names(self._spec, self._models)
        for batch, alpha in filter(None, batches):
            yield batch, {name: self._read(name, batch, alpha) for name in names} if batch.asks else {}

    def _find(self, name: str, batch: Batch, alpha: float) -> Record:
        record = self._records.get(record_key(name, batch, alpha, self._spec))
        if record is None:
            raise TeacherError(
                f"{self._folder}: nothing of {name} about a micro-batch of {len(batch.tokens):,} tokens. Run `deltakd "
                "cache` with this recipe and as many --students as train: micro-batches depend on both."
            )
        return record

    def _read(self, name: str, batch: Batch, alpha: float) -> Reference:
        data = read_record(self._folder, self._find(name, batch, alpha))
        width = hidden_size(name, self._models)
        return unpack_payload(data, self._spec, len(batch.supervised), width, self._heads.get(name), self._device)
