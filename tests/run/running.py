"""Runs in the background and what their directories say, for tests of whole runs."""

import json
import os
import subprocess
import time
from contextlib import suppress

import psutil
from safetensors.torch import load_file

ZERO_3 = "engine={name: deepspeed, zero_stage: 3}"
LOSSES = ("loss", "cross_entropy", "divergence", "grad_norm")
DEADLINE_S = 240


def curve(steps):
    """Return the numbers of a run that two ways must share."""
    return [[step[name] for name in LOSSES] for step in steps]


def same_weights(lab, one, other) -> bool:
    """Tell whether two runs have exported the same weights, bit for bit."""
    first, second = (load_file(lab.folder / "runs" / run / "export" / "model.safetensors") for run in (one, other))
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


class Running:
    """A run in the background, its teachers and its steps as they stand."""

    def __init__(self, lab, name, *overrides, ranks=None, launcher="local.sh"):
        self.lab, self.name = lab, name
        self.directory = lab.folder / "runs" / name
        self.log = lab.folder / f"{name}.log"
        command = lab.command(f"run={name}", *overrides, ranks=ranks, launcher=launcher)
        with self.log.open("wb") as output:
            self.launcher = subprocess.Popen(
                command, cwd=lab.folder, env=lab.environment(), stdout=output, stderr=subprocess.STDOUT
            )

    def lines(self, file):
        return self.lab.lines(self.name, file) if (self.directory / file).exists() else []

    def reaches(self, step):
        """Wait for a step; fail if the run ends before."""
        wait_until(lambda: len(self.lines("steps.jsonl")) >= step or self.launcher.poll() is not None, f"step {step}")
        assert self.launcher.poll() is None, self.log.read_text()[-3000:]

    def teachers(self, alive=True):
        """Return the pids of its teachers in the order in which they came."""
        return self._pids(lambda line: not line.get("shard"), alive)

    def workers(self, alive=True):
        """Return the pids of the other processes of teachers that are split, in the order in which they came."""
        return self._pids(lambda line: line.get("shard"), alive)

    def _pids(self, wanted, alive):
        lines = [line for line in self.lines("processes.jsonl") if line["role"] == "teacher"]
        pids = [line["pid"] for line in lines if wanted(line)]
        return [pid for pid in pids if not alive or psutil.pid_exists(pid)]

    def has_had_teachers(self, count):
        """Wait until so many have come."""
        wait_until(lambda: len(self.teachers(alive=False)) >= count, f"{count} teachers")

    def said(self):
        """Return the sentences that its ranks ended with."""
        return [line for line in self.log.read_text().splitlines() if line.startswith("deltakd: ")]

    def status(self):
        """Return what the student rank last said of its teachers."""
        return json.loads((self.directory / "status" / "student-0.json").read_text())

    def family(self):
        """Return the launcher and everything that it has started."""
        launcher = psutil.Process(self.launcher.pid)
        return [launcher, *launcher.children(recursive=True)]

    def is_sent(self, number, *pids):
        """Send a signal to some of its processes, or to the launcher; return its exit code when all are gone."""
        family = self.family()
        for pid in pids or [self.launcher.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        code = self.launcher.wait(DEADLINE_S)
        _, alive = psutil.wait_procs(family, timeout=DEADLINE_S)
        assert not alive, [cmdline(process) for process in alive]
        return code

    def ends(self):
        """Wait for its end and return its curve."""
        assert self.launcher.wait(DEADLINE_S) == 0, self.log.read_text()[-3000:]
        return curve(self.lines("steps.jsonl"))
