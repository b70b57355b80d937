"""The planner's memory beside small real trainings of this machine (docs/results/plan.md).

What counts is a process's high-water mark less that of the same training of a model of next to nothing: interpreter,
torch and what reading rows leaves behind. The C library is told to give freed memory back, since what it keeps is no
tensor's. Time is not compared here: it means nothing on a machine that is not alone.
"""

import json
import os
import random
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from deltakd.bench.shapes import Pair, Shape, make_pair
from deltakd.bench.watched import trainer
from deltakd.plan.plan import plan

MEASURED = Pair(Shape(384, 8, 6, 2, 1024), Shape(512, 8, 8, 4, 1408), 8192, 512, 2048, "float32")
NOTHING = Pair(Shape(16, 1, 2, 1, 32), Shape(16, 1, 2, 1, 32), 600, 64, 256, "float32")
SFT, ZERO = ["objective.sft_weight=1.0"], ["engine={name: deepspeed, zero_stage: 3}"]
# Name: overrides, and how many processes the launcher starts where it starts several.
CASES = {
    "sft": (SFT, 1),
    "accumulated": ([*SFT, "train.tokens_per_step=4096"], 1),
    "recomputed": ([*SFT, "train.gradient_checkpointing=true"], 1),
    "teacher_beside": ([], 1),
    "zero_3": (ZERO, 2),
}


def high_water(command: list[str], log: Path) -> dict[str, int]:
    """Run a command; return the most that its student and its teacher ever held, in bytes."""
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    returning = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    held: dict[str, int] = {}
    with log.open("wb") as output:
        child = subprocess.Popen(command, env=os.environ | quiet | returning, stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            with suppress(psutil.Error, OSError):
                for process in [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]:
                    words = process.cmdline()
                    is_rank = any(word.endswith("launchers/train.py") for word in words)
                    is_launcher = any(word.endswith(("/deepspeed", "deepspeed.launcher.launch")) for word in words)
                    name = "teacher" if "serve" in words else "student" if is_rank and not is_launcher else "other"
                    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                    peak = sum(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
                    held[name] = max(held.get(name, 0), peak)
            time.sleep(0.1)
    assert child.returncode == 0, log.read_text()[-2000:]
    return held


def rows(path: Path) -> str:
    draw = random.Random(0)
    texts = (" ".join("".join(draw.choices("aeioulmnrst", k=4)) for _ in range(1500)) for _ in range(60))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def measured(recipe: Path, run: str, overrides: list[str], processes: int, folder: Path) -> dict[str, int]:
    several = ["--processes", str(processes)] if processes > 1 else []
    common = ["data.format=text", "data.train.num_rows=60", "train.steps=2", *overrides, *several]
    return high_water(trainer(recipe, run, common), folder / f"{run}.txt")


@pytest.mark.soak
@pytest.mark.timeout(3000)  # nine trainings: four minutes alone, ten on a busy machine
def test_memory_is_within_a_tenth_of_what_trainings_take(tmp_path):
    data = rows(tmp_path / "rows.jsonl")
    recipe, nothing = (make_pair(pair, data, tmp_path / name) for pair, name in ((MEASURED, "a"), (NOTHING, "b")))
    measured(nothing, "tokens", SFT, 1, tmp_path)  # rows are tokenised once, here and below
    measured(recipe, "tokens", SFT, 1, tmp_path)
    base = {"single": measured(nothing, "base", [], 1, tmp_path)}
    base["zero_3"] = measured(nothing, "base_zero", ZERO, 2, tmp_path)
    off = {}
    for name, (overrides, processes) in CASES.items():
        took = measured(recipe, name, overrides, processes, tmp_path)
        foretold = plan(str(recipe), ["data.format=text", *overrides], gpus=f"{processes}xCPU").best.memory
        for process, memory in foretold.items():
            beside = base.get(name, base["single"])[process]
            said = memory.on_device - memory.device["context"] + foretold["student"].on_host
            grown = took[process] - beside
            off[f"{name}, {process}"] = round(said / grown - 1, 3)
            print(
                f"{name}, {process}: {grown / 2**20:,.0f} MiB, foretold {said / 2**20:,.0f} ({said / grown - 1:+.0%})"
            )
    assert all(abs(error) < 0.1 for error in off.values()), off
