"""`deltakd bench growth`: how time and memory of a step grow with the length of documents and with the vocabulary.

Each point is a training of its own, started as a user starts it, with the same number of tokens a step along one axis.
"""

import json
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deltakd.base.files import remove, write_json, write_text
from deltakd.base.machine import machine_facts
from deltakd.bench.shapes import Pair, Shape, make_pair
from deltakd.bench.watched import WARM_UP, trainer, watch

LENGTHS = (256, 512, 1024, 2048, 4096)
VOCABULARIES = (4096, 16_384, 65_536, 151_936)
STUDENT = Shape(128, 4, 4, 2, 352)
AXES = {
    "length": [Pair(STUDENT, STUDENT, 4096, length, 4096, "float32") for length in LENGTHS],
    "vocabulary": [Pair(STUDENT, STUDENT, size, 512, 1024, "float32") for size in VOCABULARIES],
}
ROWS = 200


def bench(steps: int, out: Path, most: int = 5) -> None:
    """Measure up to `most` points of both axes, print them, and write JSON and a plot."""
    folder = out.with_suffix("")
    rows = _write_rows(folder)
    points: dict[str, list[dict[str, Any]]] = {}
    for axis, pairs in AXES.items():
        points[axis] = [_measure(axis, pair, steps, rows, folder) for pair in pairs[:most]]
    report = {"machine": machine_facts(), "steps": steps, "student": vars(STUDENT), "points": points}
    write_json(out, report)
    _plot(points, out.with_suffix(".svg"))
    for axis in points:
        Console().print(_table(axis, points[axis]))
    print(f"{out}: written, with {out.with_suffix('.svg')}")


def _write_rows(folder: Path) -> str:
    """Write texts that are longer than the longest document; each is cut to the point's length."""
    draw = random.Random(0)
    texts = (" ".join("".join(draw.choices("aeioulmnrst", k=4)) for _ in range(6000)) for _ in range(ROWS))
    write_text(folder / "rows.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder / "rows.jsonl")


def _measure(axis: str, pair: Pair, steps: int, rows: str, folder: Path) -> dict[str, Any]:
    size = pair.max_tokens if axis == "length" else pair.vocab_size
    place = folder / f"{axis}-{size}"
    recipe = make_pair(pair, rows, place)
    remove(place / "runs" / "growth")
    overrides = ["data.format=text", f"train.steps={steps + WARM_UP}"]
    overrides += ["references={from: in_process, payload: hidden}", f"data.train.num_rows={ROWS}"]
    run = watch(trainer(recipe, "growth", overrides), place / "runs" / "growth" / "steps.jsonl", place / "log.txt")
    first = (place / "runs" / "growth" / "processes.jsonl").read_text().splitlines()[0]
    grown = run.peak_bytes - json.loads(first)["memory_bytes"]  # beside the program and the weights
    point = {"size": size, "s_per_token": run.total("step_s") / run.total("num_tokens"), "peak_bytes": grown}
    print(f"{axis} {size}: {1 / point['s_per_token']:,.0f} tokens/s, {grown / 2**20:,.0f} MiB", flush=True)
    return point


def exponents(points: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """Return by which power of the size a number grows from each point to the next."""
    return [log(b[name] / a[name]) / log(b["size"] / a["size"]) for a, b in pairwise(points)]


def _table(axis: str, points: Sequence[Mapping[str, float]]) -> Table:
    table = Table(axis, "tokens/s", "time's power", "MiB of a step", "memory's power")
    powers = [("", "")] + [
        (f"{time:.2f}", f"{memory:.2f}")
        for time, memory in zip(exponents(points, "s_per_token"), exponents(points, "peak_bytes"), strict=True)
    ]
    for point, (time, memory) in zip(points, powers, strict=True):
        speed, peak = f"{1 / point['s_per_token']:,.0f}", f"{point['peak_bytes'] / 2**20:,.0f}"
        table.add_row(f"{point['size']:,}", speed, time, peak, memory)
    return table


def _plot(points: Mapping[str, Sequence[Mapping[str, float]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for axis, (name, line) in zip(axes, points.items(), strict=True):
        sizes = [point["size"] for point in line]
        axis.loglog(sizes, [1e6 * point["s_per_token"] for point in line], "o-", label="µs a token")
        axis.loglog(sizes, [point["peak_bytes"] / 2**20 for point in line], "s--", label="memory of a step, MiB")
        axis.set_xlabel(f"{name} (tokens)")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
