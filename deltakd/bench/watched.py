"""A run of the command line, watched from outside: how much memory and processor time all its processes take."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deltakd.base.errors import RunError

EVERY_S = 0.2
WARM_UP = 4  # steps that are not counted; as many as one loading of `one_by_one` serves


@dataclass(frozen=True)
class Watched:
    """What a run's steps took. Memory is the most that all processes together had resident, in bytes."""

    steps: Sequence[dict[str, Any]]
    seconds: float  # of the whole command, loading included
    peak_bytes: int
    cores: float  # processor seconds a second, over the whole command
    device_bytes: int

    @property
    def counted(self) -> Sequence[dict[str, Any]]:
        """The steps after warming up."""
        return self.steps[WARM_UP:]

    def total(self, name: str) -> float:
        """Return the sum of a number over the counted steps."""
        return float(sum(step[name] for step in self.counted))


def watch(command: Sequence[str], steps_file: Path, log: Path) -> Watched:
    """Run a command to its end and read the steps that it wrote. Raises RunError, with its last line, if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with log.open("wb") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        peak = _Peak(child.pid)
        try:
            code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        finally:
            peak.stop()
    seconds = time.perf_counter() - started
    if code:
        last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"{' '.join(command[1:5])} ...: ended with {code} ({last[:200]}). See {log}.")
    steps = [json.loads(line) for line in steps_file.read_text().splitlines()]
    return Watched(steps, seconds, peak.bytes, peak.processor_s / seconds, peak.device_bytes)


def trainer(recipe: Path, run: str, overrides: Sequence[str]) -> list[str]:
    """Return the command that trains, as a user types it."""
    return [sys.executable, "-m", "deltakd", "train", str(recipe), f"run={run}", *overrides]


class _Peak(threading.Thread):
    """Looks at a process and everything below it, now and then."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root, self._done = psutil.Process(pid), threading.Event()
        self._spent: dict[int, float] = {}
        self.bytes = self.device_bytes = 0
        self.start()

    @property
    def processor_s(self) -> float:
        """Processor seconds of all processes that were ever seen."""
        return sum(self._spent.values())

    def run(self) -> None:
        while not self._done.wait(EVERY_S):
            resident = 0
            with suppress(psutil.Error):
                for process in [self._root, *self._root.children(recursive=True)]:
                    with suppress(psutil.Error):
                        resident += process.memory_info().rss
                        times = process.cpu_times()
                        self._spent[process.pid] = times.user + times.system
            self.bytes = max(self.bytes, resident)
            self.device_bytes = max(self.device_bytes, _device_bytes())

    def stop(self) -> None:
        self._done.set()
        self.join()


def _device_bytes() -> int:
    """Return what is in use of the accelerator, by whomever; 0 where there is none."""
    import torch

    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free
