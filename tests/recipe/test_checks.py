"""Laws of the cross-field checks: what cannot hold together is refused at the line that set it."""

from pathlib import Path

import pytest

from deltakd.__main__ import main
from deltakd.base.errors import RecipeError
from deltakd.losses.settings import ObjectiveSettings, needed_references
from deltakd.recipe.checks import check_every_stage
from deltakd.recipe.load import load
from deltakd.recipe.paths import check_paths

RECIPE = """\
models:
  student: {weights: org/student}
  teacher: {weights: "{root}/teacher/export"}
data:
  train: {path: org/rows, skip_rows: 100}
  validation: {path: org/rows, num_rows: 100}
train:
  steps: 10
  tokens_per_step: 8_192
  tokens_per_micro_batch: 4_096
  learning_rate: 1.0e-3
pipeline:
  - name: teacher
    train:
      objective: {sft_weight: 1.0}
  - name: delta
    train: {}
  - name: table
    evaluate: {models: {kd: a, delta: b}, baseline: kd}
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch):
    """Work in a folder with recipes/case.yaml, which passes every check."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/case.yaml").write_text(RECIPE)


def refusal(old: str = "", new: str = "", overrides: tuple[str, ...] = ()) -> str:
    assert old in RECIPE
    Path("recipes/case.yaml").write_text(RECIPE.replace(old, new) if old else RECIPE)
    with pytest.raises(RecipeError) as caught:
        check_every_stage("case", overrides)
    return str(caught.value)


def refused_path(*overrides: str) -> str:
    loaded = load("case", overrides)
    with pytest.raises(RecipeError) as caught:
        check_paths(loaded.recipe, loaded.where, "case")
    return str(caught.value)


def make_model(folder: str) -> None:
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"teacher"}),
        ({"sft_weight": 1.0}, set()),
        ({"sft_weight": 0.99, "target": {"name": "delta"}}, {"teacher", "teacher_raw", "student_raw"}),
        ({"target": {"name": "delta", "alpha": 0.0}}, {"teacher"}),
        ({"target": {"name": "delta", "alpha": 0.0, "anchor": "student"}}, {"student_raw"}),
        ({"target": {"name": "delta", "anchor": "student"}}, {"teacher", "teacher_raw", "student_raw"}),
    ],
)
def test_an_objective_needs_exactly_the_models_with_a_weight_in_its_target(settings, names):
    assert needed_references(ObjectiveSettings.model_validate(settings)) == names


