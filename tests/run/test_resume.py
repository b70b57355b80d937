"""A run that was stopped, however, goes on to the weights of one that was not: real processes, signals and disks."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.run.running import ZERO_3, Running, curve, same_weights

STEPS = 20
STOPPED = 75
QUICK = ("teachers.silent_s=1.5", "teachers.heartbeat_s=0.2", ZERO_3)
# One process that starts no other, for what does not depend on who shards the student or answers for the teachers.
PLAIN = ("references.from=in_process", "train.schedule=constant")


# The undisturbed runs validate and most others do not: it changes no bit of the training.
VALIDATED = ("validation={every_steps: 6, answers_every: 2, num_prompts: 5, max_new_tokens: 8}",)


@pytest.fixture(scope="module")
def plain(lab):
    return curve(lab.train("plain", f"train.steps={STEPS}", *VALIDATED, *PLAIN))


@pytest.fixture(scope="module")
def two(lab):
    return curve(lab.train("two", f"train.steps={STEPS}", *VALIDATED, ZERO_3, ranks=3))


def kept(step: int) -> str:
    return f"step-{step:08}"


def untimed(lines):
    return [{key: value for key, value in line.items() if not key.endswith("_s")} for line in lines]


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    "kills,ranks,settings", [(3, None, PLAIN), pytest.param(10, 3, (ZERO_3,), marks=pytest.mark.soak)]
)
def test_a_run_killed_at_random_moments_ends_with_the_weights_of_an_undisturbed_one(
    lab, request, kills, ranks, settings
):
    """Launcher and all, without warning; a checkpoint at every step, so that kills hit one that is being written."""
    whole = "two" if ranks else "plain"
    expected = request.getfixturevalue(whole)
    name, draw = f"killed_{kills}_times", random.Random(kills)
    overrides = (f"train.steps={STEPS}", "checkpoints.every_steps=1", *VALIDATED, *settings)
    before = 0
    for _ in range(kills):
        running = Running(lab, name, *overrides, ranks=ranks)
        before = min(before + draw.randint(1, 4), STEPS - 2)
        running.reaches(before)
        time.sleep(draw.uniform(0, 0.05))  # anywhere in a step or a save
        running.is_sent(signal.SIGKILL, *[process.pid for process in running.family()])
    assert curve(lab.train(name, *overrides, ranks=ranks)) == expected
    assert same_weights(lab, name, whole)
    for file in ("validation.jsonl", "samples.jsonl"):
        assert untimed(lab.lines(name, file)) == untimed(lab.lines(whole, file))
    gone_on = (running.directory / "resumed.jsonl").read_text().splitlines()
    # A kill may come before a life has gone on: what it waits for are the steps that stand there.
    assert kills // 2 < len(gone_on) <= kills and all(json.loads(line)["step"] for line in gone_on)


@pytest.mark.parametrize(
    "ranks,settings,sent,which",
    [
        (None, PLAIN, signal.SIGTERM, "launcher"),
        (None, PLAIN, signal.SIGHUP, "launcher"),
        pytest.param(3, QUICK, signal.SIGUSR1, "last student", marks=pytest.mark.soak),  # tests/slurm sends it, too
        pytest.param(3, QUICK, signal.SIGINT, "all", marks=pytest.mark.soak),
        pytest.param(3, QUICK, signal.SIGTERM, "launcher", marks=pytest.mark.soak),
    ],
)
def test_asked_to_stop_it_keeps_its_last_step_and_goes_on_bit_for_bit(lab, request, ranks, settings, sent, which):
    """The launcher of deepspeed hands nothing on: it ends at once, and its ranks have the same grace."""
    whole = "two" if ranks else "plain"
    expected, name = request.getfixturevalue(whole), f"{whole}_{sent.name.lower()}_{which.split()[0]}"
    start = {"ranks": ranks, "launcher": "local.sh" if which == "last student" else "deepspeed"}
    running = Running(lab, name, f"train.steps={STEPS}", "checkpoints.every_steps=null", *settings, **start)
    running.reaches(3)
    students = [line["pid"] for line in running.lines("processes.jsonl") if line["role"] == "student"]
    pids = {"launcher": [], "last student": students[-1:], "all": [one.pid for one in running.family()]}
    code = running.is_sent(sent, *pids[which])
    steps = len(running.lines("steps.jsonl"))
    assert checkpoints(running.directory) == [kept(steps)] and steps >= 3, running.log.read_text()
    assert code == STOPPED or (ranks and which != "last student"), running.log.read_text()
    (said,) = running.said()
    assert f"Kept {running.directory / 'checkpoints' / kept(steps)}" in said, said
    assert Running(lab, name, f"train.steps={STEPS}", *settings, ranks=ranks).ends() == expected
    assert same_weights(lab, name, whole)


@pytest.mark.parametrize(
    "before,after", [pytest.param(3, 1, marks=pytest.mark.soak), pytest.param(1, 3, marks=pytest.mark.soak)]
)
def test_on_another_number_of_ranks_it_goes_on_to_the_same_weights(lab, before, after):
    """Within 1e-6, not bit for bit: sums over ranks are taken in another order, and every step adds to it."""
    name = f"from_{before}_to_{after}"
    settings = ["train.steps=12", "train.learning_rate=1.0e-3", "train.weight_decay=0.1", "checkpoints.every_steps=8"]
    settings.append(ZERO_3)
    whole = lab.train(f"{name}_whole", *settings, ranks=before)
    stopped = Running(lab, name, *settings, ranks=before)
    stopped.reaches(9)
    stopped.is_sent(signal.SIGKILL, *[process.pid for process in stopped.family()])
    ended = Running(lab, name, *settings, ranks=after).ends()
    torch.testing.assert_close(torch.tensor(ended), torch.tensor(curve(whole)), rtol=1e-6, atol=0)
    first, second = (
        load_file(lab.folder / "runs" / run / "export" / "model.safetensors") for run in (name, f"{name}_whole")
    )
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-6


def damage(folder: Path) -> str:
    """Flip one bit in the middle of a checkpoint's largest file; returns its name."""
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file.name


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(lab, plain, capfd):
    lab.train("damaged", "train.steps=10", "checkpoints.every_steps=3", *PLAIN)
    run = lab.folder / "runs" / "damaged"
    assert checkpoints(run) == [kept(9), kept(10)]  # keep_last: 2, and one after the last step
    name = damage(run / "checkpoints" / kept(10))
    assert curve(lab.train("damaged", f"train.steps={STEPS}", "checkpoints.every_steps=3", *PLAIN)) == plain
    assert same_weights(lab, "damaged", "plain")
    said = capfd.readouterr().out
    assert f"{kept(10)}: damaged" in said and name in said and f"goes on from {kept(9)}" in said, said
    for folder in (run / "checkpoints").iterdir():
        damage(folder)
    assert "No whole checkpoint is left" in lab.refuses("damaged", f"train.steps={STEPS + 1}", *PLAIN)


