"""`deltakd plan`: a recipe and some hardware become memory, time and the split between students and teachers.

Costs milliseconds, loads nothing and imports no torch. Left out: validation, checkpoints, the start, stragglers, and
rows that do not fill a micro-batch. The data is not read: which share of the tokens is supervised, and how long
documents are, is assumed and said.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, gcd
from typing import Any

from deltakd.base.errors import RunError
from deltakd.plan.advice import Change, advise, would_fit
from deltakd.plan.facts import Run, read_run
from deltakd.plan.hardware import choose_hardware
from deltakd.plan.split import Cluster, Split, fastest, splits
from deltakd.plan.work import Work, traffic, work
from deltakd.recipe.checks import check_recipe
from deltakd.recipe.load import load

NARROW = 256  # at 128 runs were 1.8 to 2.7 times as slow as planned, at 384 within 20% (docs/results/plan.md)


@dataclass(frozen=True)
class Plan:
    """What a run takes, by the fastest split that fits, and what else was looked at."""

    run: Run
    cluster: Cluster
    best: Split
    found: Sequence[Split]
    work: Work
    traffic: Sequence[dict[str, Any]]
    changes: Sequence[Change]
    notes: Sequence[str]

    @property
    def num_students(self) -> int:
        """Student ranks of all nodes."""
        return self.best.students * (1 if self.run.recipe.engine.name == "single" else self.cluster.num_nodes)

    @property
    def tokens_per_s(self) -> float:
        """Tokens that all students take a second."""
        return self.run.recipe.train.tokens_per_step / self.best.step_s

    @property
    def hours(self) -> float:
        """All of train.steps."""
        return self.run.recipe.train.steps * self.best.step_s / 3600

    def report(self) -> dict[str, Any]:
        """Return everything as plain values; bytes and seconds."""
        tokens, micro_batches = self.run.micro_batch(self.num_students)
        return {
            "hardware": asdict(self.cluster.hardware),
            "accelerators_per_node": self.cluster.per_node,
            "nodes": self.cluster.num_nodes,
            "student": self.run.student.name,
            "student_parameters": self.run.student.num_parameters,
            "frozen": {role: one.weights for role, one in self.run.frozen.items()},
            "payload": self.run.payload if self.run.frozen else None,
            "assumed": {"supervised": self.run.supervised, "document_tokens": self.run.document},
            "tokens_per_micro_batch": tokens,
            "micro_batches_of_a_student": micro_batches,
            "split": asdict(self.best) | {"binds": self.best.binds},
            "splits": [
                {"students": s.students, "teachers": s.teachers, "step_s": s.step_s, "lacking": s.lacking}
                for s in self.found
            ],
            "micro_batch": asdict(self.work),
            "payloads": list(self.traffic),
            "tokens_per_s": self.tokens_per_s,
            "hours": self.hours,
            "changes": [asdict(change) for change in self.changes],
            "notes": list(self.notes),
        }


def plan(
    name: str,
    overrides: Sequence[str],
    stage: str | None = None,
    gpus: str | None = None,
    nodes: int = 1,
    hardware_file: str | None = None,
    supervised: float = 0.6,
    document: int | None = None,
) -> Plan:
    """Plan a recipe or one of its training stages. Raises RunError with the number if nothing fits."""
    if not 0 < supervised <= 1 or nodes < 1 or (document is not None and document < 1):
        typed = f"--supervised {supervised:g}, --nodes {nodes}" + (
            "" if document is None else f", --document {document}"
        )
        raise RunError(f"plan: {typed}. Write a share above 0 and at most 1, and numbers above 0.")
    loaded = load(name, overrides, stage)
    recipe = loaded.recipe
    check_recipe(recipe, loaded.where)
    hardware, count = choose_hardware(gpus, hardware_file)
    run = read_run(name, overrides, recipe, loaded.where, supervised, document)
    refuse_unsplittable(run, loaded.where("teachers.tensor_parallel"))
    cluster = Cluster(hardware, count, nodes)
    found = splits(run, cluster)
    if not found:
        raise RunError(_too_few(run, cluster, loaded.where("teachers")))
    best = fastest(found)
    if best is None:
        raise RunError(_refusal(run, cluster, found, loaded.where("train")))
    num_students = best.students * (1 if recipe.engine.name == "single" else nodes)
    return Plan(
        run,
        cluster,
        best,
        found,
        work(run, num_students),
        traffic(run, num_students, best.students, hardware),
        advise(run, cluster, best),
        _notes(run, cluster, best, num_students),
    )


def refuse_unsplittable(run: Run, where: str) -> None:
    """Raise RunError where the run itself would: heads that do not split over so many processes."""
    shards = run.recipe.teachers.tensor_parallel if run.asks_service else 1
    for one in run.frozen.values():
        if gcd(one.shape.num_heads, one.shape.num_kv_heads) % shards:
            raise RunError(
                f"{where}: the {one.shape.num_heads} attention heads and {one.shape.num_kv_heads} key-value heads of "
                f"{one.shape.name} do not split over {shards} processes. Write a number that divides both."
            )


def _too_few(run: Run, cluster: Cluster, where: str) -> str:
    teachers = run.recipe.teachers
    least = teachers.per_node if teachers.serves is not None else teachers.tensor_parallel
    return (
        f"{where}: teachers of {least} processes leave none of a node's {cluster.per_node} accelerators to train. "
        f"Plan with --gpus of {least + 1} or more, or let fewer serve."
    )


def _refusal(run: Run, cluster: Cluster, found: Sequence[Split], where: str) -> str:
    """Say what does not fit, of the split that lacks least, and what would."""
    least = min(found, key=lambda split: max(part.on_device for part in split.memory.values()))
    change = would_fit(run, cluster)
    hardware = cluster.hardware
    shape = f"{cluster.num_nodes} x {cluster.per_node}x{hardware.name}"
    if change:
        todo = f"Write {change.setting}, which fits"
    elif least.lacking and least.lacking.startswith("a teacher process"):  # which more of them would not make smaller
        todo = "Take larger accelerators, smaller models, or frozen ones in 8 bit (docs/adapting.md, section 6)"
    elif run.recipe.engine.name == "single":  # which takes one of them
        todo = "Take a larger accelerator, another engine, or a smaller model"
    else:
        todo = "Take larger or more accelerators, or a smaller model"
    return f"{where}: the run does not fit {shape}: {least.lacking}. {todo}."


def _notes(run: Run, cluster: Cluster, best: Split, num_students: int) -> list[str]:
    """Say what a reader should know before believing the numbers."""
    recipe, notes = run.recipe, []
    tokens, micro_batches = run.micro_batch(num_students)
    if best.is_beside and recipe.teachers.tensor_parallel > 1:
        notes.append("teachers.tensor_parallel is no gain beside a student: all parts are on its device")
    if best.teachers and best.teachers != recipe.teachers.per_node:
        said = next((s for s in splits(run, cluster) if s.teachers == recipe.teachers.per_node), None)
        of = "does not fit" if said is None or said.lacking else f"takes {said.step_s:.3g} s a step"
        notes.append(f"the recipe's teachers.per_node={recipe.teachers.per_node} {of}: write {best.teachers}")
    room = tokens * micro_batches * num_students
    if room > 1.1 * recipe.train.tokens_per_step:
        notes.append(f"micro-batches have room for {room:,} tokens a step, which has {recipe.train.tokens_per_step:,}")
    if run.recipe.engine.name == "single" and cluster.per_node * cluster.num_nodes > 1:
        used = f"of {cluster.per_node * cluster.num_nodes} accelerators one is used"
        notes.append(f"engine single trains in one process: {used}")
    shapes = [run.student, *(one.shape for one in run.frozen.values())]
    if (positions := min(shape.max_positions or 10**9 for shape in shapes)) < recipe.data.max_tokens:
        notes.append(f"data.max_tokens is {recipe.data.max_tokens:,}, a model knows {positions:,} positions")
    if run.student.hidden_size < NARROW:
        notes.append(f"hidden size {run.student.hidden_size}: so narrow a model takes twice this time and more")
    if recipe.data.layout == "padded":
        notes.append("layout padded: padding counts as tokens here, and is computed")
    host = ceil(best.students * run.student.num_parameters * run.width / 2**30)
    stage = getattr(recipe.engine, "zero_stage", 0)
    if stage != 3 and recipe.engine.name != "single" and host > 0.5 * cluster.hardware.host_memory_gib:
        notes.append(f"every student rank first loads the model whole: {host:,} GiB of a node's memory")
    return notes
