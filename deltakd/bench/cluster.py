"""`deltakd bench cluster`: the simulation beside runs of this machine, and what it says of clusters beyond it.

The seconds that are simulated with come from one run of each target; the others are foretold from them and then run.
Beyond this machine they come from arithmetic on a GPU's data sheet, and say so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deltakd.base.files import remove, write_json
from deltakd.base.machine import machine_facts
from deltakd.bench.arms import KL
from deltakd.bench.shapes import QWEN, Pair, Shape, make_pair
from deltakd.bench.simulation import Plant, simulate
from deltakd.bench.watched import WARM_UP, Watched, trainer, watch

CHECKED = Pair(Shape(256, 6, 4, 2, 704), Shape(256, 8, 4, 2, 704), 4096, 512, 2048, "float32")
TARGETS: dict[str, list[str]] = {"delta": [], "forward KL": KL}
# Look-ahead and micro-batches a step of the run that the seconds come from, and of those that are foretold.
RATES, FORETOLD = (2, 4), ((0, 4), (1, 4), (2, 2))


@dataclass(frozen=True)
class Hardware:
    """A GPU and its ways out, as data sheets have them; bytes and operations a second."""

    name: str
    flops: float
    share: float  # of them that large products reach
    nvlink: float
    pcie: float
    network: float  # of one GPU's share of the node's adapters


H100 = Hardware("H100 SXM, eight to a node, 400 Gb/s each", 989e12, 0.45, 450e9, 55e9, 50e9)
TOKENS = 8192  # of a micro-batch
SUPERVISED = 0.6
NUM_GPUS = (8, 16, 64, 256, 1024)
TOKENS_PER_STEP = 262_144
SPREAD = 0.05


def bench(steps: int, rounds: int, out: Path) -> None:
    """Run what is simulated, print both, then what is foretold of clusters; write JSON."""
    checked = _check(steps, rounds, out.with_suffix(""))
    foretold = [_foretell(number, H100) for number in NUM_GPUS]
    write_json(out, {"machine": machine_facts(), "checked": checked, "hardware": vars(H100), "foretold": foretold})
    _print("Simulated beside run", checked)
    _print(f"Foretold: Qwen2.5 7B -> 1.5B, delta, {H100.name}", foretold)
    print(f"{out}: written")


def _check(steps: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    recipe = make_pair(CHECKED, None, folder)
    runs: dict[tuple[str, int, int], list[Watched]] = {}
    answered: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        for target, overrides in TARGETS.items():
            for ahead, micro_batches in (RATES, *FORETOLD):
                case = (target, ahead, micro_batches)
                print(f"round {number + 1} of {rounds}: {_named(case)}", flush=True)
                runs.setdefault(case, []).append(_run(recipe, folder, steps, [*overrides, *_overrides(*case[1:])]))
                if case[1:] == RATES:
                    status = json.loads((folder / "runs" / "case" / "status" / "student-0.json").read_text())
                    answered.setdefault(target, []).append(_answer_s(runs[case][-1], status))
    rows = []
    for case, watched in runs.items():
        target, ahead, micro_batches = case
        plant, measured = _measured(runs[(target, *RATES)], answered[target]), _seconds(watched, "step_s")
        share = plant.micro_batches / micro_batches  # of its tokens in each: seconds go with them
        changed = replace(
            plant,
            look_ahead=ahead,
            micro_batches=micro_batches,
            work_s=plant.work_s * share,
            answer_s=tuple(seconds * share for seconds in plant.answer_s),
        )
        course = simulate(changed)
        off = course.step_s / measured - 1
        rows.append({"case": _named(case), "run_s": measured, "simulated_s": course.step_s, "off": off})
    return rows


def _named(case: tuple[str, int, int]) -> str:
    return f"{case[0]}, {case[1]} ahead, {case[2]} micro-batches"


def _overrides(look_ahead: int, micro_batches: int) -> list[str]:
    return [
        f"teachers.look_ahead={look_ahead}",
        f"train.tokens_per_micro_batch={CHECKED.tokens_per_step // micro_batches}",
    ]


def _run(recipe: Path, folder: Path, steps: int, overrides: Sequence[str]) -> Watched:
    remove(folder / "runs" / "case")
    command = trainer(recipe, "case", [f"train.steps={steps + WARM_UP}", *overrides])
    return watch(command, folder / "runs" / "case" / "steps.jsonl", folder / "log.txt")


def _seconds(runs: Sequence[Watched], name: str) -> float:
    """Return the mean of what steps took, of each the fastest round: a busy machine only ever adds."""
    rounds = zip(*([step[name] for step in run.counted] for run in runs), strict=True)
    return sum(min(seconds) for seconds in rounds) / len(runs[0].counted)


def _answer_s(run: Watched, status: dict[str, Any]) -> dict[str, float]:
    """Return what a micro-batch took a teacher, by model, from what it said of itself."""
    return {name: seconds / len(run.steps) / RATES[1] for name, seconds in status["busy_s"].items()}


def _measured(runs: Sequence[Watched], answered: Sequence[dict[str, float]]) -> Plant:
    """Return the seconds of runs: the student's from its steps, the teachers' from the fastest round."""
    names = sorted(answered[0], key=lambda name: name != "teacher")
    return Plant(
        num_nodes=1,
        students_per_node=1,
        teachers_per_node=1,
        micro_batches=RATES[1],
        look_ahead=RATES[0],
        work_s=_seconds(runs, "forward_backward_s") / RATES[1],
        update_s=_seconds(runs, "update_s"),
        answer_s=tuple(min(one[name] for one in answered) for name in names),
    )


def _foretell(num_gpus: int, hardware: Hardware) -> dict[str, Any]:
    """Return what a step takes on so many GPUs, with the split of a node that is fastest, and what binds."""
    nodes = num_gpus // 8
    plants = [plant_of(nodes, students, hardware) for students in range(1, 8)]
    tokens = [_tokens_per_step(nodes * plant.students_per_node) for plant in plants]
    courses = [simulate(plant, steps=4 if num_gpus > 64 else 10) for plant in plants]
    best = max(range(7), key=lambda index: tokens[index] / courses[index].step_s)
    plant, course = plants[best], courses[best]
    return {
        "GPUs": num_gpus,
        "students, teachers a node": f"{plant.students_per_node}, {plant.teachers_per_node}",
        "tokens a step": tokens[best],
        "tokens/s": tokens[best] / course.step_s,
        "waiting": course.waiting,
        "straggling": course.straggling,
        "teachers busy": course.busy,
        "GB a step and GPU, network": _network_bytes(plant, nodes) / 1e9,
        "GB/s of a node's host memory": _host_bytes(plant) / course.step_s / 1e9,
        "messages/s of a socket": course.messages_per_s,
    }


def _tokens_per_step(num_students: int) -> int:
    return max(TOKENS_PER_STEP, num_students * TOKENS)


def plant_of(nodes: int, students: int, hardware: Hardware) -> Plant:
    """Return the ranks and the seconds of Qwen2.5 7B -> 1.5B on nodes of eight GPUs, by arithmetic."""
    teacher, student = (shape.backbone_parameters for shape in (QWEN.teacher, QWEN.student))
    speed = hardware.flops * hardware.share
    heads = [QWEN.student.hidden_size, QWEN.teacher.hidden_size, QWEN.teacher.hidden_size, QWEN.student.hidden_size]
    supervised = SUPERVISED * TOKENS * QWEN.vocab_size
    # Forward, recomputed forward and backward of the student; its head's three products and the frozen heads' one each.
    work = (8 * student * TOKENS + 6 * heads[0] * supervised + 2 * sum(heads[1:]) * supervised) / speed
    plant = Plant(
        num_nodes=nodes,
        students_per_node=students,
        teachers_per_node=8 - students,
        micro_batches=ceil(_tokens_per_step(nodes * students) / TOKENS / (nodes * students)),
        look_ahead=2,
        work_s=work,
        update_s=0.0,
        answer_s=tuple(2 * size * TOKENS / speed for size in (teacher, teacher, student)),
        spread=SPREAD,
    )
    # Weights travel within a step's work where it is long enough to hide them, and bind where it is not.
    gathering = (
        _network_bytes(plant, nodes) / plant.micro_batches / (hardware.network if nodes > 1 else hardware.nvlink)
    )
    return replace(plant, work_s=max(plant.work_s, gathering))


def _network_bytes(plant: Plant, nodes: int) -> float:
    """Return what one GPU receives in a step: ZeRO-3 gathers 16-bit weights twice and scatters gradients, each time."""
    students = nodes * plant.students_per_node
    weights = 2 * (QWEN.student.backbone_parameters + QWEN.vocab_size * QWEN.student.hidden_size)
    return 3 * weights * (students - 1) / students * plant.micro_batches


def _host_bytes(plant: Plant) -> float:
    """Return what payloads take of a node's memory in a step: written once by a teacher, read once by a student."""
    hidden = 2 * (2 * QWEN.teacher.hidden_size + QWEN.student.hidden_size)
    return 2 * SUPERVISED * TOKENS * hidden * plant.micro_batches * plant.students_per_node


def _print(title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(*(str(name) for name in rows[0]), title=title)
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    Console(width=160).print(table)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
