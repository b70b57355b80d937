"""`deltakd bench losses`: the chunked loss beside the bare matrix products, plain torch, torch.compile, TRL and Liger.

Every candidate runs in a process of its own, in turns with the bare products, by which its time is divided: times of
different machines or minutes do not compare, ratios of neighbours do.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deltakd.base.errors import RunError
from deltakd.base.machine import machine_facts
from deltakd.bench.case import NAMES, Case


def bench(template: Case, dtypes: Sequence[str], names: Sequence[str], out: Path) -> None:
    """Measure every candidate in every dtype, print the table and write JSON."""
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise RunError(f"bench losses: {unknown[0]} is no candidate. Write some of {','.join(NAMES)}.")
    names = [name for name in NAMES if name in names]
    results: list[dict[str, Any]] = []
    report = {"machine": machine_facts(), "results": results}
    out.parent.mkdir(parents=True, exist_ok=True)
    for dtype in dtypes:
        for name in names:
            print(f"{name} {dtype}: measuring", file=sys.stderr, flush=True)
            results.append(_measure(Case(**(asdict(template) | {"name": name, "dtype": dtype}))))
            out.write_text(json.dumps(report, indent=1) + "\n")  # what is measured is kept if the rest is not
    Console().print(_table(results))
    print(f"{out}: written")


def _measure(case: Case) -> dict[str, Any]:
    command = [sys.executable, "-m", "deltakd.bench.candidates", json.dumps(asdict(case))]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"signal {-child.returncode}, perhaps out of memory"])[-1]
        return asdict(case) | {"missing": f"failed: {last}"}
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def _table(results: Sequence[dict[str, Any]]) -> Table:
    """Return times as ratios to the products of the same dtype, and peak memory beyond the inputs."""
    first = results[0]
    title = f"{first['tokens']:,} tokens, hidden {first['hidden']:,} and {first['teacher_hidden']:,}, "
    title = f"{title}vocabulary {first['vocab']:,}"
    table = Table("loss", "dtype", "seconds", "time / products", "GiB beyond inputs", title=title)
    for result in results:
        cells = (
            ["", f"not measured: {result['missing'][:60]}", ""]
            if "missing" in result
            else [f"{min(result['seconds']):.3g}", f"{result['ratio']:.2f}", f"{result['peak_bytes'] / 2**30:.2f}"]
        )
        table.add_row(result["name"], result["dtype"], *cells)
    return table
