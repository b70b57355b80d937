"""A dry run: every recipe can be made small, and the walk goes through the processes that a run has."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deltakd.__main__ import main
from deltakd.base.rundir import RunDirectory
from deltakd.data.tokenizer import load_tokenizer
from deltakd.dry_run import walk
from deltakd.dry_run.tiny import write_inputs
from deltakd.dry_run.walk import read_tiny
from deltakd.plan.facts import read_run
from deltakd.recipe.inputs import read_corpus
from deltakd.recipe.load import load, recipe_names
from tests.run.running import wait_until

KEPT = ("objective", "references", "engine")  # what a recipe is about is not made small


def stages_of(name: str) -> list[str | None]:
    return [None, *(stage.name for stage in load(name).recipe.pipeline if stage.train is not None)]


@pytest.mark.parametrize("name", recipe_names())
def test_every_training_of_the_recipe_book_can_be_made_small_and_stays_itself(name, tmp_path):
    for stage in stages_of(name):
        loaded = load(name, [], stage)
        run = read_run(name, [], loaded.recipe, loaded.where, 0.6, None)
        tiny = read_tiny(run, tmp_path)
        for key in KEPT:
            assert getattr(tiny, key) == getattr(loaded.recipe, key), (stage, key)
        assert tiny.models.lora == loaded.recipe.models.lora and tiny.data.format == loaded.recipe.data.format
        assert tiny.rollouts.on_policy_fraction == loaded.recipe.rollouts.on_policy_fraction
        assert tiny.train.steps == 3 and tiny.directory == f"{tmp_path}/train"
        for model in (tiny.models.roles[role] for role in ("student", *run.frozen)):
            assert Path(model.weights).parent == tmp_path


def test_the_walk_trains_with_teachers_goes_on_from_a_checkpoint_evaluates_and_reports(tmp_path, capsys):
    assert main(["run", "pairs/llama3_8b_to_1b", "--dry-run", f"root={tmp_path}", "teachers.per_node=1"]) == 0
    assert f"its page is {tmp_path}/dry_run/report.html" in capsys.readouterr().out
    run = tmp_path / "dry_run" / "train"
    lines = {name: (run / f"{name}.jsonl").read_text().splitlines() for name in ("steps", "resumed", "processes")}
    assert [json.loads(line)["step"] for line in lines["steps"]] == [1, 2, 3]
    assert [json.loads(line)["step"] for line in lines["resumed"]] == [2]
    roles = [json.loads(line)["role"] for line in lines["processes"]]  # whoever is there first
    assert [sorted(life) for life in (roles[:2], roles[2:])] == [["student", "teacher"]] * 2
    model = json.loads((tmp_path / "dry_run" / "model1" / "config.json").read_text())
    assert (model["model_type"], model["vocab_size"]) == ("llama", 128_256) and (
        run / "export" / "model.safetensors"
    ).exists()
    assert "ROUGE" in (tmp_path / "dry_run" / "report.html").read_text()


def test_a_profile_of_later_steps_is_taken_of_the_first(tmp_path):
    typed = ["records.profile={first_step: 10, last_step: 12}"]
    loaded = load("quickstart", typed)
    tiny = read_tiny(read_run("quickstart", typed, loaded.recipe, loaded.where, 0.6, None), tmp_path)
    assert tiny.records.profile is not None and tiny.records.profile.last_step == 1


@pytest.mark.soak
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_book_dry_runs(name, tmp_path, capsys):
    assert main(["run", name, "--dry-run", f"root={tmp_path}"]) == 0, capsys.readouterr().err


def test_heads_that_are_smaller_than_the_worlds_tokenizer_have_a_smaller_one(tmp_path):
    small = [f"root={tmp_path}", *(f"pipeline.{who}_new.model.head_rows=400" for who in ("teacher", "student"))]
    loaded = load("quickstart", small)
    write_inputs(read_run("quickstart", small, loaded.recipe, loaded.where, 0.6, None), tmp_path)
    assert len(load_tokenizer(str(tmp_path / "tokenizer"))) <= 400


def test_plain_text_beside_problems_is_written_as_text(tmp_path):
    loaded = load("openmath/minillm")
    run = read_run("openmath/minillm", [], loaded.recipe, loaded.where, 0.6, None)
    write_inputs(run, tmp_path)
    tiny = read_tiny(run, tmp_path)
    assert len(read_corpus(tiny, load_tokenizer(str(tmp_path / "tokenizer")))) > 0


def test_as_many_processes_as_split_a_teacher_can_split_the_tiny_ones_and_the_student_among_them(tmp_path):
    loaded = load("pairs/qwen2.5_72b_to_7b")
    write_inputs(read_run("pairs/qwen2.5_72b_to_7b", [], loaded.recipe, loaded.where, 0.6, None), tmp_path)
    made = [json.loads(path.read_text()) for path in tmp_path.glob("model*/config.json")]
    assert len(made) == 3 and len({one["hidden_size"] for one in made}) == 2
    assert not any(one[f"num_{kind}_heads"] % 4 for one in made for kind in ("attention", "key_value"))


def test_what_is_wrong_with_a_recipe_is_said_before_anything_is_made(tmp_path, capsys):
    assert main(["run", "ultrachat", "--dry-run", f"root={tmp_path}", "train.step=1"]) == 2
    assert "train.step: unknown key" in capsys.readouterr().err and not any(tmp_path.iterdir())
    split = "teachers={tensor_parallel: 4, per_node: 4}"  # which the tiny models would bear
    assert main(["run", "ultrachat", "--dry-run", f"root={tmp_path}", split]) == 2
    said = "2 key-value heads of Qwen/Qwen2.5-1.5B do not split over 4 processes"
    assert said in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_walk_leaves_the_processes_of_one_that_was_killed_the_time_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(walk, "LEAVE_S", 0.0)
    words = ["run", "quickstart", "--dry-run", f"root={tmp_path}"]
    with RunDirectory(tmp_path / "dry_run" / "train").claim():
        assert main(words) == 2
        assert f"{tmp_path}/dry_run/train: in use by a live run" in capsys.readouterr().err
    assert (tmp_path / "dry_run" / "train").exists()


def test_a_walk_that_is_told_to_end_ends_its_command_first(tmp_path):
    words = ["run", "quickstart", "--dry-run", f"root={tmp_path}", "engine={name: single}"]
    walking = subprocess.Popen([sys.executable, "-m", "deltakd", *words], stderr=subprocess.DEVNULL)
    wait_until((tmp_path / "dry_run" / "first.log").exists, "its first command")
    wait_until(lambda: psutil.Process(walking.pid).children(), "its process")
    begun = psutil.Process(walking.pid).children(recursive=True)
    walking.terminate()
    assert walking.wait(60) == 130
    assert not [one for one in begun if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