def test_a_recipe_that_changed_in_what_matters_is_refused_and_one_in_what_does_not_goes_on(lab, plain):
    lab.train("changed", "train.steps=4", "checkpoints.every_steps=3", *PLAIN)
    for change in ("train.learning_rate=2.0e-2", "objective.target.alpha=0.25"):
        refused, (key, _, value) = lab.refuses("changed", *PLAIN, f"train.steps={STEPS}", change), change.partition("=")
        assert f"{key}: " in refused and f"now {float(value)}" in refused
    assert len(lab.lines("changed", "steps.jsonl")) == 4
    free = [f"train.steps={STEPS}", "teachers.look_ahead=0", "records.tensorboard=true"]
    assert curve(lab.train("changed", *PLAIN, *free)) == plain and same_weights(lab, "changed", "plain")
    assert [line["step"] for line in lab.lines("changed", "steps.jsonl")] == list(range(1, STEPS + 1))


def test_resume_refuses_to_begin_and_a_deleted_checkpoint_is_told(lab, capfd):
    refused = lab.run(*lab.command("run=no_begin", *PLAIN), "--resume")
    assert refused.returncode == 2 and "no checkpoint to go on from" in refused.stderr
    running = Running(lab, "deleted", "train.steps=100000", "checkpoints.every_steps=3", *PLAIN)
    running.reaches(4)
    running.is_sent(signal.SIGKILL)
    shutil.rmtree(running.directory / "checkpoints")
    lab.train("deleted", "train.steps=2", *PLAIN)
    assert "it begins with step 1 again" in capfd.readouterr().out


