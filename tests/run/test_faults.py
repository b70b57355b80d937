"""Teachers come, die, freeze and come back, and the losses do not change by a bit: real processes and real signals."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
LOSSES = ("loss", "cross_entropy", "divergence", "grad_norm")
QUICK = ("teachers.silent_s=1.5", "teachers.heartbeat_s=0.2")
DEADLINE_S = 240


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)


class Running:
    """A run in the background, its teachers and its steps as they stand."""

    def __init__(self, lab, name, *overrides, ranks=None):
        self.lab, self.name = lab, name
        self.log = lab.folder / f"{name}.log"
        command = lab.command(f"run={name}", *overrides, ranks=ranks)
        with self.log.open("wb") as output:
            self.launcher = subprocess.Popen(
                command, cwd=lab.folder, env=lab.environment(), stdout=output, stderr=subprocess.STDOUT
            )

    def lines(self, file):
        path = self.lab.folder / "runs" / self.name / file
        return self.lab.lines(self.name, file) if path.exists() else []

    def reaches(self, step):
        wait_until(lambda: len(self.lines("steps.jsonl")) >= step or self.launcher.poll() is not None, f"step {step}")
        assert self.launcher.poll() is None, self.log.read_text()[-3000:]

    def teachers(self, alive=True):
        pids = [line["pid"] for line in self.lines("processes.jsonl") if line["role"] == "teacher"]
        return [pid for pid in pids if not alive or psutil.pid_exists(pid)]

    def status(self):
        """What the student rank last said of its teachers."""
        return json.loads((self.lab.folder / "runs" / self.name / "status" / "student-0.json").read_text())

    def ends(self):
        assert self.launcher.wait(DEADLINE_S) == 0, self.log.read_text()[-3000:]
        return curve(self.lines("steps.jsonl"))


def curve(steps):
    return [[step[name] for name in LOSSES] for step in steps]


STEPS = 40


@pytest.fixture(scope="module")
def undisturbed(lab):
    return curve(lab.train("undisturbed", f"train.steps={STEPS}", ranks=1))


def same_weights(lab, one, other):
    first, second = (load_file(lab.folder / "runs" / run / "export" / "model.safetensors") for run in (one, other))
    return all(first[name].equal(second[name]) for name in first)


def test_a_killed_teacher_comes_back_and_the_losses_do_not_change_by_a_bit(lab, undisturbed):
    running = Running(lab, "killed", f"train.steps={STEPS}", *QUICK, ranks=1)
    for step in (3, 6):
        running.reaches(step)
        os.kill(running.teachers()[-1], signal.SIGKILL)
        wait_until(lambda: len(running.teachers(alive=False)) >= 1 + (step // 3), "a new teacher")  # noqa: B023
    assert running.ends() == undisturbed
    assert same_weights(lab, "killed", "undisturbed")
    assert len(running.teachers(alive=False)) == 3
    assert running.log.read_text().count("starting it again") == 2


@pytest.mark.parametrize("frozen_s", [2.2, 20])
def test_a_frozen_teacher_is_replaced_by_another_and_by_its_supervisor(lab, undisturbed, frozen_s):
    """SIGSTOP: one that wakes up finds its requests answered; one that does not is killed and started again."""
    name = f"frozen_{round(frozen_s)}"
    running = Running(lab, name, f"train.steps={STEPS}", "teachers.per_node=2", *QUICK, ranks=3)
    running.reaches(2)
    wait_until(lambda: len(running.teachers()) == 2, "two teachers")
    victim = running.teachers()[0]
    os.kill(victim, signal.SIGSTOP)
    waker = threading.Timer(frozen_s, lambda: psutil.pid_exists(victim) and os.kill(victim, signal.SIGCONT))
    waker.start()
    assert running.ends() == undisturbed
    waker.cancel()
    counts = running.status()["counts"]
    assert counts["silent"] >= 1 and counts["asked_again"] >= 1, counts


def test_models_on_three_teachers_give_the_same_losses_bit_for_bit(lab, undisturbed):
    serves = "teachers.serves=[[teacher], [teacher_raw, student_raw], [teacher, teacher_raw, student_raw]]"
    steps = lab.train("apart", f"train.steps={STEPS}", "teachers.per_node=3", serves, ranks=4)
    assert curve(steps) == undisturbed
    teachers = [line for line in lab.lines("apart", "processes.jsonl") if line["role"] == "teacher"]
    models = {line["rank"]: line["models"] for line in teachers}
    assert models == {0: ["teacher"], 1: ["student_raw", "teacher_raw"], 2: ["student_raw", "teacher", "teacher_raw"]}


@contextmanager
def joining(lab, name):
    """A teacher that joins a run from anywhere: over TCP, with the keys that lie in the run's directory."""
    command = [sys.executable, str(REPOSITORY / "launchers/teacher.py"), "--recipe", str(lab.recipe)]
    command += ["--run", str(lab.folder / "runs" / name), "--index", "7", *QUICK]
    with (lab.folder / f"{name}.joined.log").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=lab.folder, env=lab.environment(), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_teachers_from_elsewhere_join_over_tcp_and_leave_without_harm(lab, undisturbed):
    """The node's own teacher is killed for good; the run waits for one that joins, and, that killed, for another."""
    running = Running(lab, "joined", f"train.steps={STEPS}", "teachers.restarts=0", *QUICK, ranks=2)
    running.reaches(2)
    os.kill(running.teachers()[0], signal.SIGKILL)
    with joining(lab, "joined") as first:
        wait_until(lambda: running.teachers()[-1:] == [first.pid] or first.poll() is not None, "a teacher that joined")
        first.kill()
    with joining(lab, "joined") as second:
        assert running.ends() == undisturbed
        assert second.wait(60) == 0
    teachers = [line["rank"] for line in running.lines("processes.jsonl") if line["role"] == "teacher"]
    assert teachers == [0, 7, 7]
    assert not (lab.folder / "runs" / "joined" / "service").exists()


