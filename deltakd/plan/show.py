"""A plan as tables in the terminal."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table

from deltakd.plan.hardware import GIB
from deltakd.plan.plan import Plan

_WIDE = 160


def show(plan: Plan) -> None:
    """Print a plan."""
    # A terminal knows its width; a pipe has none, and cuts nothing.
    console = Console() if Console().is_terminal else Console(width=_WIDE)
    console.print(Group(*_headline(plan), _memory(plan), _time(plan), _splits(plan)))
    if plan.traffic:
        console.print(_traffic(plan))
    for title, lines in (("To change", _changes(plan)), ("Notes", plan.notes)):
        if lines:
            console.print(f"{title}:", *(f"  {line}" for line in lines), sep="\n", highlight=False, markup=False)


def _headline(plan: Plan) -> list[str]:
    best, run, hardware = plan.best, plan.run, plan.cluster.hardware
    tokens, micro_batches = run.micro_batch(plan.num_students)
    teachers = _several(best.teachers, "teacher") if best.teachers else "its teacher beside it" * best.is_beside
    split = f"{_several(best.students, 'student')}{f', {teachers}' if teachers else ''} a node"
    share = _several(micro_batches, "micro-batch", "es")
    learnt = f"{run.supervised:.0%} of tokens supervised, documents of {run.document:,}"
    return [
        f"{plan.cluster.num_nodes} x {plan.cluster.per_node}x{hardware.name}: {split}; {_count(plan.tokens_per_s)} "
        f"tokens/s, {best.step_s:.3g} s a step, {plan.hours:,.3g} hours for {run.recipe.train.steps:,} steps",
        f"What binds: {best.binds}. A student takes {share} of {tokens:,} tokens a step (assumed: {learnt}).",
        "By arithmetic, not measured: docs/planning.md says what is left out, and how far runs were from it.",
    ]


def _memory(plan: Plan) -> Table:
    """One column for each process; what lies in host memory has rows of its own."""
    table = Table("GiB at the peak", *plan.best.memory, title="Memory of a process", title_justify="left")
    for where in ("device", "host"):
        names = [name for part in plan.best.memory.values() for name in getattr(part, where)]
        for name in dict.fromkeys(names):
            sizes = [getattr(part, where).get(name) for part in plan.best.memory.values()]
            table.add_row(name if where == "device" else f"in host memory: {name}", *(_gib(size) for size in sizes))
    table.add_section()
    hardware = plan.cluster.hardware
    table.add_row("on the device", *(_gib(part.on_device) for part in plan.best.memory.values()))
    limit = hardware.usable_bytes
    table.add_row(f"{hardware.name} has to give", *(_gib(limit) for _ in plan.best.memory))
    return table


def _time(plan: Plan) -> Table:
    best, done, hardware = plan.best, plan.work, plan.cluster.hardware
    _, micro_batches = plan.run.micro_batch(plan.num_students)
    table = Table("of a step", "seconds", "TFLOP", "GB of device memory", title="Time", title_justify="left")
    hbm = done.hbm_bytes * micro_batches / 1e9
    table.add_row("a student", _few(best.student_s), _few(done.student_flops * micro_batches / 1e12), _few(hbm))
    for role, flops in done.frozen_flops.items():
        read = done.answer_hbm_bytes[role] * micro_batches / 1e9
        table.add_row(f"{role}, a student's share", "", _few(flops * micro_batches / 1e12), _few(read))
    if best.teacher_s:
        table.add_row("a teacher", _few(best.teacher_s), "", "")
    if best.gather_s:
        moved = done.gather_bytes * micro_batches / 1e9
        table.add_row(f"between students ({_few(moved)} GB to each)", _few(best.gather_s), "", "")
    if best.writing_s:
        table.add_row("writing answers, on average", _few(best.writing_s), "", "")
    table.add_row("the update", _few(best.update_s), "", "")
    table.add_section()
    reached = done.student_flops * micro_batches / best.step_s / hardware.flops(plan.run.recipe.models.dtype)
    table.add_row("a step", _few(best.step_s), f"students busy {reached:.0%}", "")
    return table


def _splits(plan: Plan) -> Table:
    table = Table(
        "students, teachers a node", "seconds a step", "tokens/s", "binds", title="Splits", title_justify="left"
    )
    tokens = plan.run.recipe.train.tokens_per_step
    for split in plan.found:
        name = f"{split.students}, {split.teachers}{' <- the fastest that fits' if split is plan.best else ''}"
        table.add_row(name, _few(split.step_s), _count(tokens / split.step_s), split.lacking or split.binds)
    return table


def _traffic(plan: Plan) -> Table:
    titles = (
        "payload",
        "bytes/token",
        "arena, GiB",
        "PCIe, GB",
        "host memory, GB",
        "network, GB",
        "s of PCIe, network",
        "",
    )
    table = Table(
        *titles, title="Payloads of a step and node (network: where teachers are on other nodes)", title_justify="left"
    )
    for row in plan.traffic:
        chosen = "<- this run's" if row["payload"] == plan.run.payload else ""
        table.add_row(
            str(row["payload"]),
            _count(row["bytes_per_token"]),
            _gib(row["arena_bytes"]),
            *(_few(row[f"{way}_bytes"] / 1e9) for way in ("pcie", "host", "network")),
            f"{_few(row['pcie_s'])}, {_few(row['network_s'])}",
            f"not here: {row['refused']}" if row["refused"] else chosen,
        )
    return table


def _changes(plan: Plan) -> Sequence[str]:
    lines = []
    for change in plan.changes:
        faster = plan.best.step_s / change.step_s
        lines.append(f"{change.setting}: {faster:.2f} times as fast{f' ({change.note})' if change.note else ''}")
    return lines


def _several(number: int, what: str, ending: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else ending}"


def _gib(size: float | None) -> str:
    return "" if size is None else _few(size / GIB)


def _few(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _count(number: float) -> str:
    return f"{number:,.0f}"
