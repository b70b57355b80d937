"""Students and teachers over a node's accelerators: what each split takes, and which is the fastest that fits.

A step takes what its slower side takes, since students ask ahead; with look_ahead 0 both add up. Stragglers,
validation, checkpoints and the start are left out (docs/scaling.md simulates the first).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from deltakd.plan.facts import Run
from deltakd.plan.hardware import GB, GIB, Hardware
from deltakd.plan.memory import Memory, student_memory, teacher_memory
from deltakd.plan.work import Work, step_bytes, update_s, work, writing_s


@dataclass(frozen=True)
class Cluster:
    """Accelerators of one kind, alike on every node."""

    hardware: Hardware
    per_node: int
    num_nodes: int


@dataclass(frozen=True)
class Split:
    """One way to share a node's accelerators out, with what a step takes and every process holds."""

    students: int  # of a node
    teachers: int  # processes of a node; 0: none, or beside the only student
    is_beside: bool
    student_s: float  # of a step: arithmetic, memory and copies of payloads
    teacher_s: float
    gather_s: float  # of a step, hidden behind the student's compute where it is shorter
    update_s: float
    writing_s: float
    step_s: float
    memory: dict[str, Memory]
    host_bytes: float  # of a node
    lacking: str | None  # why it does not fit
    is_starved: bool  # the student waits for its memory, not for its arithmetic

    @property
    def binds(self) -> str:
        """What a step waits for."""
        if self.writing_s > max(self.student_s, self.teacher_s, self.gather_s):
            return "writing"
        if self.teacher_s > max(self.student_s, self.gather_s):
            return "teachers"
        if self.gather_s > self.student_s:
            return "network"
        return "device memory's speed" if self.is_starved else "student compute"


def splits(run: Run, cluster: Cluster) -> list[Split]:
    """Return all splits of a node that the settings allow, whether or not they fit; none if it is too small for any."""
    count, shards = cluster.per_node, run.recipe.teachers.tensor_parallel
    if run.recipe.engine.name == "single":
        return [_split(run, cluster, 1, 0)]
    if not run.asks_service:
        return [_split(run, cluster, count, 0)]
    if count == 1:
        return [_split(run, cluster, 1, 0)]
    numbers = range(shards, count, shards)
    if run.recipe.teachers.serves is not None:  # a list for each teacher: their number is the recipe's
        numbers = range(run.recipe.teachers.per_node, min(count, run.recipe.teachers.per_node + 1))
    return [_split(run, cluster, count - number, number) for number in numbers]


def fastest(found: Sequence[Split]) -> Split | None:
    """Return the fastest split that fits; None if none does."""
    fitting = [split for split in found if split.lacking is None]
    return min(fitting, key=lambda split: split.step_s) if fitting else None


def _split(run: Run, cluster: Cluster, students: int, teachers: int) -> Split:
    hardware, num_students = cluster.hardware, students * (1 if _alone(run) else cluster.num_nodes)
    is_beside = run.asks_service and teachers == 0
    done, (_, micro_batches) = work(run, num_students), run.micro_batch(num_students)
    student = _student_s(run, done, hardware) * micro_batches
    between = hardware.between(1 if _alone(run) else cluster.num_nodes, students)
    gather = (done.gather_bytes * micro_batches + step_bytes(run, num_students)) / between
    answers = _answers_s(run, done, cluster, students, teachers) * micro_batches
    if run.frozen and run.recipe.references.source == "in_process":
        student, answers = student + sum(_answer_s(run, done, role, hardware) for role in run.frozen) * micro_batches, 0
    busy = max(student, gather)
    shared = is_beside and not hardware.is_cpu  # one device computes both
    together = busy + answers if shared or run.recipe.teachers.look_ahead == 0 else max(busy, answers)
    update, writing = update_s(run, num_students, students, hardware), writing_s(run, num_students, hardware)
    memory = {"student": student_memory(run, num_students, hardware)}
    roles = run.recipe.teachers.serves if run.recipe.teachers.serves and not is_beside else [list(run.frozen)]
    for index, served in enumerate(roles if run.asks_service else []):
        needed = [role for role in served if role in run.frozen]
        name = "teacher" if len(roles) == 1 else f"teacher {index}"
        memory[name] = teacher_memory(run, needed, num_students, hardware) if needed else Memory({}, {})
    host = students * memory["student"].on_host
    # Processes of a teacher of each kind: beside a student all parts of it, on the student's own device.
    parts = run.recipe.teachers.tensor_parallel if is_beside else max(1, teachers) // max(1, len(memory) - 1)
    return Split(
        students,
        teachers,
        is_beside,
        student,
        answers,
        gather,
        update,
        writing,
        together + update + writing,
        memory,
        host,
        _lacking(cluster, students, parts, is_beside, memory, host),
        done.hbm_bytes / (hardware.hbm_gbs * GB) > done.student_flops / hardware.flops(run.recipe.models.dtype),
    )


