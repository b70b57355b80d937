"""The run directory: one owner, no half-written file, and the word on whether a run is finished."""

import pytest

from deltakd.base.errors import RunError
from deltakd.base.files import write_text
from deltakd.base.rundir import MODELS, RunDirectory


def test_a_second_claim_is_refused_with_the_holder_and_what_to_do(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.claim():
        with pytest.raises(RunError, match=r"in use by a live run \(pid \d+ on .+\)\. Wait for it, end it, or write"):
            with RunDirectory(tmp_path / "run").claim():
                pass
    with RunDirectory(tmp_path / "run").claim():
        pass


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot be written \(Not a directory\)\. Write root="):
        with RunDirectory(tmp_path / "file" / "run").claim():
            pass


def test_a_line_that_is_still_being_written_is_not_read(tmp_path):
    run = RunDirectory(tmp_path)
    run.append("steps.jsonl", {"step": 1})
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 2')
    assert run.read_lines("steps.jsonl") == [{"step": 1}]


def test_changes_name_each_key_with_both_values_and_leave_out_what_does_not_matter(tmp_path):
    write_text(tmp_path / "recipe.yaml", "train: {steps: 3}\nseed: 1\npipeline: []\n")
    changes = RunDirectory(tmp_path).changes("train: {steps: 4}\nseed: 1\npipeline: [x]\nevaluation: {seed: 2}\n")
    assert changes == ["train.steps: 3, now 4"]


def test_starting_again_clears_what_an_unfinished_run_left(tmp_path):
    run = RunDirectory(tmp_path)
    run.append("steps.jsonl", {"step": 1})
    run.export.mkdir()
    run.start("seed: 1\n", {})
    assert run.read_lines("steps.jsonl") == [] and not run.export.exists() and run.finished() is None
    run.finish({"steps": 3})
    assert run.finished()["steps"] == 3


def test_going_on_takes_back_what_was_written_after_the_checkpoint(tmp_path):
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        run.append("steps.jsonl", {"step": step})
        write_text(tmp_path / MODELS / f"step-{step:08}" / "config.json", "{}")
    write_text(tmp_path / MODELS / "step-00000002.part" / "config.json", "{}")
    run.go_on("seed: 1\n", 2, 0)
    assert [line["step"] for line in run.read_lines("steps.jsonl")] == [1, 2]
    assert sorted(path.name for path in (tmp_path / MODELS).iterdir()) == ["step-00000001", "step-00000002"]
