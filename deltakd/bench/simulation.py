"""A discrete-event simulation of students and teachers: what a step takes when numbers of either grow.

What is simulated is what `teacher/client.py` does: a student asks `look_ahead` micro-batches ahead, each question
goes to the teacher of its node with the fewest open ones, teachers answer in turn, and all students end a step at once.
Seconds of work are given; what they come to when everyone waits for someone is what is asked.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp


@dataclass(frozen=True)
class Plant:
    """Ranks, and how long each kind of work takes them. Seconds are those of one micro-batch."""

    num_nodes: int
    students_per_node: int
    teachers_per_node: int
    micro_batches: int  # of a student, a step
    look_ahead: int
    work_s: float  # forward, loss and backward
    update_s: float  # of a step: gradients, norm and the optimizer, when all have come
    answer_s: tuple[float, ...]  # of each frozen model; all teachers serve all
    spread: float = 0.0  # standard deviation of all of these, as a share


@dataclass(frozen=True)
class Course:
    """What a plant's steps took."""

    step_s: float
    waiting: float  # share of the students' time in which a payload was missing
    straggling: float  # share in which they were done before the slowest
    busy: float  # share of the teachers' time
    messages_per_s: float  # of the busiest socket: a student rank's, both ways


@dataclass(frozen=True)
class Span:
    """What one rank did from one moment to another, in seconds since the start."""

    rank: str  # "student 0", "teacher 1"
    work: str  # ask (takes no time), work, update, or "answer 2" for the third frozen model
    index: int  # of the micro-batch, from the first step on; of the step for update
    begins: float
    ends: float


@dataclass
class _Student:
    node: int
    rank: str
    index: int = 0  # of the micro-batch that it works on, from the first step on
    asked: int = 0
    missing: dict[int, int] = field(default_factory=dict)  # answers to come, by micro-batch
    since: float | None = None  # when it began to wait for one
    waited_s: float = 0.0
    done_s: float = 0.0  # when it was done with the step


@dataclass
class _Teacher:
    rank: str
    queue: deque[tuple[_Student, int, int, float]] = field(default_factory=deque)  # for whom and what, model, seconds
    busy_s: float = 0.0


class _Run:
    def __init__(self, plant: Plant, steps: int, seed: int) -> None:
        self._plant, self._steps = plant, steps
        self._draw = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.now = self.straggled_s = 0.0
        here, there = range(plant.students_per_node), range(plant.teachers_per_node)
        self.students = [_Student(node, f"student {rank}") for node in range(plant.num_nodes) for rank in here]
        self.teachers = [[_Teacher(f"teacher {rank}") for rank in there] for _ in range(plant.num_nodes)]
        self._arrived = 0
        self.finished = 0  # steps
        self.spans: list[Span] = []

    def _later(self, seconds: float, then: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, then))

    def _note(self, rank: str, work: str, index: int, seconds: float = 0.0) -> None:
        self.spans.append(Span(rank, work, index, self.now, self.now + seconds))

    def _take(self, seconds: float) -> float:
        spread = self._plant.spread
        return seconds * exp(self._draw.gauss(-(spread**2) / 2, spread)) if spread else seconds

    def run(self) -> None:
        for student in self.students:
            self._need(student)
        while self.finished < self._steps:
            self.now, _, then = heapq.heappop(self._events)
            then()

    def _need(self, student: _Student) -> None:
        """A student turns to its next micro-batch: it asks as far ahead as it may, and waits for this one."""
        plant = self._plant
        while student.asked <= student.index + plant.look_ahead:
            if plant.answer_s and plant.teachers_per_node:
                student.missing[student.asked] = len(plant.answer_s)
                self._note(student.rank, "ask", student.asked)
                for model, seconds in enumerate(plant.answer_s):
                    teacher = min(self.teachers[student.node], key=lambda one: len(one.queue))
                    teacher.queue.append((student, student.asked, model, self._take(seconds)))
                    if len(teacher.queue) == 1:
                        self._answer(teacher)
            student.asked += 1
        student.since = self.now
        self._work_if_there(student)

    def _answer(self, teacher: _Teacher) -> None:
        student, index, model, seconds = teacher.queue[0]
        self._note(teacher.rank, f"answer {model}", index, seconds)

        def answered() -> None:
            teacher.queue.popleft()
            teacher.busy_s += seconds
            if teacher.queue:
                self._answer(teacher)
            student.missing[index] -= 1
            if not student.missing[index]:
                del student.missing[index]
                self._work_if_there(student)

        self._later(seconds, answered)

    def _work_if_there(self, student: _Student) -> None:
        if student.since is None or student.index in student.missing:
            return
        student.waited_s += self.now - student.since
        student.since = None
        seconds = self._take(self._plant.work_s)
        self._note(student.rank, "work", student.index, seconds)
        self._later(seconds, lambda: self._worked(student))

    def _worked(self, student: _Student) -> None:
        student.index += 1
        if student.index % self._plant.micro_batches:
            self._need(student)
            return
        student.done_s = self.now
        self._arrived += 1
        if self._arrived == len(self.students):
            self._arrived = 0
            self.straggled_s += sum(self.now - one.done_s for one in self.students)
            for one in self.students:
                self._note(one.rank, "update", self.finished, self._plant.update_s)
            self._later(self._plant.update_s, self._updated)

    def _updated(self) -> None:
        self.finished += 1
        for student in self.students:
            self._need(student)


def simulate(plant: Plant, steps: int = 20, seed: int = 17) -> Course:
    """Let a plant run for some steps from nothing."""
    run = _Run(plant, steps, seed)
    run.run()
    whole = run.now * len(run.students)
    teachers = [teacher for node in run.teachers for teacher in node]
    asks = len(plant.answer_s) if plant.teachers_per_node else 0
    return Course(
        step_s=run.now / steps,
        waiting=sum(student.waited_s for student in run.students) / whole,
        straggling=run.straggled_s / whole,
        busy=sum(teacher.busy_s for teacher in teachers) / (run.now * len(teachers)) if teachers else 0.0,
        messages_per_s=2 * asks * plant.micro_batches * steps / run.now,
    )


def timeline(plant: Plant, steps: int) -> list[Span]:
    """Return who did what in the first steps of a plant of one node, in the order in which it began."""
    run = _Run(plant, steps, seed=17)
    run.run()
    return run.spans
