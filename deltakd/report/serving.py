"""Who took part in a run: its processes with their memory, its teachers' rates, its students' queues.

From `processes.jsonl`, a line for every start of a process, and `status/`, which each student rank writes every second.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltakd.base.rundir import STATUS
from deltakd.report.lines import read_rows

SUMS = ("answers", "tokens", "busy_ms")


@dataclass(frozen=True)
class Taking:
    """A process that took part: as often as it was started, with its memory in bytes at its last start and at most."""

    role: str
    host: str
    device: str
    models: str
    starts: int
    memory: float
    peak: float | None


@dataclass(frozen=True)
class Teacher:
    """A teacher as all student ranks together saw it."""

    name: str
    host: str
    models: str
    state: str
    answers: int
    tokens: int
    busy_s: float
    starts: int

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.busy_s if self.busy_s else None


@dataclass(frozen=True)
class Queue:
    """A student rank's own view: what was asked, came, and was waited for."""

    rank: str
    open: int
    unasked: int
    kept: int
    mebibytes: float
    waiting: float | None
    again: int
    refused: int
    work: Mapping[str, float]  # seconds that teachers computed, by model


@dataclass(frozen=True)
class Serving:
    """Everybody who took part."""

    processes: tuple[Taking, ...] = ()
    teachers: tuple[Teacher, ...] = ()
    queues: tuple[Queue, ...] = ()

    @property
    def restarts(self) -> int:
        """Starts of teachers beyond the first of each."""
        return sum(one.starts - 1 for one in self.processes if one.role.startswith("teacher"))


def serving(path: Path, peak: float | None, notes: list[str]) -> Serving:
    """Read who took part in the run at `path`; `peak` is what its first student held at most."""
    lines, _ = read_rows(path / "processes.jsonl")
    processes = _processes(lines, peak)
    teachers, queues = dict[tuple[str, str], dict[str, Any]](), []
    for file in sorted((path / STATUS).glob("student-*.json")):
        try:
            status = json.loads(file.read_text())
            queues.append(_queue(file.stem.removeprefix("student-"), status))
            for teacher in status["teachers"]:
                key = (str(teacher["name"]), str(teacher["host"]))
                row = teachers.setdefault(key, {**teacher, **dict.fromkeys(SUMS, 0)})
                for name in SUMS:
                    row[name] += teacher[name]
        except (OSError, ValueError, KeyError, TypeError) as error:
            notes.append(f"{STATUS}/{file.name} cannot be read ({type(error).__name__})")
    starts = {(one.role, one.host): one.starts for one in processes}
    served = [_teacher(row, starts.get((f"teacher {name}", host), 1)) for (name, host), row in sorted(teachers.items())]
    return Serving(tuple(processes), tuple(served), tuple(queues))


def _processes(lines: list[dict[str, Any]], peak: float | None) -> list[Taking]:
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        shard = f", part {line['shard']}" if line.get("shard") is not None else ""
        key = (f"{line.get('role', '?')} {line.get('rank', '')}{shard}".strip(), str(line.get("host", "")))
        grouped.setdefault(key, []).append(line)
    taking = []
    for (role, host), starts in sorted(grouped.items()):
        last = starts[-1]
        held = [*last.get("models", []), *(f"{head} (head)" for head in last.get("heads", []))]
        most = peak if role == "student 0" else None
        memory = float(last.get("memory_bytes") or 0)
        taking.append(Taking(role, host, str(last.get("device", "")), ", ".join(held), len(starts), memory, most))
    return taking


def _queue(rank: str, status: Mapping[str, Any]) -> Queue:
    counts = status["counts"]
    whole = status["worked_s"] + status["waited_s"]
    return Queue(
        rank,
        open=status["open"],
        unasked=status["waiting"],
        kept=status["kept"],
        mebibytes=counts.get("bytes", 0) / 2**20,
        waiting=status["waited_s"] / whole if whole else None,
        again=counts.get("asked_again", 0),
        refused=sum(number for key, number in counts.items() if key.startswith("refused")),
        work=status.get("busy_s", {}),
    )


def _teacher(row: Mapping[str, Any], starts: int) -> Teacher:
    state = row["state"] if row.get("over") == "memory" else f"{row['state']}, over the network"
    models = ", ".join(row["models"])
    busy_s = row["busy_ms"] / 1000
    return Teacher(str(row["name"]), str(row["host"]), models, state, row["answers"], row["tokens"], busy_s, starts)