def test_when_no_teacher_can_come_back_all_students_end_with_a_checkpoint_and_a_restart_goes_on(lab, two):
    settings = [f"train.steps={STEPS}", "teachers.restarts=0", "teachers.give_up_s=2", *QUICK]
    running = Running(lab, "lost", *settings, "checkpoints.every_steps=null", ranks=3)
    running.reaches(5)
    assert running.is_sent(signal.SIGKILL, running.teachers()[0]) == 2
    steps = len(running.lines("steps.jsonl"))
    assert checkpoints(running.directory) == [kept(steps)]
    said = [line for line in running.log.read_text().splitlines() if line.startswith("deltakd")]
    assert any("teacher 0" in line and "Look at its log" in line and kept(steps) in line for line in said), said
    assert Running(lab, "lost", *settings, ranks=3).ends() == two
    assert same_weights(lab, "lost", "two")


@contextmanager
def small_disk(path: Path, num_bytes: int):
    """A disk of its own for a folder; skips where making one needs rights that are not there."""
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk: making one needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_costs_no_checkpoint(lab, plain):
    folder = lab.folder / "runs" / "full" / "checkpoints"
    settings = [f"train.steps={STEPS}", "checkpoints.every_steps=3", *PLAIN]
    with small_disk(folder, 600_000):
        assert "cannot be written" in lab.refuses("full", *settings)
        assert checkpoints(folder.parent) == [kept(3)]
        subprocess.run(["mount", "-o", "remount,size=50000000", str(folder)], check=True)
        assert curve(lab.train("full", *settings)) == plain


def test_a_disk_that_can_only_be_read_is_told_and_costs_nothing(lab, plain):
    """Before the first step where the run itself lies on it; at the first checkpoint where that does."""
    for name, place, step in (("read_only", "", 0), ("read_only_later", "checkpoints", 2)):
        run = lab.folder / "runs" / name
        settings = [f"train.steps={STEPS}", "checkpoints.every_steps=2", *PLAIN]
        with small_disk(run / place, 50_000_000):
            subprocess.run(["mount", "-o", "remount,ro", str(run / place)], check=True)
            assert "cannot be written (" in lab.refuses(name, *settings)
            assert len(lab.lines(name, "steps.jsonl") if (run / "steps.jsonl").exists() else []) == step
            subprocess.run(["mount", "-o", "remount,rw", str(run / place)], check=True)
            assert curve(lab.train(name, *settings)) == plain


def test_a_gradient_that_is_not_finite_keeps_its_batch_and_the_step_before(lab):
    """Twice: the same command goes on from the step before, and meets the same numbers."""
    again = [f"train.steps={STEPS}", *PLAIN, "train.learning_rate=30.0"]
    said = [lab.refuses("overflow", *again) for _ in range(2)]
    run, last = lab.folder / "runs" / "overflow", len(lab.lines("overflow", "steps.jsonl"))
    assert len(said) == 2 and said[0] == said[1] and f"step {last + 1}: loss" in said[0], said
    assert checkpoints(run) == [kept(last)] and kept(last) in said[0]
    (faulty,) = (run / "faulty").iterdir()
    batch = load_file(faulty)
    assert faulty.name == f"{kept(last + 1)}-rank-0.safetensors" and len(batch["0.labels"]) == len(
        batch["0.supervised"]
    )
