"""Studies: what is asked is checked before anything runs, and the whole command answers, goes on and reports."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from deltakd.__main__ import main
from deltakd.base.errors import RecipeError, RunError
from deltakd.base.rundir import RunDirectory
from deltakd.bench.method_plan import Base, plan
from deltakd.bench.rates import best_of, rate_runs, rows_behind, survivors
from deltakd.recipe import pipeline
from deltakd.recipe.held_out import held_out_conversations
from deltakd.recipe.load import load, recipe_names
from deltakd.study import study
from deltakd.study.grid import read_grid
from deltakd.study.questions import askings, read_study, study_names
from deltakd.study.study import Asked, _base, _comparison, _words

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


def with_methods(lab, folder):
    """Write the lab's recipe with two methods to compare, and a student that a stage of its own makes."""
    made = {"tokenizer": str(lab.folder / "tokenizer"), "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    made |= {"hidden_size": 32, "intermediate_size": 64}
    stages = {"sft": {"objective": {"sft_weight": 1.0}}, "delta": {}}
    pipeline = [{"name": "student_new", "model": made}, *({"name": name, "train": one} for name, one in stages.items())]
    recipe = {"extends": str(lab.recipe), "models": {"student": {"weights": "{root}/student_new"}}}
    recipe["pipeline"] = pipeline
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "tiny.yaml")


def test_the_rate_of_least_cross_entropy_is_chosen_and_one_that_diverges_is_passed_over():
    found = {"sft": {1.0e-3: 0.3, 1.0e-2: 0.1, 1.0e-1: 0.2}, "delta": {1.0e-3: float("nan"), 1.0e-2: 0.2, 1.0e-1: None}}
    assert best_of(found) == {"sft": 1.0e-2, "delta": 1.0e-2}
    with pytest.raises(RunError, match="gkd has a finite cross-entropy with none"):
        best_of({"gkd": {1.0e-3: None, 1.0e-2: float("inf")}})


def test_rates_are_chosen_on_rows_behind_those_of_the_table(lab, tmp_path):
    base = Base(with_methods(lab, tmp_path), [], ["evaluation.num_prompts=4"], tmp_path / "made")
    recipe = load(base.name, [*base.overrides, *rows_behind(base)]).recipe
    of_table, chosen_on = held_out_conversations(base.load().recipe, 4), held_out_conversations(recipe, None)
    assert len(chosen_on) == 4 and not {one.where for one in of_table} & {one.where for one in chosen_on}


