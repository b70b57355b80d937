"""A stage that is stopped through `deltakd run` says so and goes on."""

import json
import signal
import subprocess
import sys

import pytest
import yaml

from deltakd.base.errors import RunError, Stopped
from deltakd.recipe.pipeline import failure
from tests.run.running import wait_until

STEPS = 400


def test_asked_to_end_it_has_its_stage_keep_what_is_trained_and_the_same_command_goes_on(lab, tmp_path):
    recipe = {
        "extends": str(lab.recipe),
        "root": str(tmp_path / "made"),
        "engine": {"name": "single"},
        "train": {"steps": STEPS},
        "pipeline": [{"name": "kd", "train": {"objective": {"sft_weight": 1.0}}}],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    words = [sys.executable, "-m", "deltakd", "run", str(tmp_path / "mine.yaml")]
    process = subprocess.Popen(words, cwd=lab.folder, env=lab.environment(), stderr=subprocess.PIPE, text=True)
    steps = tmp_path / "made" / "kd" / "steps.jsonl"
    wait_until(lambda: steps.exists() and len(steps.read_text().splitlines()) > 3, "some steps")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and "stage kd: stopped. Kept" in said, said
    kept = len(steps.read_text().splitlines())
    assert kept < STEPS, "the machine was too fast for this test: raise STEPS"
    again = subprocess.run([*words, f"train.steps={kept + 2}"], cwd=lab.folder, env=lab.environment())
    assert again.returncode == 0
    assert [json.loads(line)["step"] for line in steps.read_text().splitlines()] == [*range(1, kept + 3)]


def test_a_launcher_that_was_stopped_before_its_ranks_could_say_so_is_no_fault(tmp_path):
    (tmp_path / "log.txt").write_text("step 6/30\n")
    assert isinstance(failure("kd", tmp_path / "log.txt", 75), Stopped)
    fault = failure("kd", tmp_path / "log.txt", 1)
    assert isinstance(fault, RunError) and "ended with exit code 1" in str(fault)


@pytest.mark.parametrize("key", ["generation.num_prompts=9", "evaluation.num_prompts=9"])
def test_what_a_training_does_not_read_leaves_it_finished(lab, key, capsys):
    few = ["train.steps=2", "engine={name: single}", "references.from=in_process"]
    before = lab.train("unread", *few)
    assert lab.train("unread", *few, key) == before
