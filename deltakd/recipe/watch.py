"""`deltakd watch RUN`: a running job in the terminal, from what its ranks write into the run directory.

It reads files only, so it works from any node that sees the directory, and a run never waits for whoever watches.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deltakd.base.errors import RunError
from deltakd.base.rundir import STATUS, RunDirectory
from deltakd.train.records import describe

EVERY_S = 1.0
SUMS = ("open", "answers", "tokens", "busy_ms")  # what student ranks add up about one teacher
RECENT_STEPS = 20  # over which rates are taken


def watch(directory: str, once: bool) -> None:
    """Show a run until it has ended, or once. Raises RunError if the directory holds no run."""
    run = RunDirectory(Path(directory))
    if not (run.path / "recipe.yaml").exists():
        raise RunError(
            f"{run.path}: no run has started here. Write the directory of one, such as runs/quickstart/delta."
        )
    console = Console()
    if once:
        console.print(view(run))
        return
    with Live(view(run), console=console, refresh_per_second=4) as live:
        while run.finished() is None and run.is_live():
            time.sleep(EVERY_S)
            live.update(view(run))
        live.update(view(run))


def view(run: RunDirectory) -> Group:
    """Return what there is to see of a run now."""
    steps, statuses = run.read_lines("steps.jsonl"), _statuses(run)
    progress = _progress(run, steps)
    if not statuses:  # nobody is asked for references
        return Group(progress)
    return Group(progress, _teachers(statuses, run.finished() is not None), _queues(statuses, steps, run))


def _statuses(run: RunDirectory) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted((run.path / STATUS).glob("student-*.json")):
        age_s = time.time() - path.stat().st_mtime
        found[path.stem.replace("-", " ")] = {**json.loads(path.read_text()), "age_s": age_s}
    return found


def _progress(run: RunDirectory, steps: Sequence[Mapping[str, Any]]) -> Text:
    state = "finished" if run.finished() else "no step yet" if not steps else f"step {steps[-1]['step']}"
    if not run.finished() and not run.is_live():
        state += ", not running on this node: the same command starts it, or goes on from its checkpoint"
    return Text(f"{run.path}: {state}" + (f"  {describe(dict(steps[-1]))}" if steps else ""))


def _teachers(statuses: Mapping[str, Mapping[str, Any]], has_ended: bool) -> Table:
    """One line per teacher: what all student ranks say of it, added up; the last they said, if the run has ended."""
    table = Table("teacher", "models", "state", "open", "answers", "tokens/s")
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for status in statuses.values():
        for teacher in status["teachers"]:
            key = (f"{teacher['name']} on {teacher['host']}", teacher["pid"])
            row = rows.setdefault(key, {**teacher, **dict.fromkeys(SUMS, 0)})
            for name in SUMS:
                row[name] += teacher[name]
    for (name, _), row in sorted(rows.items()):
        rate = f"{1000 * row['tokens'] / row['busy_ms']:,.0f}" if row["busy_ms"] else ""
        state = "ended" if has_ended else row["state"]
        state += "" if row["over"] == "memory" else ", over the network"
        waiting = 0 if has_ended else row["open"]  # what was asked ahead of the last step is never used
        table.add_row(name, ", ".join(row["models"]), state, f"{waiting:,}", f"{row['answers']:,}", rate)
    return table


def _queues(statuses: Mapping[str, Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], run: RunDirectory) -> Table:
    """One line per student rank: its queue, what came to it, how long it waited, and what was refused."""
    table = Table("student", "open", "unasked", "kept", "MiB/s", "waiting", "again", "refused", "seen")
    recent = steps[-RECENT_STEPS:]
    spent = sum(step["step_s"] for step in recent)
    for name, status in statuses.items():
        counts = status["counts"]
        whole = status["worked_s"] + status["waited_s"]
        refused = sum(number for key, number in counts.items() if key.startswith("refused"))
        table.add_row(
            name.removeprefix("student "),
            *(f"{status[key]:,}" for key in ("open", "waiting", "kept")),
            f"{counts.get('bytes', 0) / 2**20 / whole:,.1f}" if whole else "",
            f"{status['waited_s'] / whole:.1%}" if whole else "",
            f"{counts.get('asked_again', 0):,}",
            f"{refused:,}",
            f"{status['age_s']:.0f} s ago",
        )
    rate = (
        f"{sum(step['num_tokens'] for step in recent) / spent:,.0f} tokens/s over {len(recent)} steps" if spent else ""
    )
    starts = sum(line["role"] == "teacher" and not line.get("shard") for line in run.read_lines("processes.jsonl"))
    table.caption = (
        f"{rate}; {starts} starts of teachers\n"
        "open: asked; unasked: nobody is there, or no slot is free; "
        "kept: slots of a silent teacher; again: asked of another"
    )
    return table
