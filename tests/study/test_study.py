"""Studies: what is asked is checked before anything runs, and the whole command answers, goes on and reports."""

from pathlib import Path

import pytest
import yaml

from deltakd.__main__ import main
from deltakd.base.errors import RecipeError
from deltakd.bench.method_plan import Base, plan
from deltakd.bench.rates import rate_runs
from deltakd.recipe import pipeline
from deltakd.recipe.load import recipe_names
from deltakd.study.grid import read_grid
from deltakd.study.questions import askings, read_study, study_names

STUDIES = Path(__file__).parents[2] / "recipes" / "studies"
WORLDS = "title: t\nworlds: {here: {recipe: quickstart}}\n"


def test_there_are_studies_and_none_is_taken_for_a_recipe():
    assert study_names() and not any(name.startswith("studies") for name in recipe_names())


@pytest.mark.parametrize("name", [path.stem for path in sorted(STUDIES.glob("*.yaml"))])
def test_every_question_of_a_study_can_be_asked(name):
    first, second = (STUDIES / f"{name}.yaml").read_text().splitlines()[:2]
    assert first.startswith(f"# python -m deltakd study {name}") and second.startswith("# Measured: ")
    for one in askings(read_study(name), []):
        base = Base(one.recipe, [], one.set, Path("runs") / one.world)
        if one.question.sweep:
            grid = read_grid(base.name, [*base.overrides, *one.question.sweep], one.name)
            assert len(grid.points) % 3 == 0 and "seed" in grid.keys  # three seeds of every setting
            continue
        runs = plan(base, one.question.methods, one.question.seeds, one.question.steps, "single", within=f"{one.name}/")
        assert len(runs) == 3 * len(one.question.methods) and len(set(one.question.learning_rates)) != 1
        assert {run.recipe.directory.split("/")[1:3] == [one.world, one.name] for run in runs} == {True}


def test_each_method_tries_every_rate_from_a_seed_of_its_own():
    base = Base("quickstart", [], [], Path("runs/quickstart"))
    runs = rate_runs(base, ["sft", "gkd"], [1.0e-3, 1.0e-5], 70, "single", "asked/")
    assert [run.recipe.directory.removeprefix("runs/quickstart/asked/rates/") for run in runs] == [
        "sft_0.001",
        "sft_1e-05",
        "gkd_0.001",
        "gkd_1e-05",
    ]
    assert [run.recipe.train.learning_rate for run in runs] == [1.0e-3, 1.0e-5] * 2
    assert {(run.recipe.seed, run.recipe.train.steps) for run in runs} == {(0, 70)}
    (sft, delta) = plan(base, ["sft", "delta"], [1], 70, "single", {"sft": 1.0e-5})
    assert (sft.recipe.train.learning_rate, delta.recipe.train.learning_rate) == (1.0e-5, 2.0e-3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (WORLDS + "questions: {q: {ask: a, worlds: [there], sweep: [seed=1]}}", "q asks in there, which is no world"),
        (WORLDS + "questions: {q: {ask: a, worlds: [here]}}", "has both a sweep and methods, or none"),
        (WORLDS + "questions: {'Q?': {ask: a, worlds: [here], sweep: [seed=1]}}", "'Q?' is no name of a folder"),
        (WORLDS + "question: {}", ":3: question: unknown key. Write questions"),
        (WORLDS + "questions: {q: {ask: a, worlds: [here], sweep: [x], learning_rates: [0.1]}}", "belong to methods"),
    ],
)
def test_a_study_that_cannot_be_asked_is_refused_with_its_place(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError) as refused:
        read_study(str(tmp_path / "mine.yaml"))
    assert said in str(refused.value) and str(tmp_path / "mine.yaml:") in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["delta_smal"], "no study has this name. Write delta_small"),
        (["delta_small", "--only=alfa"], "--only: alfa is no question of this study. Write some of alpha, regimes"),
        (["delta_small", "--rows=ultrachat=x"], "Write RECIPE=TRAIN,VALIDATION with one of quickstart, small_chat"),
        (["delta_small", "--rows=small_math=nowhere.jsonl"], "--rows small_math=: nowhere.jsonl does not exist"),
        (["delta_small", "--jobs=0"], "--jobs: 0 trainings at a time are none"),
        (["delta_small", "train.step=3"], "train.step: unknown key. Write steps"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is_made(words, said, capsys, tmp_path):
    assert main(["study", *words, f"--root={tmp_path}/made"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not (tmp_path / "made").exists()


@pytest.mark.soak
def test_a_study_answers_every_question_tells_of_those_that_failed_and_goes_on(lab, tmp_path, capsys, monkeypatch):
    stages = {"sft": {"objective": {"sft_weight": 1.0}}, "delta": {}}
    recipe = {"extends": str(lab.recipe), "pipeline": [{"name": name, "train": one} for name, one in stages.items()]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    few = ["train.steps=2", "evaluation.num_prompts=4"]
    questions = {
        "impossible": {
            "ask": "Does nothing come of it?",
            "worlds": ["one"],
            "sweep": ["seed=1,2", "data.max_tokens=2"],
        },
        "alpha": {"ask": "Which alpha?", "worlds": ["one"], "sweep": ["objective.target.alpha=0,1", "seed=1,2"]},
        "methods": {
            "ask": "Which method?",
            "worlds": ["one"],
            "methods": ["sft", "delta"],
            "learning_rates": [1.0e-4, 1.0e-2],
            "seeds": [1],
        },
    }
    worlds = {"one": {"recipe": str(tmp_path / "tiny.yaml"), "set": few}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"title": "Mine", "worlds": worlds, "questions": questions}))
    words = ["study", str(tmp_path / "mine.yaml"), f"--root={tmp_path}/made", "--jobs=2"]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "1 of 3 questions are not answered. impossible in one" in said.err and "Traceback" not in said.err
    text = (tmp_path / "made/study.md").read_text()
    assert text in said.out and text.count("No setting is whole yet.") == 1
    assert "## Which alpha?" in text and "Learning rates, of 0.0001, 0.01 that with" in text and "(at an end)" in text
    assert "over alpha, one/sweeps/alpha" in (tmp_path / "made/report.html").read_text()

    monkeypatch.setattr(pipeline.sys, "executable", "/bin/false")  # nothing can be started now
    assert main([*words, "--only=alpha,methods"]) == 0
    assert (tmp_path / "made/study.md").read_text().splitlines()[4:] == text.splitlines()[4:]
