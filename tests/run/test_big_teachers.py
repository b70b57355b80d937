"""A teacher in several processes: the same numbers, the same faults survived, and nobody left behind."""

import os
import signal
import sys

import pytest

from tests.run.running import Running, curve, same_weights, wait_until

SPLIT = ("teachers.per_node=2", "teachers.tensor_parallel=2")
LONG = (*SPLIT, "train.steps=14", "references.dtype=float32")
QUICK = ("teachers.silent_s=1.5", "teachers.heartbeat_s=0.2")


@pytest.fixture(scope="module")
def undisturbed(lab):
    return curve(lab.train("big", *LONG))


def test_its_losses_are_those_of_a_whole_one_and_it_is_equal_to_itself(lab, undisturbed):
    """Beside the student, and on ranks of its own, of which the second only keeps a place."""
    whole = curve(lab.train("big_whole", *LONG[2:]))
    assert undisturbed != whole
    for mine, theirs in zip(undisturbed, whole, strict=True):
        # Hidden states differ by 1e-6: sums in another order. What the gradient makes of it adds up.
        assert mine[:3] == pytest.approx(theirs[:3], rel=1e-5) and mine[3] == pytest.approx(theirs[3], rel=1e-4)
    assert curve(lab.train("big_ranks", *LONG, ranks=3)) == undisturbed
    shown = [(line["role"], line["rank"], line.get("shard", 0)) for line in lab.lines("big_ranks", "processes.jsonl")]
    assert sorted(shown) == [("student", 0, 0), ("teacher", 0, 0), ("teacher", 0, 1)]
    assert shown_by_watch(lab, "big_ranks").count("; 1 starts of teachers") == 1


def shown_by_watch(lab, name):
    return lab.run(sys.executable, "-m", "deltakd", "watch", str(lab.folder / "runs" / name), "--once").stdout


def test_a_worker_and_a_leader_that_are_killed_come_back_and_no_bit_changes(lab, undisturbed):
    running = Running(lab, "big_killed", *LONG, *QUICK)
    running.reaches(2)
    os.kill(running.workers()[0], signal.SIGKILL)
    wait_until(lambda: len(running.workers(alive=False)) == 2, "another worker")
    running.reaches(4)
    os.kill(running.teachers()[-1], signal.SIGKILL)
    assert running.ends() == undisturbed and same_weights(lab, "big_killed", "big")
    assert len(running.teachers(alive=False)) == len(running.workers(alive=False)) == 3
    assert not running.teachers() and not running.workers()
    said = [line for line in running.log.read_text().splitlines() if "starting it again" in line]
    assert len(said) == 2 and "its worker 1" in said[0] and "exit code -9" in said[0], said


@pytest.mark.soak
def test_a_frozen_worker_is_noticed_and_no_bit_changes(lab, undisturbed):
    running = Running(lab, "big_frozen", *LONG, *QUICK)
    running.reaches(2)
    os.kill(running.workers()[0], signal.SIGSTOP)
    assert running.ends() == undisturbed
    assert "its worker 1" in running.log.read_text() and "was stuck for 3 s" in running.log.read_text()
    assert not running.workers()


@pytest.mark.soak  # its key: tests/teacher/test_shards.py; caches are written and read in test_cache.py
def test_a_cache_of_it_is_its_own(lab, undisturbed):
    whole, split = (cached(lab, *words) for words in (LONG[2:], LONG))
    assert whole != split
    assert curve(lab.train("big_cached", *LONG, "references.from=cache")) == undisturbed


def cached(lab, *overrides):
    done = lab.run(sys.executable, "-m", "deltakd", "cache", str(lab.recipe), "run=big_cache", *overrides)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].partition(": complete")[0]


@pytest.mark.soak  # each end's terms in tests/teacher/test_refusals.py
def test_a_run_refuses_teachers_that_are_split_or_in_8_bit_with_both_values(lab):
    running = Running(lab, "big_refuses", "train.steps=100000")
    try:
        running.reaches(2)
        eight = f"models.teacher={{weights: {lab.folder}/teacher, load_in_8bit: true}}"
        for said, *overrides in (("tensor_parallel: 2 there, 1 here", *SPLIT), (" in 8 bit there, ", eight)):
            command = [sys.executable, "-m", "deltakd", "serve", str(lab.recipe), "--run", str(running.directory)]
            came = lab.run(*command, *overrides)
            assert came.returncode == 2 and said in came.stderr, came.stderr
            assert came.stderr.count("deltakd: ") == 1
        assert running.launcher.poll() is None
    finally:
        running.launcher.kill()
        running.launcher.wait()