def test_when_no_teacher_can_come_back_the_run_ends_with_one_sentence(lab):
    running = Running(lab, "given_up", "train.steps=100000", "teachers.restarts=1", *QUICK, ranks=1)
    for step in (2, 4):
        running.reaches(step)
        victim = running.teachers()[-1]
        os.kill(victim, signal.SIGKILL)
        if step == 2:
            wait_until(lambda: running.teachers()[-1:] not in ([], [victim]), "a new teacher")  # noqa: B023
    assert running.launcher.wait(DEADLINE_S) == 2
    said = [line for line in running.log.read_text().splitlines() if line.startswith("deltakd: ")]
    assert len(said) == 1 and "no restart is left" in said[0] and "teacher 0" in said[0] and ".log" in said[0], said


@pytest.mark.soak
def test_a_teacher_killed_or_stopped_every_five_seconds_changes_no_bit_in_300_steps(lab):
    expected = curve(lab.train("calm", "train.steps=300", ranks=1))
    running = Running(
        lab, "stormy", "train.steps=300", "teachers.per_node=3", "teachers.restarts=1000", *QUICK, ranks=4
    )
    draw, hits = random.Random(0), []
    while running.launcher.poll() is None:
        time.sleep(5)
        if running.lines("steps.jsonl") and (alive := running.teachers()):
            hits.append(draw.choice([signal.SIGKILL, signal.SIGSTOP]))
            with_victim = draw.choice(alive)
            try:
                os.kill(with_victim, hits[-1])
            except ProcessLookupError:
                continue
    assert running.ends() == expected and same_weights(lab, "stormy", "calm")
    assert len(hits) >= 3, hits
    print(f"{len(hits)} teachers killed or stopped: {[hit.name for hit in hits]}")
