"""Work that several processes share out: each takes every n-th part, and the one that was asked waits for them."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deltakd.base.errors import RunError
from deltakd.recipe.pipeline import failure, launch_environment

POLL_S = 0.5


def read_share(text: str) -> tuple[int, int]:
    """Read `0/4`: which share, of how many. Raises RunError if it is none."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise RunError(f"--shard: {text} is no share. Write 0/4 for the first of four.")
    return int(index), int(count)


def local_index() -> int:
    """Return which of its node's accelerators a process that takes a share computes on."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def follow_shares(command: Sequence[str], folder: Path, num_processes: int, show: Callable[[], None]) -> None:
    """Have processes take a share each, and wait for them; `show` is called while they work.

    `command` takes a share when `--shard i/n` is added. Raises RunError with the words of one that failed or was
    killed.
    """
    logs = [folder / f"log-{index}.txt" for index in range(num_processes)]
    children = []
    try:
        for index, log in enumerate(logs):
            environment = launch_environment() | {"LOCAL_RANK": str(index), "RANK": "0"}
            with log.open("wb") as output:
                words = [*command, "--shard", f"{index}/{num_processes}"]
                children.append(
                    subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
                )
        while any(child.poll() is None for child in children):
            show()
            if any(child.poll() for child in children):
                break
            time.sleep(POLL_S)
        codes = [child.poll() for child in children]  # before we end those that are left
    finally:
        for child in children:
            child.terminate()
            child.wait()
    for log, code in zip(logs, codes, strict=True):
        if code:
            raise failure(folder.name, log, code)