def test_a_training_that_diverges_is_no_fault_and_any_other_is_told(lab, tmp_path):
    base = Base(with_methods(lab, tmp_path), [], [], tmp_path / "made")
    runs = rate_runs(base, ["sft", "delta"], [1.0e-3, 1.0e-2, 1.0e-1], 2, "single", "")
    faults = {runs[1].recipe.directory: "step 2: loss nan."}
    with pytest.raises(RunError, match="1 of 6 runs failed: step 2: loss nan"):
        survivors(runs, faults)
    (Path(runs[1].recipe.directory) / "faulty").mkdir(parents=True)
    assert survivors(runs, faults) == [runs[0], *runs[2:]]
    for run in runs[:3]:
        faults[run.recipe.directory] = "step 1: loss nan."
        (Path(run.recipe.directory) / "faulty").mkdir(parents=True, exist_ok=True)
    with pytest.raises(RunError, match="3 of 6 runs failed"):  # no rate is left
        survivors(runs, faults)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (WORLDS + "questions: {q: {ask: a, worlds: [there], sweep: [seed=1]}}", "q asks in there, which is no world"),
        (WORLDS + "questions: {q: {ask: a, worlds: [here]}}", "has both a sweep and methods, or none"),
        (WORLDS + "questions: {'Q?': {ask: a, worlds: [here], sweep: [seed=1]}}", "'Q?' is no name of a folder"),
        (
            WORLDS + "questions: {models: {ask: a, worlds: [here], sweep: [seed=1]}}",
            "models is a folder that runs have",
        ),
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
        (["delta_small", "--root=/dev/null/made"], "/dev/null/made: cannot be written (Not a directory)"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is_made(words, said, capsys, tmp_path):
    assert main(["study", f"--root={tmp_path}/made", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("q", "methods: [sft, nonsense]", "nonsense is no training stage of quickstart"),
        ("q", "methods: [delta]", "sft is missing"),
        ("q", "methods: [sft], seeds: []", "seeds: none"),
        ("q", "methods: [sft], seeds: [1, 1]", "has one of them twice"),
        ("q", "methods: [sft], learning_rates: [0.1], seeds: [0]", "seeds: 0. Write some"),
        ("q", "methods: [sft], learning_rates: [0.1, 0.1]", "has one of them twice"),
        ("q", "methods: [sft], learning_rates: [0.1, 0.10000001]", "too near to each other"),
        ("delta", "methods: [sft]", "a stage of quickstart has this name"),
    ],
)
def test_methods_that_cannot_be_compared_are_refused_before_anything_is_made(name, asked, said, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(WORLDS + f"questions: {{{name}: {{ask: a, worlds: [here], {asked}}}}}\n")
    assert main(["study", f"{tmp_path}/mine.yaml", f"--root={tmp_path}/made"]) == 2
    error = capsys.readouterr().err
    assert f"{name} in here: " in error and said in error and not (tmp_path / "made").exists()


def test_a_rate_for_all_is_refused_where_each_method_chooses_however_it_is_written(tmp_path):
    base = Base("quickstart", [], ["train={learning_rate: 0.5}"], tmp_path)
    with pytest.raises(RunError, match="sets it for all, and each method shall choose"):
        rate_runs(base, ["sft"], [1.0e-3], None, "single", "")


def test_a_study_of_one_s_own_extends_one_of_the_book_and_its_worlds_settings_win(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: delta_small\nworlds: {math: {set: ['engine={name: fsdp2}']}}\n")
    asked = study.Asked("mine", [], [], 1, tmp_path, ["generation.num_prompts=7"])
    one = askings(read_study(str(tmp_path / "mine.yaml")), ["alpha"], asked.overrides)[0]
    recipe = study._base(asked, one, {}).load().recipe
    assert (one.world, recipe.engine.name, recipe.generation.num_prompts) == ("math", "fsdp2", 7)
    read_grid(one.recipe, study._words(one, study._base(asked, one, {})), one.name)


def test_a_question_that_fails_says_so_beside_what_it_had_and_the_others_are_asked(lab, tmp_path, capsys):
    (tmp_path / "bare.yaml").write_text(f"extends: {lab.recipe}\nmodels: {{teacher: {{weights: '{tmp_path}/none'}}}}\n")
    worlds = "".join(f"  {name}: {{recipe: {tmp_path}/bare.yaml}}\n" for name in ("here", "there"))
    questions = "questions: {q: {ask: a, worlds: [here, there], sweep: ['seed=1,2']}}\n"
    (tmp_path / "mine.yaml").write_text(f"title: t\nworlds:\n{worlds}{questions}")
    old = tmp_path / "made/here/sweeps/q/table.md"
    old.parent.mkdir(parents=True)
    old.write_text("# old\n\n| a table |\n")
    words = ["study", f"{tmp_path}/mine.yaml", f"--root={tmp_path}/made"]
    assert main(words) == 2
    error, text = capsys.readouterr().err, (tmp_path / "made/study.md").read_text()
    assert "2 of 2 questions are not answered. q in here: " in error and "Traceback" not in error
    fault = f"models.teacher.weights: {tmp_path}/none does not exist"
    assert text.count(fault) == 2 and "What there is of it:\n\n| a table |" in text
    assert text.endswith("\n\nNot measured yet.\n")
    with RunDirectory(tmp_path / "made").claim():
        assert main(words) == 2 and "made: in use by a live run" in capsys.readouterr().err


@pytest.mark.soak
def test_a_study_answers_every_question_tells_of_those_that_failed_and_goes_on(lab, tmp_path, capsys, monkeypatch):
    tiny = with_methods(lab, tmp_path)
    few = ["train.steps=2", "evaluation.num_prompts=4", "pipeline.student_new.model.hidden_size=16"]
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
    worlds = {"one": {"recipe": tiny, "set": few}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"title": "Mine", "worlds": worlds, "questions": questions}))
    words = ["study", str(tmp_path / "mine.yaml"), f"--root={tmp_path}/made", "--jobs=2"]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "1 of 3 questions are not answered. impossible in one" in said.err and "Traceback" not in said.err
    text = (tmp_path / "made/study.md").read_text()
    assert text in said.out and text.count("No setting is whole yet.") == 1
    assert "## Which alpha?" in text and "Learning rates, of 0.0001, 0.01 that with" in text and "(at an end)" in text
    for found in (tmp_path / "made/one/sweeps/alpha").glob("alpha=*/export/config.json"):
        assert json.loads(found.read_text())["hidden_size"] == 16  # as the world says
    tried = json.loads((tmp_path / "made/one/methods/rates/rates.json").read_text())["cross_entropy"]
    for name in ("sft", "delta"):
        trained = load(str(tmp_path / f"made/one/methods/{name}_seed1/recipe.yaml")).recipe.train.learning_rate
        assert trained == float(min(tried[name], key=tried[name].__getitem__))
    assert "cross-entropy over alpha" in (tmp_path / "made/report.html").read_text()

    monkeypatch.setattr(pipeline.sys, "executable", "/bin/false")  # nothing can be started now
    assert main([*words, "--only=alpha,methods"]) == 0
    again = (tmp_path / "made/study.md").read_text()
    fault = next(line for line in text.splitlines() if line.startswith("Not answered: 2 of 2 runs failed"))
    assert again.splitlines()[4:] == text.replace(f"{fault}\n\n", "").splitlines()[4:]
    typed = "evaluation.num_prompts=3"
    assert main([*words, "--only=alpha", typed]) == 0
    headings = [line for line in (tmp_path / "made/study.md").read_text().splitlines() if line.startswith("### ")]
    assert [typed in line for line in headings] == [True, False, False]  # the other tables are those of before


def test_what_is_typed_wins_over_a_question_and_a_question_over_its_world(tmp_path, monkeypatch):
    """So a trial of a few steps is one word."""
    asked = Asked("delta_small", [], ["alpha", "architecture"], 1, tmp_path, ["train.steps=30", "seed=5"])
    found = read_study("delta_small")
    for one in askings(found, asked.only, asked.overrides):
        base = _base(asked, one, {})
        if one.question.methods:
            assert _comparison(one, base).steps is None and base.load().recipe.train.steps == 30
        else:
            grid = read_grid(base.name, _words(one, base), one.name)
            assert {point.loaded.recipe.train.steps for point in grid.points} == {30}
            assert {point.seed for point in grid.points} == {5} and len(grid.points) == 4
    world = replace(one, question=found.questions["alpha"], set=["train.steps=9"], typed=[])
    grid = read_grid("small_math", _words(world, _base(asked, world, {})), "alpha")
    assert {point.loaded.recipe.train.steps for point in grid.points} == {60}
