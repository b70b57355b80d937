"""Run directories and evaluations made on the spot, as training and evaluating leave them; nothing is trained.

`python tests/report/made.py FOLDER 200 10000` makes as many runs of as many steps, to measure a report with.
"""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from deltakd.evaluate.predictions import COLUMNS, write_predictions

FACTS = {"commit": "0123456789ab", "python": "3.11.7", "host": "node1", "machine": "x86_64, 2 cores, 24 GiB"}
FACTS |= {"versions": {"torch": "2.13.0", "numpy": "2.4.6"}}
RECIPE = """\
root: runs/made
run: {name}
seed: {seed}
objective:
  target: {{name: delta, alpha: {alpha}}}
  divergence: {{name: reverse_kl}}
train:
  steps: {steps}
  learning_rate: 0.001
"""
KNOWN = ("step", "loss", "cross_entropy", "policy", "reward", "corpus", "divergence", "kl_to_target", "student_entropy")
KNOWN += ("target_entropy", "alpha", "grad_norm", "learning_rate", "num_tokens", "num_supervised", "num_micro_batches")
KNOWN += ("step_s", "wait_s", "forward_backward_s", "update_s", "memory_bytes")


@cache
def step_lines(num_steps: int, seed: int, alpha: float = 0.5, is_taught: bool = True) -> list[str]:
    """Return the lines of steps.jsonl: a loss that falls, with noise and a spike, in all digits as training writes."""
    rng = np.random.default_rng(seed)
    steps = np.arange(1, num_steps + 1)
    loss = 0.1 + np.exp(-3 * steps / num_steps) + 0.05 * rng.normal(size=num_steps)
    loss[num_steps // 3] += 2.5
    spent = 0.1 + 0.01 * rng.random(num_steps)
    columns: dict[str, Any] = dict.fromkeys(KNOWN, [None] * num_steps)
    columns |= {
        "step": steps.tolist(),
        "loss": loss.tolist(),
        "cross_entropy": (loss * 1.1).tolist(),
        "divergence": loss.tolist(),
        "kl_to_target": (loss * 0.7).tolist() if is_taught else [None] * num_steps,
        "student_entropy": (0.4 + 0.1 * rng.random(num_steps)).tolist(),
        "target_entropy": (0.3 + 0.1 * rng.random(num_steps)).tolist(),
        "alpha": [alpha] * num_steps,
        "grad_norm": (1 + rng.random(num_steps)).tolist(),
        "learning_rate": (0.001 * np.cos(1.4 * steps / num_steps)).tolist(),
        "num_tokens": rng.integers(900, 1024, num_steps).tolist(),
        "num_supervised": [500] * num_steps,
        "num_micro_batches": [1] * num_steps,
        "step_s": spent.tolist(),
        "wait_s": (0.1 * spent).tolist(),
        "forward_backward_s": (0.8 * spent).tolist(),
        "update_s": (0.1 * spent).tolist(),
        "memory_bytes": (4e8 + 1000 * steps).astype(int).tolist(),
    }
    return [
        json.dumps(dict(zip(columns, values, strict=True))) + "\n" for values in zip(*columns.values(), strict=True)
    ]


def make_run(folder: Path, num_steps: int = 40, seed: int = 1, alpha: float = 0.5, finished: bool = True) -> Path:
    """Make a run's directory; one that is not `finished` had as many steps again to go."""
    folder.mkdir(parents=True)
    planned = num_steps if finished else 2 * num_steps
    (folder / "recipe.yaml").write_text(RECIPE.format(name=folder.name, seed=seed, alpha=alpha, steps=planned))
    started = f"2026-11-22T10:{seed % 60:02}:00Z"
    (folder / "run.json").write_text(json.dumps({**FACTS, "started": started, "seed": seed}))
    (folder / "steps.jsonl").write_text("".join(step_lines(num_steps, seed, alpha)))
    students = {"pid": 1, "role": "student", "rank": 0, "host": "node1", "device": "cpu", "models": ["student"]}
    teachers = {**students, "pid": 2, "role": "teacher", "models": ["teacher", "teacher_raw"]}
    lines = [{**one, "heads": [], "memory_bytes": 4 * 10**8} for one in (students, teachers, teachers)]
    (folder / "processes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    teacher = {"name": "0", "host": "node1", "pid": 2, "over": "memory", "models": ["teacher"], "state": "serving"}
    status = {"teachers": [{**teacher, "open": 1, "answers": 40, "tokens": 40_000, "busy_ms": 2000}], "open": 1}
    status |= {"waiting": 0, "kept": 0, "counts": {"bytes": 2**21, "refused: late": 2, "asked_again": 1}}
    status |= {"worked_s": 9.0, "waited_s": 1.0, "busy_s": {"teacher": 2.0}}
    (folder / "status").mkdir()
    (folder / "status" / "student-0.json").write_text(json.dumps(status))
    if finished:
        (folder / "finished.json").write_text(json.dumps({"finished": started, "steps": num_steps, "inputs": {}}))
    return folder


def make_evaluation(folder: Path, labels: list[str], baseline: str, answers: dict[str, str] | None = None) -> Path:
    """Make an evaluation of three prompts; `answers` are what the models say to the first."""
    (folder / "scores").mkdir(parents=True)
    models: dict[str, Any] = {}
    for index, label in enumerate(labels):
        rows = {"rougeL": [0.5 + 0.1 * index, 0.6, 0.7], "cross_entropy": [0.3 - 0.1 * index, 0.2, 0.1]}
        means = {metric: sum(values) / len(values) for metric, values in rows.items()}
        far, near = 0.1 * index, 0.05 * index
        difference = {
            "rougeL": {"mean": far, "low": far - 0.01, "high": far + 0.01},
            "cross_entropy": {"mean": near, "low": near - 0.2, "high": near + 0.2},
        }
        models[label] = {"weights": f"runs/made/{label}/export", "identity": label, **means, "num_truncated": index}
        models[label]["difference"] = {} if label == baseline else difference
        first = (answers or {}).get(label, f"answer of {label}")
        texts = [first, "second answer", "third answer"]
        columns = dict.fromkeys(COLUMNS, [None] * 3) | {"answer": texts, "seed": [0] * 3} | rows
        columns |= {name: [f"{name} {n}" for n in range(3)] for name in ("prompt", "reference")}
        write_predictions(folder, label, columns)
        (folder / "scores" / f"{label}.json").write_text(json.dumps({"question": {}, "scores": {"rows": rows}}))
    results = {
        **FACTS,
        "started": "2026-11-22T11:00:00Z",
        "seed": 1,
        "protocol": "paper",
        "baseline": baseline,
        "models": models,
    }
    (folder / "results.json").write_text(json.dumps({**results, "warnings": []}))
    return folder


def make_sweep(folder: Path, evil: str) -> Path:
    """Make what a sweep over alpha and another setting has found, from two seeds."""

    def found(value: float) -> dict[str, Any]:
        difference = {"mean": value / 10, "low": value / 10 - 0.01, "high": value / 10 + 0.01} if value else None
        return {"mean": 0.5 + value / 10, "by_seed": [0.48 + value / 10, 0.52 + value / 10], "difference": difference}

    def points(alphas: list[float]) -> list[dict[str, Any]]:
        return [{"value": a, "metrics": {name: found(a) for name in ("rougeL", "cross_entropy")}} for a in alphas]

    curves = [{"at": {"data.x": word}, "points": points([0.0, 0.5, 1.0])} for word in ("one", evil)]
    short = {"objective.target.alpha": "alpha", "data.x": "x"}
    folder.mkdir(parents=True)
    of_words = [{"at": {}, "points": [{"value": "one", "metrics": {}}]}]
    sweep = {"short": short, "curves": {"objective.target.alpha": curves, "data.x": of_words}}
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder


def make_many(folder: Path, num_runs: int, num_steps: int) -> None:
    """Make runs of the same length; eight of them are different, the others repeat their numbers."""
    for index in range(num_runs):
        make_run(folder / f"run_{index:03}", num_steps, seed=index % 8, alpha=index % 4 / 4)


if __name__ == "__main__":
    make_many(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