def test_a_sound_recipe_is_returned_once_as_it_is_and_once_per_train_stage():
    assert [loaded.recipe.run for loaded in check_every_stage("case")] == ["train", "teacher", "delta"]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "  teacher: {w",
            "  teacher_raw: {w",
            "1: models.teacher: missing, but the target teacher reads it. Write teacher",
        ),
        (
            "\ntrain:\n",
            "\n  max_tokens: 5000\ntrain:\n",
            "7: data.max_tokens: an example of 5,000 tokens does not fit into",
        ),
        (
            "  steps: 10",
            "  steps: 10\n  warmup_steps: 10",
            "9: train.warmup_steps: 10 steps of warm-up leave none of tra",
        ),
        (
            "skip_rows: 100",
            "skip_rows: 100, where: {kind: [a]}",
            "6: data.validation.where: not data.train's, so which rows of org/rows are first differs, and held-out",
        ),
        (
            "  train: {path: org/rows, skip_rows: 100}",
            "  apart: prompts\n  supervise: all\n  train: {path: org/rows, skip_rows: 100}",
            "5: data.apart: prompts, but rows of which all is learnt have no prompt. Write rows.",
        ),
        (
            "skip_rows: 100",
            "skip_rows: 99",
            "6: data.validation: rows 99 to 100 of org/rows are also in data.train. Write",
        ),
        (", num_rows: 100}", "}", "6: data.validation: rows 100 to the last of org/rows are also in data.train. Write"),
        (
            "name: delta",
            "name: teacher",
            "16: pipeline.1.name: teacher is taken by recipes/case.yaml:13: pipeline.0.name.",
        ),
        (
            "baseline: kd",
            "baseline: x",
            "19: pipeline.2.evaluate.baseline: x is none of the models. Write one of kd, de",
        ),
        ("  validation: {path: org/rows, num_rows: 100}\n", "", "4: data.validation: missing, but pipeline.2.evaluate"),
        ("models:\n", "root: ~/x\nmodels:\n", "1: root: ~/x has a ~. Write /"),
        (
            "train: {}",
            "train: {rollouts: {on_policy_fraction: 0.5}, objective: {sft_weight: 0.5}}",
            "17: stage delta: rollouts.on_policy_fraction: 0.5, but objective.sft_weight is 0.5: the student would",
        ),
        (
            "train: {}",
            "train: {rollouts: {on_policy_fraction: 0.5}, references: {from: cache}}",
            "17: stage delta: rollouts.on_policy_fraction: 0.5, but a cache knows no answer before it is written.",
        ),
        (
            "train: {}",
            "train: {rollouts: {on_policy_fraction: 0.5}, data: {supervise: all}}",
            "17: stage delta: rollouts.on_policy_fraction: 0.5, but rows of which all is learnt have no prompt.",
        ),
        (
            "train: {}",
            "train: {objective: {policy_gradient: {reward: {teacher: 1}}}}",
            "17: stage delta: objective.policy_gradient: set, but the student never writes. Write rollouts.on_policy_",
        ),
        (
            "train: {}",
            "train: {rollouts: {adaptive: {}, top_p: 0.9}, validation: {every_steps: 5}, "
            "objective: {policy_gradient: {reward: {teacher: 1}}}}",
            "17: stage delta: rollouts.top_p: 0.9, but policy_gradient needs tokens drawn from the student as it is",
        ),
        (
            "train: {}",
            "train: {rollouts: {on_policy_fraction: 1}, objective: {policy_gradient: {reward: {x: 1}}}}",
            "17: stage delta: objective.policy_gradient.reward: x is no frozen model. Write one of student",
        ),
        (
            "train: {}",
            "train: {rollouts: {adaptive: {}}}",
            "17: stage delta: rollouts.adaptive: set, but nothing is validated that it could follow.",
        ),
        (
            "train: {}",
            "train: {rollouts: {on_policy_fraction: 1, teacher_mix: 0.2}, "
            "objective: {target: {name: mixture, weights: {student_raw: 1}}}}",
            "17: stage delta: rollouts.teacher_mix: 0.2, but the objective reads no model named teacher. Write 0",
        ),
    ],
)
def test_settings_that_cannot_hold_together_are_refused_at_their_line(old, new, sentence):
    assert refusal(old, new).startswith(f"recipes/case.yaml:{sentence}")


def test_a_fault_in_any_stage_is_found_at_the_line_inside_the_stage():
    schema_fault = refusal("{sft_weight: 1.0}", "{sft_weight: 1.5}")
    assert schema_fault.startswith("recipes/case.yaml:15: stage teacher: objective.sft_weight: 1.5 does not fit.")
    cross_fault = refusal("    train: {}", "    train: {objective: {target: {name: delta}}}")
    assert cross_fault.startswith("recipes/case.yaml:1: stage delta: models.teacher_raw: missing")


def test_validation_may_take_other_rows_another_split_or_the_rows_before_train():
    for override in ("data.validation.split=test", "data.validation.path=org/other", "data.validation.num_rows=50"):
        check_every_stage(
            "case", [override, "data.train.skip_rows=50" if "num" in override else "data.train.skip_rows=0"]
        )


def test_a_label_that_no_file_name_can_hold_is_refused():
    assert "the name 'a b' does not fit" in refusal(overrides=("evaluation.kept={a b: x.jsonl}",))


def test_a_model_that_the_run_would_make_is_asked_for_only_where_the_objective_reads_it():
    assert refused_path() == (
        "recipes/case.yaml:3: models.teacher.weights: runs/case/teacher/export does not exist. Run `python -m deltakd "
        "run case` first, which makes it, or write the folder of a model or a hub id."
    )
    assert refused_path("pipeline=[]").endswith("does not exist. Write the folder of a model or a hub id.")
    assert "out/teacher does not exist" in refused_path("root=out", "models.teacher.weights='{root}/teacher'")
    sft = load("case", stage="teacher")
    check_paths(sft.recipe, sft.where)
    Path("runs/case/teacher/export").mkdir(parents=True)
    assert "holds no config.json" in refused_path()
    Path("runs/case/teacher/export/config.json").write_text("{}")
    loaded = load("case")
    check_paths(loaded.recipe, loaded.where)


@pytest.mark.parametrize(
    "path", ["rows.jsonl", "./rows", "/no/rows", "~/no/rows", "a/b/c", "recipes/rows", "rows/*.jsonl"]
)
def test_what_looks_like_a_local_path_must_exist(path):
    make_model("runs/case/teacher/export")
    message = refused_path(f"data.train.path='{path}'")
    assert message.startswith("command line: data.train.path: ") and "Write " in message


