"""What the doctor says: lines of a subject, how it stands, what was found and what to do about it."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from deltakd.base.scratch import SHARED_MEMORY

Status = Literal["ok", "warning", "error"]
ORDER: tuple[Status, ...] = ("ok", "warning", "error")
DEFAULT_PORT = 29500  # of deepspeed's and torch's launchers


@dataclass(frozen=True)
class Asked:
    """What the doctor looks at where a machine has several: given by options, or as a run would take them."""

    runs: Path = Path("runs")
    shared_memory: Path = SHARED_MEMORY
    port: int | None = None  # None: MASTER_PORT, or the launchers' own

    @property
    def meeting_port(self) -> tuple[int | str, bool]:
        """Return the port where students meet, or what is written in its place, and whether somebody chose it."""
        given = os.environ.get("MASTER_PORT")
        if self.port is not None or given is None:
            return (DEFAULT_PORT, False) if self.port is None else (self.port, True)
        return (int(given) if given.isdecimal() else given), True


@dataclass(frozen=True)
class Line:
    """One finding; `todo` is empty where all is well, and `facts` are for the report in JSON alone."""

    subject: str
    status: Status
    text: str
    todo: str = ""
    facts: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status:<8} {self.subject:<15} {self.text}{f'. {self.todo}.' if self.todo else ''}"


def ok(subject: str, text: str, **facts: object) -> Line:
    """Say that all is well."""
    return Line(subject, "ok", text, facts=facts)


def warning(subject: str, text: str, todo: str, **facts: object) -> Line:
    """Say what may go wrong or slows a run down."""
    return Line(subject, "warning", text, todo, facts)


def error(subject: str, text: str, todo: str, **facts: object) -> Line:
    """Say what a run would fail of."""
    return Line(subject, "error", text, todo, facts)


def hub_folder() -> Path:
    """Return where the hub's library keeps its token and its caches."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return home(os.environ.get("HF_HOME") or f"{cache}/huggingface")


def home(path: str | Path) -> Path:
    """Return a path with its ~ resolved, and as it is where nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def size(num_bytes: float) -> str:
    """Write a number of bytes for people."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= factor:
            return (
                f"{num_bytes / factor:.3g} {unit}" if num_bytes < 1000 * factor else f"{num_bytes / factor:.0f} {unit}"
            )
    return f"{num_bytes / 2**10:.0f} KiB"
