"""Files and folders that are whole or not there, whatever comes while they are written: kills, full disks, no power."""

import glob
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ABANDONED_S = 3600.0  # after which a part of a file belongs to a writer that was killed


def write_text(path: Path, text: str, lasting: bool = True) -> None:
    """Write a file beside its name and rename it, so that a reader or a crash never sees half of it.

    Of two processes that write it at once the last one's stays. One that is not `lasting` costs no wait for the disk,
    and may be empty after a loss of power.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        with suppress(FileNotFoundError):  # its writer has just renamed it
            if time.time() - left.stat().st_mtime > ABANDONED_S:
                left.unlink()
    part.write_text(text)
    if lasting:
        settle(part)
    part.replace(path)


def write_json(path: Path, value: Any, lasting: bool = True) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n", lasting)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_in_place(part: Path, folder: Path) -> None:
    """Rename a whole folder to its place; what lay there is gone only when it stands."""
    for path in (*part.rglob("*"), part):
        settle(path)
    old = folder.with_name(folder.name + ".old")
    remove(old)
    if folder.exists():
        folder.replace(old)
    part.replace(folder)
    settle(folder.parent)
    remove(old)


def settle(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder: a rename must not reach it before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # there are file systems that cannot promise it of a folder
            raise
    finally:
        os.close(descriptor)
