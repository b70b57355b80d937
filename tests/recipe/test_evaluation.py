"""Scores that are kept: read again for the same question alone, and with the teacher loaded once."""

import pytest
from rich.console import Console

from deltakd.evaluate.compare import CROSS_ENTROPY, KL_TO_TEACHER
from deltakd.evaluate.predictions import read_predictions
from deltakd.evaluate.settings import CompareSettings
from deltakd.recipe import asked, evaluating, evaluation, scoring
from deltakd.recipe.load import load


@pytest.fixture
def loads(monkeypatch):
    """The folders that models were loaded from, in order."""
    seen = []
    real = asked.load_model
    monkeypatch.setattr(asked, "load_model", lambda key, path, *rest: seen.append(path) or real(key, path, *rest))
    return seen


def test_scores_that_were_kept_without_a_teacher_are_not_read_as_if_they_had_its_kl(lab, tmp_path, loads):
    loaded = load(str(lab.recipe), ["evaluation.num_prompts=4", "evaluation.max_new_tokens=3"])
    folders = {name: str(lab.folder / name) for name in ("student", "teacher")}
    plain = CompareSettings(models=folders, baseline="student")
    console = Console(quiet=True)

    without = evaluation.score_models(loaded, "one", plain, tmp_path, console)
    assert all(KL_TO_TEACHER not in model.rows for model in without) and len(loads) == 2

    named = plain.model_copy(update={"teacher": "teacher"})
    with_kl = evaluation.score_models(loaded, "one", named, tmp_path, console)
    assert len(loads) == 4  # each once more, the teacher not twice
    student, teacher = (model.rows[KL_TO_TEACHER] for model in with_kl)
    assert len(student) == 4 and min(student) > 0.01 and max(map(abs, teacher)) < 1e-5
    assert [model.rows[CROSS_ENTROPY] for model in with_kl] == [model.rows[CROSS_ENTROPY] for model in without]
    assert [row[KL_TO_TEACHER] for row in read_predictions(tmp_path, "student")] == student

    assert evaluation.score_models(loaded, "one", named, tmp_path, console) == with_kl and len(loads) == 4
    other = named.model_copy(update={"teacher": "student"})
    assert max(evaluation.score_models(loaded, "one", other, tmp_path, console)[0].rows[KL_TO_TEACHER]) < 1e-5


def test_scores_that_cannot_be_read_are_taken_again(lab, tmp_path):
    settings = CompareSettings(models={"student": str(lab.folder / "student")}, baseline="student")
    loaded = load(str(lab.recipe), ["evaluation.num_prompts=4", "evaluation.max_new_tokens=3"])
    console = Console(quiet=True)
    before = evaluation.score_models(loaded, "one", settings, tmp_path, console)
    scores = tmp_path / "scores" / "student.json"
    whole = scores.read_text()
    scores.write_text(whole[: len(whole) // 2])
    assert evaluation.score_models(loaded, "one", settings, tmp_path, console) == before
    assert scores.read_text() == whole


def test_a_kill_between_answers_and_scores_leaves_no_scores_of_another_question(lab, tmp_path, monkeypatch):
    folders = CompareSettings(models={"student": str(lab.folder / "student")}, baseline="student")
    console, real = Console(quiet=True), scoring.write_json

    def take(num_prompts):
        loaded = load(str(lab.recipe), [f"evaluation.num_prompts={num_prompts}", "evaluation.max_new_tokens=3"])
        evaluation.score_models(loaded, "one", folders, tmp_path, console)
        return read_predictions(tmp_path, "student")

    def killed(path, value):
        if "scores" in path.parts:
            raise KeyboardInterrupt
        real(path, value)

    assert len(take(4)) == 4
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(scoring, "write_json", killed)
        take(5)
    assert len(read_predictions(tmp_path, "student")) == 5
    assert len(take(4)) == 4  # and not the five answers that lie there


def test_a_model_is_scored_as_the_recipe_has_it_in_its_revision_and_its_bits(lab, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(evaluation, "resolve", lambda key, given: seen.update({key: given.revision}) or lab.folder)
    pinned = [f"models.{role}={{weights: a/b, revision: {role}}}" for role in ("teacher", "teacher_raw")]
    pinned.append("models.teacher_raw.load_in_8bit=true")
    models = {"teacher_raw": "a/b", "mine": "a/b", "other": "a/c"}
    compared = CompareSettings(models=models, baseline="mine")
    plan = evaluation.Plan(load(str(lab.recipe), pinned), compared, tmp_path, "LABEL")
    assert {label: one.in_8bit for label, one in plan.models.items()} == {
        "teacher_raw": True,
        "mine": False,
        "other": False,
    }
    assert seen == {"teacher_raw": "teacher_raw", "mine": "teacher", "other": None}


def test_processes_that_share_the_work_are_given_the_models_that_were_typed(lab, tmp_path):
    """Also where a run is named as a part of recipes is: `train` is every training's name that is no stage's."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "export").symlink_to(lab.folder / "student")
    loaded = load(str(lab.recipe), [f"root={tmp_path}"])
    request = evaluating.Request(str(lab.recipe), ["train", "a.b=train", "owner/seed"], [], teacher="none")
    compared = evaluating._compared(loaded, request)
    assert list(compared.models) == ["train", "a.b", "seed"]
    command = evaluating._command(request, compared)
    words = command[command.index("--model") + 1 :]
    assert not any(evaluating._is_setting(word) for word in words)
    again = evaluating.Request(str(lab.recipe), words, [], teacher="none", baseline="train")
    assert evaluating._compared(loaded, again) == compared
