"""Where a student rank's time goes between its own work and its teachers: who answered how much, and who is short."""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

MOST_WAITING = 0.02  # of the time; teachers that keep up cost less


class Accounts:
    """Seconds of work and of waiting, and the teachers' own seconds by model."""

    def __init__(self, num_students: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """`num_students` ranks share the teachers, and are taken to ask alike; `clock` counts seconds."""
        self._num_students, self._clock = num_students, clock
        self._worked_s = self._waited_s = 0.0
        self._last: float | None = None
        self._busy_s: dict[str, float] = {}
        self._of: dict[bytes, Counter[str]] = {}

    def stop_work(self) -> None:
        """Mark the moment at which a payload is needed."""
        now = self._clock()
        if self._last is not None:
            self._worked_s += now - self._last
            self._last = now

    def start_work(self) -> None:
        """Mark the moment at which it is there. The first one is not counted: everybody waits for it."""
        now = self._clock()
        if self._last is not None:
            self._waited_s += now - self._last
        self._last = now

    def add(self, teacher: bytes, model: str, num_tokens: int, forward_s: float) -> None:
        """Note one answer."""
        self._busy_s[model] = self._busy_s.get(model, 0.0) + forward_s
        of_teacher = self._of.setdefault(teacher, Counter())
        of_teacher["answers"] += 1
        of_teacher["tokens"] += num_tokens
        of_teacher["busy_ms"] += round(1000 * forward_s)

    def of_teacher(self, teacher: bytes) -> dict[str, int]:
        """Return one teacher's answers, tokens and milliseconds of work."""
        return {name: self._of.get(teacher, Counter())[name] for name in ("answers", "tokens", "busy_ms")}

    def shares(self) -> dict[str, Any]:
        """Return seconds of work and waiting, and of the teachers' work by model."""
        return {"worked_s": self._worked_s, "waited_s": self._waited_s, "busy_s": dict(self._busy_s)}

    def shortage(self, num_teachers: int) -> str | None:
        """Say by what factor teachers are too slow, and how many would do; None if waiting took at most 2%."""
        whole = self._worked_s + self._waited_s
        if not self._worked_s or self._waited_s <= MOST_WAITING * whole:
            return None
        demand = {model: self._num_students * busy / self._worked_s for model, busy in self._busy_s.items()}
        needed = sum(demand.values())
        each = ", ".join(f"{model} {share:.2f}" for model, share in sorted(demand.items()))
        if needed <= num_teachers:
            todo = "on average they are fast enough: raise teachers.look_ahead"
        else:
            factor = needed / max(1, num_teachers)
            todo = f"they are short by a factor of {factor:.2f}, {math.ceil(needed)} would do"
        ranks = "rank" if num_teachers == 1 else "ranks"
        return (
            f"references: {self._waited_s / whole:.0%} of the time went into waiting. For each second of the students' "
            f"work teachers computed {needed:.2f} s ({each}) on {num_teachers} {ranks}: {todo}."
        )