def test_files_folders_and_patterns_pass_if_no_file_is_both_trained_and_validated_on():
    make_model("runs/case/teacher/export")
    for folder in ("train", "held_out"):
        Path(folder).mkdir()
        Path(f"{folder}/rows.jsonl").write_text("{}\n")
    loaded = load("case", ["data.train.path='tr*/*.jsonl'", "data.validation.path=held_out"])
    check_paths(loaded.recipe, loaded.where)
    shared = refused_path("data.train.path='*/*.jsonl'", "data.validation.path=held_out")
    assert "held_out/rows.jsonl is also read for data.train" in shared
    ignored = refused_path("data.train.path=train", "data.train.split=test")
    assert ignored == "command line: data.train.split: test, but train is local. Write split: train."
    assert "evaluation.kept.raw: x.jsonl does not exist" in refused_path("evaluation.kept.raw=x.jsonl")


RAW = ("models.teacher_raw={weights: org/raw}", "objective.target=delta")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("references.payload=top_k", "objective.target=taid"),
            "references.payload: top_k, but the target of taid moves",
        ),
        (
            ("references.payload=target", *RAW[:1], "objective.target={name: parallelogram, vertex: teacher}"),
            "beside the student",
        ),
        (
            ("references.payload=sampled", "objective.divergence=reverse_kl"),
            "draws estimate forward_kl over all tokens",
        ),
        (("references.payload=sampled", "objective.support={top_p: 0.9}"), "not forward_kl on a support"),
        (
            ("models.student={weights: org/student, load_in_8bit: true}",),
            "models.student.load_in_8bit: true, but the student is trained",
        ),
        (
            ("teachers.tensor_parallel=2", "teachers.per_node=3"),
            "3 processes of a node do not make teachers of 2 each. Write teachers.per_node: 4",
        ),
        (
            ("teachers.tensor_parallel=2", "teachers.per_node=4", "teachers.serves=[[teacher]]"),
            "1 lists for 2 teacher ranks of a node (4 processes, 2 each)",
        ),
        (
            ("teachers.tensor_parallel=2", "teachers.per_node=2", "references.from=in_process"),
            "teachers.tensor_parallel: 2, but references.from: in_process loads whole models",
        ),
        (
            (
                "teachers.tensor_parallel=2",
                "teachers.per_node=2",
                "models.teacher={weights: org/teacher, load_in_8bit: true}",
            ),
            "models.teacher.load_in_8bit: true, but teachers.tensor_parallel is 2",
        ),
        (("teachers.serves=[[teacher], [teacher]]",), "2 lists for 1 teacher ranks"),
        (("teachers.serves=[[techer]]",), "techer is no frozen model. Write some of"),
        (("teachers.serves=[[teacher]]", *RAW), "student_raw is missing, and nobody serves it"),
        (
            (
                "teachers.serves=[[teacher], [teacher_raw, student_raw]]",
                "teachers.per_node=2",
                "references.payload=target",
                *RAW,
            ),
            "student_raw is missing, and payload target is formed of all of them",
        ),
    ],
)
def test_what_teachers_cannot_serve_or_send_is_refused(overrides, said):
    assert said in refusal(overrides=overrides)


def test_a_table_s_model_that_no_stage_makes_is_missed_before_the_first_stage(lab, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        f"extends: {lab.recipe}\nroot: {tmp_path}/quickstart\npipeline:\n  - {{name: kd, train: {{}}}}\n"
        '  - {name: table, evaluate: {models: {kd: "{root}/kd/export", sft: "{root}/sft/export"}, baseline: kd}}\n'
    )
    assert main(["run", str(tmp_path / "mine.yaml")]) == 2
    said = capsys.readouterr().err
    assert f"models.sft: {tmp_path}/quickstart/sft/export: no stage here makes it" in said
    assert "(python -m deltakd run quickstart)" in said and not (tmp_path / "quickstart" / "kd").exists()


def test_a_recipe_s_own_run_may_have_a_name_beside_its_stages(lab, capsys):
    assert main(["check", str(lab.recipe), "run=mine", "pipeline=[{name: kd, train: {}}]"]) == 0
    assert "run: mine" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [["run"], ["run", "--dry-run"], ["train"], ["generate"]])
def test_no_processes_are_refused_by_every_verb_that_starts_some(verb, capsys):
    assert main([*verb, "case", "--processes", "0"]) == 2
    assert "--processes: 0. Write 1 or more." in capsys.readouterr().err
