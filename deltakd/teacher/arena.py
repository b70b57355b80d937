"""A student rank's arena: equal slots for payloads in one mapped file, allocated whole at the start.

    | slot 0 | slot 1 | ... | slot n-1 |        each a multiple of 4096 bytes

A slot changes hands by message only: it is the teacher's from the Score that names it to the Scored that answers, and
the student's from then until its next Score. There are no flags in shared memory. Plain open and mmap, since
multiprocessing.shared_memory unlinks segments that another process still uses.
"""

import mmap
import os
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from deltakd.base.errors import RunError

PAGE_BYTES = 4096


def slot_bytes_for(payload_bytes: int) -> int:
    """Round a payload up to whole pages, at least one."""
    return max(1, -(-payload_bytes // PAGE_BYTES)) * PAGE_BYTES


class Arena:
    """One mapped file of slots; the owner makes and removes it, the others open it."""

    def __init__(self, path: Path, slot_bytes: int, num_slots: int, owner: bool) -> None:
        """Map the arena. Raises RunError if shared memory cannot hold it or if it is not as described."""
        self.path = path
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self._owner = owner
        size = slot_bytes * num_slots
        descriptor = _create(path, size) if owner else os.open(path, os.O_RDWR)
        try:
            if os.fstat(descriptor).st_size != size:
                raise RunError(f"{path}: {os.fstat(descriptor).st_size:,} bytes where {size:,} were said. Start again.")
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)

    def slot(self, index: int, num_bytes: int) -> Tensor:
        """Return the first bytes of a slot, as a tensor that lies in it. Raises RunError if it has not so many."""
        if not 0 <= index < self.num_slots or not 0 <= num_bytes <= self.slot_bytes:
            raise RunError(
                f"{self.path}: {num_bytes:,} bytes in slot {index} do not fit {self.num_slots} slots of "
                f"{self.slot_bytes:,}. Both ends must read the same recipe."
            )
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=num_bytes, offset=index * self.slot_bytes)

    def __enter__(self) -> "Arena":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owner:
            self.path.unlink(missing_ok=True)
        # The map itself goes with the last tensor that lies in it: closing it under one would be a crash.


def _create(path: Path, size: int) -> int:
    free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
    too_small = RunError(
        f"{path.parent}: the slots need {size / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free. Lower "
        "train.tokens_per_micro_batch or teachers.look_ahead, write references.payload=hidden, or give it more memory."
    )
    if size > free:
        raise too_small
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Pages are taken now: memory that is missing is an error here, not a SIGBUS in step 4,000.
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.close(descriptor)
        path.unlink()
        raise too_small from error
    return descriptor