def _alone(run: Run) -> bool:
    return run.recipe.engine.name == "single"


def _student_s(run: Run, done: Work, hardware: Hardware) -> float:
    """Return the seconds of a micro-batch: arithmetic, or memory where that takes longer; then the payload's copy."""
    compute = done.student_flops / hardware.flops(run.recipe.models.dtype)
    return max(compute, done.hbm_bytes / (hardware.hbm_gbs * GB)) + done.payload_bytes / (hardware.pcie_gbs * GB)


def _answer_s(run: Run, done: Work, role: str, hardware: Hardware, shards: int = 1) -> float:
    """Return the seconds of a model's answer on one accelerator, or on several that hold parts of it."""
    compute = done.frozen_flops[role] / hardware.flops(run.recipe.models.dtype)
    seconds = max(compute, done.answer_hbm_bytes[role] / (hardware.hbm_gbs * GB)) / shards
    if shards > 1:  # two sums of hidden states in each layer
        shape = run.frozen[role].shape
        tokens = run.recipe.train.tokens_per_micro_batch
        moved = 4 * shape.num_layers * tokens * shape.hidden_size * run.width * (shards - 1) / shards
        seconds += moved / hardware.between(1, 1)
    return seconds


def _answers_s(run: Run, done: Work, cluster: Cluster, students: int, teachers: int) -> float:
    """Return the seconds that a node's busiest teacher takes for one micro-batch of every student of its node."""
    if not run.asks_service:
        return 0.0
    # Beside a student all processes of a teacher are on its device: none of them is a gain.
    hardware, shards = cluster.hardware, run.recipe.teachers.tensor_parallel if teachers else 1
    ranks = max(1, teachers // shards)
    sent = done.payload_bytes / (hardware.pcie_gbs * GB)
    each = {role: _answer_s(run, done, role, hardware, shards) for role in run.frozen}
    serves = run.recipe.teachers.serves if teachers else None
    if serves is None:
        return students * (sum(each.values()) + sent) / ranks
    loads = [sum(each[r] / sum(r in other for other in serves) for r in names if r in each) for names in serves]
    return students * (max(loads) + sent / ranks)


def _lacking(
    cluster: Cluster, students: int, parts: int, is_beside: bool, memory: dict[str, Memory], host: float
) -> str | None:
    """Say which process does not fit, with the numbers; None if all do."""
    hardware = cluster.hardware
    serving = parts * sum(part.on_device for name, part in memory.items() if name != "student")
    if hardware.is_cpu:  # all processes and what lies in host memory share it
        whole = students * memory["student"].on_device + host + serving
        return _short("the whole node", whole, hardware.usable_bytes, hardware)
    held = {name: part.on_device for name, part in memory.items()}
    if is_beside:
        held = {"the process with its teacher beside it": held["student"] + serving}
    for name, size in held.items():
        label = name if is_beside else f"a {name} process"
        if lacking := _short(label, size, hardware.usable_bytes, hardware):
            return lacking
    return _short("a node's host memory", host, hardware.host_memory_gib * GIB * 0.9, hardware)


def _short(what: str, size: float, limit: float, hardware: Hardware) -> str | None:
    if size <= limit:
        return None
    return f"{what} needs {size / GIB:,.1f} GiB, {hardware.name} has {limit / GIB:,.1f} to give"
