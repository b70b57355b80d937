"""`deltakd bench step`: what a training step costs, beside SFT, beside TRL, and with references from everywhere.

Every arm is a run of its own, started as a user starts it, on the same rows in the same order: the same steps, so their
times are compared step by step. Arms take turns, so that a slow minute of the machine meets all of them.
"""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deltakd.base.errors import RunError
from deltakd.base.files import remove, write_json
from deltakd.base.machine import machine_facts
from deltakd.base.processes import use_threads
from deltakd.bench.arms import ARMS
from deltakd.bench.shapes import PAIRS, Pair, make_pair
from deltakd.bench.watched import WARM_UP, Watched, trainer, watch


def bench(
    shape: str,
    data: str | None,
    arms: Sequence[str],
    steps: int,
    rounds: int,
    peak: float | None,
    out: Path,
    seed: int,
) -> None:
    """Measure the arms in turns, print the table and write JSON. Raises RunError if one fails."""
    if steps % WARM_UP:
        raise RunError(
            f"--steps: {steps} is no multiple of {WARM_UP}, as many as one_by_one loads a model for. Write 8."
        )
    if unknown := set(arms) - set(ARMS):
        raise RunError(f"--arms: {', '.join(sorted(unknown))} is not known. Write some of {', '.join(ARMS)}.")
    use_threads()
    pair, folder = PAIRS[shape], out.with_suffix("") / shape
    recipe = make_pair(pair, data, folder)
    common = [f"train.steps={steps + WARM_UP}", f"seed={seed}"]
    cached: dict[str, float] = {}
    remove(folder / "runs" / "cache")
    for arm in arms:
        if arm.startswith("cache"):
            cached[arm] = _write_cache(recipe, [*common, *ARMS[arm][1]])
    measured: dict[str, list[Watched]] = {arm: [] for arm in arms}
    for number in range(rounds):
        for arm in arms:
            print(f"round {number + 1} of {rounds}: {ARMS[arm][0]}", flush=True)
            measured[arm].append(_run(arm, recipe, folder, [*common, *ARMS[arm][1]]))
    peak_flops = peak * 1e12 if peak else _measured_peak(pair)
    products = _frozen_products(pair)
    rows = {arm: _row(arm, runs, measured.get("sft"), pair, peak_flops, products) for arm, runs in measured.items()}
    report = {
        "machine": machine_facts(),
        "pair": {"name": shape, **{key: str(value) for key, value in vars(pair).items()}},
        "steps": steps,
        "rounds": rounds,
        "seed": seed,
        "peak_flops": peak_flops,
        "frozen_products_s_per_supervised_token": products,
        "cache_s": cached,
        "arms": rows,
    }
    write_json(out, report)
    Console().print(_table(rows))
    print(f"{out}: written")


def _run(arm: str, recipe: Path, folder: Path, overrides: Sequence[str]) -> Watched:
    remove(folder / "runs" / arm)
    steps = folder / "runs" / arm / "steps.jsonl"
    if arm in ("one_by_one", "trl"):
        command = [sys.executable, "-m", f"deltakd.bench.{arm}", str(recipe), f"run={arm}", *overrides]
    else:
        command = trainer(recipe, arm, overrides)
    return watch(command, steps, folder / "logs" / f"{arm}.txt")


def _write_cache(recipe: Path, overrides: Sequence[str]) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "deltakd", "cache", str(recipe), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"the cache cannot be written ({(done.stderr.strip().splitlines() or ['?'])[-1][:300]}).")
    return time.perf_counter() - started


def _row(
    arm: str, runs: Sequence[Watched], sft: Sequence[Watched] | None, pair: Pair, peak: float, products: float
) -> dict[str, Any]:
    """Return an arm's figures. Of each step the fastest round counts: a busy machine only ever adds."""
    seconds, tokens = _fastest(runs), runs[0].total("num_tokens")
    row: dict[str, Any] = {
        "what": ARMS[arm][0],
        "tokens_per_s": tokens / seconds,
        "waiting": median(run.total("wait_s") / run.total("step_s") for run in runs),
        "whole_s": min(run.seconds for run in runs),
        "cores": median(run.cores for run in runs),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "device_bytes": max(run.device_bytes for run in runs),
        "padding": 0.0,
        "utilisation": _student_flops(runs[0], pair) / seconds / peak,
        "step_s": [[step["step_s"] for step in run.counted] for run in runs],
    }
    if arm == "trl":
        padding = runs[0].total("num_padding")
        row["padding"] = padding / (tokens + padding)
    if sft is not None and arm not in ("trl", "kl"):
        row["of_sft"] = seconds / _fastest(sft)
        demanded = products * sft[0].total("num_supervised") if arm == "cache_hidden" else 0.0
        if arm.startswith("cache"):
            row["of_demanded"] = seconds / (_fastest(sft) + demanded)
    return row


def _fastest(runs: Sequence[Watched]) -> float:
    """Return the seconds of all counted steps, of each the fastest over rounds."""
    return float(sum(min(times) for times in zip(*([s["step_s"] for s in run.counted] for run in runs), strict=True)))


def _student_flops(run: Watched, pair: Pair) -> float:
    """Return what the student's matrices demand: 6 a parameter and token; the head of supervised tokens alone."""
    head = pair.student.hidden_size * pair.vocab_size
    return 6 * (pair.student.backbone_parameters * run.total("num_tokens") + head * run.total("num_supervised"))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _seconds(work: Any, repeats: int = 5) -> float:
    """Return the median time of some work on the device."""
    spent = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if _device() == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    return median(spent[1:])


def _measured_peak(pair: Pair) -> float:
    """Return the operations a second of a large matrix product on this device, in the student's dtype."""
    size = 8192 if _device() == "cuda" else 1536
    a = torch.randn(size, size, device=_device()).to(getattr(torch, pair.dtype))
    return 2 * size**3 / _seconds(lambda: a @ a)


def _frozen_products(pair: Pair) -> float:
    """Return the seconds a supervised token that the three frozen heads' products take, in chunks as the loss's."""
    tokens, total = 512, 0.0
    out = torch.empty(tokens, pair.vocab_size, device=_device(), dtype=getattr(torch, pair.dtype))
    for size in (pair.teacher.hidden_size, pair.teacher.hidden_size, pair.student.hidden_size):
        hidden, head = (torch.randn(rows, size, device=_device()).to(out.dtype) for rows in (tokens, pair.vocab_size))
        total += _seconds(lambda h=hidden, w=head: torch.mm(h, w.T, out=out)) / tokens
    return total


def _table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    titles = ("arm", "tokens/s", "of SFT", "of demanded", "waits", "utilised", "padding", "cores", "MiB")
    table = Table(
        *titles, title="of each step the fastest round", caption="\n".join(f"{a}: {r['what']}" for a, r in rows.items())
    )
    for arm, row in rows.items():
        table.add_row(
            arm,
            f"{row['tokens_per_s']:,.0f}",
            f"{row['of_sft']:.2f}" if "of_sft" in row else "",
            f"{row['of_demanded']:.2f}" if "of_demanded" in row else "",
            f"{row['waiting']:.0%}",
            f"{row['utilisation']:.0%}",
            f"{row['padding']:.0%}",
            f"{row['cores']:.1f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
        )
    return table
