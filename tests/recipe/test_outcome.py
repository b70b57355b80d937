"""How a run stands is decided by what it wrote, and a job that brings nothing is told so."""

import os

import pytest

from deltakd.__main__ import main
from deltakd.base.errors import RunError, Stopped
from deltakd.recipe.load import load
from deltakd.recipe.outcome import outcome


def kept(lab, step, when):
    folder = lab.folder / "runs" / "stands" / "checkpoints" / f"step-{step:08}"
    folder.mkdir(parents=True)
    os.utime(folder, (when, when))


def test_three_lives_of_a_job_without_a_new_checkpoint_are_enough(lab):
    loaded = load(str(lab.recipe), ["run=stands"])
    kept(lab, 100, 1)  # damaged, say: the run goes on from what it keeps later, at earlier steps
    for begun in range(3):
        assert "goes on from step 100" in outcome(loaded, "7", begins=True, most=3), begun
    with pytest.raises(RunError, match="3 lives in a row have brought it no further than step 100"):
        outcome(loaded, "7", begins=True, most=3)
    with pytest.raises(RunError, match="3 lives"):
        outcome(loaded, "7", begins=False, most=3)
    with pytest.raises(Stopped, match="goes on from step 100"):
        outcome(loaded, "8", begins=False, most=3)
    kept(lab, 50, 2)
    with pytest.raises(Stopped, match="goes on from step 50"):
        outcome(loaded, "7", begins=False, most=3)


def test_its_exit_code_is_what_the_run_wrote(lab, capsys):
    overrides = ["run=ends", "train.steps=1", "references.from=in_process"]
    assert main(["outcome", str(lab.recipe), *overrides]) == 75
    lab.train("ends", *overrides[1:])
    assert main(["outcome", str(lab.recipe), *overrides]) == 0 and "finished" in capsys.readouterr().out
    assert main(["outcome", str(lab.recipe), *overrides, "train.learning_rate=1.0"]) == 2


def test_stages_name_what_they_read(capsys):
    assert main(["stages", "ultrachat"]) == 0
    needs = {line.split()[0]: line.split()[2] for line in capsys.readouterr().out.splitlines()}
    assert needs["teacher"] == needs["sft"] == "-" and needs["forward_kl"] == needs["delta"] == "teacher"
    assert needs["evaluation"] == "teacher,sft,forward_kl,delta"
