"""The lock of DeepSpeed's just-in-time builds: a killed build leaves it behind, and the next one would wait for ever.

The builder keeps the lock file open while it works. If no process of this node has it open and it is older than any
build takes, it is stale (a builder on another node with the same home directory may hold a younger one).
"""

import os
import time
from pathlib import Path

import psutil

from deltakd.base.errors import RunError

STALE_S = 180.0
OPERATION = "deepspeed_shm_comm"


def wait_for_builds() -> None:
    """Wait while another process builds DeepSpeed's communication operation; raise RunError if its lock is stale."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    while held := [lock for lock in root.glob(f"**/{OPERATION}/lock") if not _is_open(lock)]:
        age_s = max(_age_s(lock) for lock in held)
        if age_s > STALE_S:
            raise RunError(
                f"{held[0]}: a killed build of DeepSpeed left this lock {age_s / 60:.0f} minutes ago, and the next build "
                "would wait on it for ever. Remove the file."
            )
        time.sleep(0.5)


def _age_s(lock: Path) -> float:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_open(lock: Path) -> bool:
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == lock for file in process.open_files()):
                return True
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return False
