"""`deltakd bench rollouts`: how fast a student under ZeRO-3 writes its own answers, with a whole copy and without.

Both arms are of one run of student ranks, as a recipe's training builds them, and take turns in it: the same prompts,
the same draws, as many tokens. The copy's time is that of a step's answers and its part of a refresh, which serves
`refresh_steps` steps.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from deltakd.base.errors import RunError
from deltakd.base.files import remove, write_json
from deltakd.base.machine import machine_facts
from deltakd.bench.shapes import PAIRS, make_pair
from deltakd.bench.watched import watch

RUN = "rollouts"
LINES = "rounds.jsonl"  # in the run's directory, where rank 0 writes one for each round
AIM = 3.0  # times as many tokens a second with a copy as without


@dataclass(frozen=True)
class Turns:
    """What is written, how often, and by how many."""

    ranks: int
    prompts: int  # that each rank answers in a step
    new_tokens: int  # of each answer
    rounds: int
    train_steps: int  # before each round
    refresh_steps: int  # that one refresh serves
    seed: int


def bench(shape: str, turns: Turns, out: Path) -> None:
    """Measure both arms in turns, print the table and write JSON. Raises RunError if the ranks fail."""
    for name, value in asdict(turns).items():
        if value < 1 and name != "seed":
            raise RunError(f"--{name.replace('_', '-')}: {value} is too few. Write 1 or more.")
    folder, load = out.with_suffix("") / shape, os.getloadavg()[0]
    recipe = make_pair(PAIRS[shape], None, folder)
    run, log = folder / "runs" / RUN, folder / "logs" / f"{RUN}.txt"
    remove(run)
    run.mkdir(parents=True)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={turns.ranks}"]
    rank = ["-m", "deltakd.bench.writer", str(recipe), str(turns.prompts), str(turns.rounds), str(turns.train_steps)]
    # It learns from the rows alone: frozen models have no part in how fast a student writes.
    training = [
        f"run={RUN}",
        f"seed={turns.seed}",
        "engine={name: deepspeed, zero_stage: 3}",
        "objective.sft_weight=1.0",
    ]
    answers = f"rollouts={{max_new_tokens: {turns.new_tokens}}}"
    print(f"student ranks: {turns.ranks}, rounds: {turns.rounds}; their output goes to {log}", flush=True)
    watched = watch([*start, *rank, *training, answers], run / LINES, log)
    lines = [line | rates(line, turns.refresh_steps) for line in watched.steps]
    report = {
        "machine": machine_facts() | {"load_before": load},
        "pair": {"name": shape, **{key: str(value) for key, value in vars(PAIRS[shape]).items()}},
        **asdict(turns),
        "peak_bytes": watched.peak_bytes,
        "cores": watched.cores,
        "median": {name: median(line[name] for line in lines) for name in lines[0]},
        "measured": lines,
    }
    write_json(out, report)
    Console().print(_table(lines, turns))
    print(f"{out}: written")


def rates(line: Mapping[str, float], refresh_steps: int) -> dict[str, float]:
    """Return tokens a second over all ranks in a round, and how many times as fast the copy is.

    `ratio_writing` leaves the refresh out; `ratio_every_step` has one before each step.
    """
    tokens, writing, refresh = line["tokens"], line["copy_write_s"], line["refresh_s"]
    sharded = tokens / line["sharded_write_s"]
    copy = tokens / (writing + refresh / refresh_steps)
    return {
        "copy_tokens_per_s": copy,
        "sharded_tokens_per_s": sharded,
        "ratio": copy / sharded,
        "ratio_writing": tokens / writing / sharded,
        "ratio_every_step": tokens / (writing + refresh) / sharded,
    }


def _table(lines: Sequence[Mapping[str, Any]], turns: Turns) -> Table:
    asked, same = turns.ranks * turns.prompts * turns.rounds, sum(line["same_answers"] for line in lines)
    table = Table(
        "over rounds",
        "median",
        "least",
        "most",
        caption=f"a refresh serves {turns.refresh_steps} steps; {same} of {asked} answers are the same in both arms",
    )
    shown = {
        "copy, tokens/s": ("copy_tokens_per_s", ",.0f"),
        "sharded, tokens/s": ("sharded_tokens_per_s", ",.0f"),
        f"times as fast (aim: {AIM:g})": ("ratio", ".2f"),
        "the same, without the refresh": ("ratio_writing", ".2f"),
        "the same, a refresh each step": ("ratio_every_step", ".2f"),
        "copy, a step's answers, s": ("copy_write_s", ".2f"),
        "a refresh, s": ("refresh_s", ".3f"),
        "sharded, a step's answers, s": ("sharded_write_s", ".2f"),
    }
    for title, (name, digits) in shown.items():
        values = [line[name] for line in lines]
        table.add_row(title, *(format(value, digits) for value in (median(values), min(values), max(values))))
    return table
