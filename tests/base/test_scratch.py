"""A run's folder in shared memory lives as long as one of its processes, whatever ends them."""

import os
import subprocess
import sys
import time

from deltakd.base.scratch import ABANDONED_S, PREFIX, Scratch, sweep

HOLD = """
import sys, pathlib
from deltakd.base.scratch import Scratch
with Scratch(pathlib.Path(sys.argv[1]), "run") as scratch:
    (scratch.path / str(len(list(scratch.path.iterdir())))).touch()
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def gone(path) -> bool:
    end = time.monotonic() + 60
    while path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return not path.exists()


def test_the_folder_goes_with_its_last_process_even_if_all_are_killed(tmp_path):
    first, second = hold(tmp_path), hold(tmp_path)
    path = tmp_path / f"{PREFIX}run"
    assert path.stat().st_mode & 0o777 == 0o700
    first.kill()
    first.wait()
    assert sweep(tmp_path) == [] and path.exists()
    second.kill()
    second.wait()
    assert gone(path)


def test_a_folder_that_nobody_holds_is_swept_at_the_next_start(tmp_path):
    """As left behind by a node whose janitor was killed as well."""
    left = tmp_path / f"{PREFIX}dead"
    left.mkdir()
    (left / "lock").touch()
    (left / "arena-0").write_bytes(b"x" * 4096)
    with Scratch(tmp_path, "next") as scratch:
        assert not left.exists() and scratch.path.exists()
    assert gone(scratch.path)


def test_a_folder_whose_lock_was_never_made_is_swept_once_it_cannot_be_a_start_any_more(tmp_path):
    new, old = tmp_path / f"{PREFIX}new", tmp_path / f"{PREFIX}old"
    for path in (new, old):
        path.mkdir()
        (path / "arena-0").write_bytes(b"x" * 4096)
    past = time.time() - 2 * ABANDONED_S
    os.utime(old, (past, past))
    assert sweep(tmp_path) == [old] and not old.exists() and (new / "arena-0").exists()
