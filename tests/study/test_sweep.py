"""A whole sweep on models of a few thousand parameters: stopped, killed, started again, and nothing done twice."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deltakd.__main__ import main
from deltakd.evaluate.predictions import read_predictions
from deltakd.recipe import pipeline
from deltakd.report.build import gather
from deltakd.study.grid import read_grid
from deltakd.study.sharing import share
from tests.run.running import curve, wait_until

STEPS = 30
GRID = ["objective.target.alpha=0,0.5", "seed=1,2", f"train.steps={STEPS}", "checkpoints.every_steps=6"]
GRID += ["engine={name: single}"]  # whose launches take seconds
POINTS = [f"alpha={alpha},seed={seed}" for alpha in ("0", "0.5") for seed in (1, 2)]


class Sweep:
    """The sweep of this file in a folder, as a process or in this one."""

    def __init__(self, lab, root: Path):
        self.lab, self.root, self.folder = lab, root, root / "sweeps" / "tried"
        more = [f"root={root}", "evaluation.num_prompts=3", "--name=tried"]
        self.words = ["sweep", str(lab.recipe), *GRID, *more]

    def starts(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "deltakd", *self.words],
            cwd=self.lab.folder,
            env=self.lab.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lines(self, point: str, name: str) -> list[dict]:
        path = self.folder / point / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def reaches(self, point: str, step: int, process: "subprocess.Popen[str]") -> None:
        wait_until(
            lambda: len(self.lines(point, "steps.jsonl")) >= step or process.poll() is not None, f"{point} {step}"
        )
        assert process.poll() is None, process.communicate()[0]


@pytest.fixture(scope="module")
def swept(lab, tmp_path_factory):
    """A sweep that was killed in its first point, and what the same command returned then."""
    one = Sweep(lab, tmp_path_factory.mktemp("swept"))
    process = one.starts()
    one.reaches(POINTS[0], 7, process)
    process.kill()
    process.communicate(timeout=120)
    return one, main([*one.words, "--jobs=2"])


def test_a_sweep_that_was_killed_goes_on_and_repeats_no_step(swept):
    one, code = swept
    assert code == 0
    for point in POINTS:
        assert [line["step"] for line in one.lines(point, "steps.jsonl")] == list(range(1, STEPS + 1)), point
    # Its run missed it, and kept its last whole step; nobody but that run was started twice.
    assert [len(one.lines(point, "resumed.jsonl")) for point in POINTS] == [1, 0, 0, 0]
    assert one.lines(POINTS[0], "resumed.jsonl")[0]["step"] >= 6


def test_models_that_are_scored_are_looked_for_before_anything_is_trained(lab, tmp_path, capsys):
    """Also where the training asks no teacher."""
    words = ["objective.sft_weight=1.0", "models.teacher.weights=/nowhere", "seed=1,2", f"root={tmp_path}"]
    assert main(["sweep", str(lab.recipe), *words]) == 2
    assert "models.teacher.weights: /nowhere does not exist" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.soak
def test_asked_to_stop_it_has_its_runs_keep_their_steps_and_a_killed_run_leaves_the_others_alone(lab, tmp_path):
    one = Sweep(lab, tmp_path)
    process = one.starts()
    one.reaches(POINTS[0], 7, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "deltakd: stopped by SIGTERM: 0 of 4 trainings are done" in said
    steps = len(one.lines(POINTS[0], "steps.jsonl"))
    assert 7 <= steps < STEPS, "the machine was too fast for this test: raise STEPS"
    process = one.starts()
    one.reaches(POINTS[0], steps + 1, process)
    os.kill(one.lines(POINTS[0], "processes.jsonl")[-1]["pid"], signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 2 and "1 of 4 runs failed" in said and "ended with exit code -9" in said
    statuses = [point["status"] for point in json.loads((one.folder / "sweep.json").read_text())["points"]]
    assert statuses == ["failed", "finished", "finished", "finished"]
    assert main(one.words) == 0
    resumed = one.lines(POINTS[0], "resumed.jsonl")
    assert (
        resumed[0]["step"] == steps and len(resumed) == 2
    )  # its last whole step, not that of a checkpoint that was due
    assert [len(one.lines(point, "processes.jsonl")) for point in POINTS] == [3, 1, 1, 1]


def test_the_frozen_models_speak_once_and_what_they_said_serves_all_points(swept, lab):
    one, _ = swept
    (cache,) = (one.root / "cache").iterdir()
    payloads = [tuple(json.loads(line)[:2]) for line in (cache / "index.jsonl").read_text().splitlines()]
    assert len(payloads) == len(set(payloads)) and {name for name, _ in payloads} == {
        "teacher",
        "teacher_raw",
        "student_raw",
    }
    for point in POINTS:
        assert {line["role"] for line in one.lines(point, "processes.jsonl")} == {"student"}, point
    # The numbers are those of asking a teacher, bit for bit.
    alone = ["objective.target.alpha=0.5", "seed=2", "references.from=in_process", f"train.steps={STEPS}"]
    assert curve(lab.train("as_swept", *alone)) == curve(one.lines(POINTS[3], "steps.jsonl"))


def test_what_is_left_of_a_sweep_reads_the_cache_that_the_others_have_read(swept, lab):
    """Also where no two of the points that are left have the same batches."""
    one, _ = swept
    words = [word.replace("alpha=0,0.5", "alpha=0,0.5,1") for word in one.words[2:] if not word.startswith("--")]
    left = share(read_grid(str(lab.recipe), words, "tried"))
    waiting = [point for point in left.points if point.label not in left.finished]
    assert [point.label for point in waiting] == ["alpha=1,seed=1", "alpha=1,seed=2"] and len(left.to_cache) == 2
    assert {point.loaded.recipe.references.source for point in waiting} == {"cache"}


def test_every_point_is_scored_and_nothing_is_done_twice(swept, capsys, monkeypatch):
    one, _ = swept
    found = json.loads((one.folder / "sweep.json").read_text())
    assert found["keys"] == ["objective.target.alpha", "seed"] and set(found["frozen"]) == {"teacher", "student_raw"}
    assert [point["label"] for point in found["points"]] == POINTS
    for point in found["points"]:
        answers = read_predictions(one.folder, point["label"])
        assert point["status"] == "finished" and len(answers) == 3
        assert Path(point["run"], "finished.json").exists()
        mean = sum(row["cross_entropy"] for row in answers) / 3
        assert point["metrics"]["cross_entropy"] == pytest.approx(mean)
        assert f"| cross_entropy | {mean:.4f} |" in Path(point["run"], "export", "README.md").read_text()
    (curve_of_alpha,) = found["curves"]["objective.target.alpha"]
    by_seed = [point["metrics"]["kl_to_teacher"]["by_seed"] for point in curve_of_alpha["points"]]
    expected = sum(b - a for a, b in zip(*by_seed, strict=True)) / 2
    assert curve_of_alpha["points"][1]["metrics"]["kl_to_teacher"]["difference"]["mean"] == pytest.approx(expected)

    (table,) = gather([str(one.folder)]).tables  # of a report
    assert table.baseline == "alpha=0"
    assert [row.label for row in table.rows] == ["teacher", "student_raw", "alpha=0", "alpha=0.5"]
    assert table.rows[3].cells["kl_to_teacher"].mean == pytest.approx(sum(by_seed[1]) / 2)
    assert all(row.cells["kl_to_teacher"].low is not None for row in table.rows)

    before = (one.folder / "table.md").read_text()
    monkeypatch.setattr(pipeline.sys, "executable", "/bin/false")  # nothing can be started now
    capsys.readouterr()
    assert main(one.words) == 0
    said = capsys.readouterr()
    assert "4 are finished\nreferences: every point is trained" in said.err and before in said.out
    # One more value: only its points are missing, and a folder that holds another training is refused.
    assert main([word.replace("seed=1,2", "seed=1,2,3") for word in one.words]) == 2
    said = capsys.readouterr().err
    assert "2 of 6 runs failed" in said and f"{one.folder}/alpha=0.5,seed=3/log.txt" in said
    statuses = [point["status"] for point in json.loads((one.folder / "sweep.json").read_text())["points"]]
    assert statuses == ["finished", "finished", "failed"] * 2
    assert main([*one.words, "train.learning_rate=0.5"]) == 2
    assert "finished with another recipe (train.learning_rate" in capsys.readouterr().err


def test_a_sweep_is_one_array_of_the_jobs_that_there_are(swept, tmp_path, capfd, monkeypatch):
    """sbatch is a script here that shows what it was given; that the job script reads such lines: tests/slurm."""
    one, _ = swept
    monkeypatch.setenv("PATH", "/nonexistent")
    words = [word.replace("seed=1,2", "seed=2,9").replace("tried", "array") for word in one.words]
    assert main([*words, "--slurm"]) == 2
    said = capfd.readouterr()
    (lines,) = (one.root / "sweeps" / "array").glob("points-*.txt")
    shown = f"SWEEP={lines} RECIPE={one.lab.recipe} sbatch --array=1,2,3,4 slurm/deltakd_qwen.sbatch\n"
    assert said.out == shown and "sbatch: not found. Type the line above" in said.err
    script = tmp_path / "sbatch"
    script.write_text('#!/bin/sh\necho "Submitted batch job 7: $SWEEP $RECIPE $*"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert main([*words, "--slurm", "--sbatch=--nodes=2 --time=1:00:00"]) == 0
    said = capfd.readouterr()
    asked = f"job 7: {lines} {one.lab.recipe} --array=1,2,3,4 --nodes=2 --time=1:00:00 slurm/deltakd_qwen.sbatch;"
    assert asked in said.out and "references: service, each task its own" in said.err
    assert "seed=9 run=sweeps/array/alpha=0.5,seed=9" in lines.read_text().splitlines()[3]
    assert f"root={one.root}" in lines.read_text().splitlines()[3]
