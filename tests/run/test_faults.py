"""Teachers come, die, freeze and come back, and the losses do not change by a bit: real processes and real signals."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.run.running import DEADLINE_S, ZERO_3, Running, cmdline, curve, same_weights, wait_until

REPOSITORY = Path(__file__).parents[2]
QUICK = ("teachers.silent_s=1.5", "teachers.heartbeat_s=0.2")
STEPS = 40


@pytest.fixture(scope="module")
def undisturbed(lab):
    return curve(lab.train("undisturbed", f"train.steps={STEPS}"))


def test_a_killed_teacher_comes_back_and_the_losses_do_not_change_by_a_bit(lab, undisturbed):
    running = Running(lab, "killed", f"train.steps={STEPS}", *QUICK)
    for step in (3, 6):
        running.reaches(step)
        os.kill(running.teachers()[-1], signal.SIGKILL)
        running.has_had_teachers(1 + step // 3)
    assert running.ends() == undisturbed
    assert same_weights(lab, "killed", "undisturbed")
    assert len(running.teachers(alive=False)) == 3
    assert running.log.read_text().count("starting it again") == 2
    shown = lab.run(sys.executable, "-m", "deltakd", "watch", str(lab.folder / "runs" / "killed"), "--once").stdout
    assert "ended" in shown and "serving" not in shown and "finished" in shown, shown
    assert "teacher 0" not in shown.splitlines()[0] and "3 starts of teachers" in shown, shown
    refused = lab.run(sys.executable, "-m", "deltakd", "watch", str(lab.folder))
    assert refused.returncode == 2 and "no run has started here" in refused.stderr


@pytest.mark.parametrize("frozen_s", [pytest.param(2.2, marks=pytest.mark.soak), 20])
def test_a_frozen_teacher_is_replaced_by_another_and_by_its_supervisor(lab, undisturbed, frozen_s):
    """SIGSTOP: one that wakes up finds its requests answered; one that does not is killed and started again."""
    name = f"frozen_{round(frozen_s)}"
    running = Running(lab, name, f"train.steps={STEPS}", "teachers.per_node=2", *QUICK, ranks=3)
    running.reaches(2)
    running.has_had_teachers(2)
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
def joining(lab, name, *prefix):
    """A teacher that joins a run from anywhere: over TCP, with the keys that lie in the run's directory."""
    command = [*prefix, sys.executable, str(REPOSITORY / "launchers/teacher.py"), "--recipe", str(lab.recipe)]
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


@pytest.mark.soak  # with more students: tests/run/test_resume.py
def test_when_no_teacher_can_come_back_the_run_ends_with_one_sentence(lab):
    running = Running(lab, "given_up", "train.steps=100000", "teachers.restarts=1", *QUICK)
    for step, teachers in ((2, 2), (4, 2)):
        running.reaches(step)
        os.kill(running.teachers()[-1], signal.SIGKILL)
        running.has_had_teachers(teachers)
    assert running.launcher.wait(DEADLINE_S) == 2
    (said,) = running.said()
    assert "no restart is left" in said and "teacher 0" in said and ".log" in said, said


@pytest.mark.soak
def test_a_teacher_killed_or_stopped_every_five_seconds_changes_no_bit_in_300_steps(lab):
    expected = curve(lab.train("calm", "train.steps=300", ranks=1))
    running = Running(
        lab, "stormy", "train.steps=300", "teachers.per_node=3", "teachers.restarts=1000", *QUICK, ranks=4
    )
    draw, hits = random.Random(0), []
    while running.launcher.poll() is None:
        time.sleep(5)  # the storm's own rhythm
        if running.lines("steps.jsonl") and (alive := running.teachers()):
            hits.append(draw.choice([signal.SIGKILL, signal.SIGSTOP]))
            with suppress(ProcessLookupError):  # it has ended by itself since
                os.kill(draw.choice(alive), hits[-1])
    assert running.ends() == expected and same_weights(lab, "stormy", "calm")
    assert len(hits) >= 3, hits
    print(f"{len(hits)} teachers killed or stopped: {[hit.name for hit in hits]}")


@pytest.fixture
def other_host():
    """A host of its own on this machine: another network, and another /dev/shm."""
    name, link = "deltakd-other", "10.213.77"
    setup = [
        f"ip netns add {name}",
        f"ip link add dk-here type veth peer name dk-there netns {name}",
        f"ip addr add {link}.1/24 dev dk-here",
        "ip link set dk-here up",
        f"ip -n {name} addr add {link}.2/24 dev dk-there",
        f"ip -n {name} link set dk-there up",
    ]
    subprocess.run(["ip", "netns", "del", name], capture_output=True)  # of a test that was killed
    if os.geteuid() or any(subprocess.run(command.split(), capture_output=True).returncode for command in setup):
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip("no second host: making one needs root and iproute2")
    own = f'mount -t tmpfs tmpfs /dev/shm && ip -o addr | grep -q {link}.2 && exec "$@"'
    yield (
        f"{link}.1",
        ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "sh", "-c", f"hostname other; {own}", "sh"],
    )
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.soak
def test_a_teacher_on_another_host_gives_the_same_losses_bit_for_bit(lab, undisturbed, other_host):
    address, prefix = other_host
    overrides = ["teachers.restarts=0", f"teachers.host={address}", *QUICK]
    running = Running(lab, "elsewhere", f"train.steps={STEPS}", *overrides, ranks=2)
    running.reaches(2)
    os.kill(running.teachers()[0], signal.SIGKILL)
    with joining(lab, "elsewhere", *prefix) as joined:
        assert running.ends() == undisturbed
        assert joined.wait(60) == 0
    teachers = [line for line in running.lines("processes.jsonl") if line["role"] == "teacher"]
    assert teachers[-1]["host"] == "other" and len(teachers) == 2


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_fifty_runs_killed_at_random_moments_leave_nothing(lab):
    """Students, teachers, supervisors, launchers, or all at once, from the first import to the middle of training."""
    draw, before, tally = random.Random(0), set(Path("/dev/shm").iterdir()), []
    for number in range(50):
        ranks = draw.choice([None, 1, 3])
        start = {"ranks": ranks, "launcher": draw.choice(["deepspeed", "local.sh"])}
        own = ["train.steps=100000", "checkpoints.every_steps=5", *([ZERO_3] if ranks == 3 else [])]
        running = Running(lab, f"random_{number}", *own, **start)
        if draw.random() < 0.6:  # in the middle of training; the others while they start
            running.reaches(draw.randint(1, 30))
        time.sleep(draw.uniform(0, 5))
        family = running.family()
        # The janitor's own death leaves what the next start on the node sweeps: tests/base/test_scratch.py.
        targets = [process for process in family if "-S" not in cmdline(process)]
        victims = targets if draw.random() < 0.3 else [draw.choice(targets)]
        for process in victims:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(subprocess.TimeoutExpired):  # a teacher may come back and the run go on: then all is ended
            running.launcher.wait(5)
        running.launcher.kill()
        running.launcher.wait()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive, (number, [cmdline(process) for process in alive])
        wait_until(lambda: set(Path("/dev/shm").iterdir()) <= before, "an empty /dev/shm")
        tally.append((ranks, len(victims), len(family), len(running.lines("steps.jsonl"))))
    print(tally)
