"""Laws of the recipe loader: who wins, and where a value came from."""

import subprocess
import sys
from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakd.recipe.load import as_override, dump_recipe, load, load_recipe, read_added
from deltakd.recipe.schema import Recipe
from tests.recipe.written import BASE, CHILD, recipes, refusal, written  # noqa: F401 (a fixture)


def test_the_command_line_wins_over_the_stage_the_stage_over_the_file_and_the_file_over_what_it_extends():
    assert load_recipe("base").train.learning_rate == 1.0
    assert load_recipe("child").train.learning_rate == 1.0e-3
    assert (load_recipe("child").train.steps, load_recipe("child", stage="sft").train.steps) == (10, 3)
    assert load_recipe("child", ["train.steps=5"], "sft").train.steps == 5
    assert load_recipe("child", ["train.steps=5", "train.steps=6"]).train.steps == 6


def test_an_override_means_the_stages_that_have_its_setting_and_leaves_the_others_alone():
    path = written(
        "extends: base\nobjective: {target: {name: delta, alpha: 0.5}}\n"
        "pipeline: [{name: plain, train: {objective: {target: {name: teacher}}}}, {name: shifted, train: {}}]\n"
    )
    targets = {
        stage: load_recipe(path, ["objective.target.alpha=0.9"], stage).objective.target
        for stage in ("plain", "shifted")
    }
    assert targets["plain"].name == "teacher" and targets["shifted"].alpha == 0.9
    assert load_recipe(path, ["objective.target={name: delta, alpha: 1}"], "plain").objective.target.alpha == 1


def test_a_stage_names_its_run_and_leaves_root_to_the_file_that_the_user_named():
    assert (load_recipe("child").directory, load_recipe("child", stage="sft").directory) == (
        "runs/child/train",
        "runs/child/sft",
    )
    assert refusal("child", stage="words") == (
        "recipes/child.yaml:4: pipeline: stage words does not train. Write one of sft."
    )
    assert refusal("child", stage="x") == (
        "recipes/child.yaml:4: pipeline: stage x is in no pipeline here. Write one of sft."
    )
    assert refusal("child", "run=x", stage="sft").startswith("command line: run: a stage's run has the stage's name")
    path = written(CHILD.replace("train: {steps: 3}", "root: elsewhere"))
    assert refusal(path, stage="sft").startswith(f"{path}:10: stage sft: root: a stage cannot set it")


def test_a_change_of_name_drops_the_settings_of_the_other_name_and_nothing_else_does():
    assert load_recipe("base", ["engine.name=single"]).engine.name == "single"
    assert load_recipe("base", ["engine={name: single}", "train.steps=2"]).train.tokens_per_step == 8192
    path = written("extends: base\nobjective: {target: {name: delta, alpha: 0.9}}\n")
    anchored = load_recipe(path, ["objective.target={name: delta, anchor: student}"]).objective.target
    assert anchored.model_dump() == {"name": "delta", "alpha": 0.9, "schedule": None, "anchor": "student"}
    reversed_ = load_recipe("base", ["objective.target.alpha=0.25", "objective.target.name=delta"]).objective.target
    assert reversed_.model_dump() == {"name": "delta", "alpha": 0.25, "schedule": None, "anchor": "teacher"}


def test_a_name_alone_is_its_mapping_and_takes_settings_in_any_order():
    for order in (1, -1):
        words = ["objective.divergence=jsd", "objective.divergence.beta=0.3"][::order]
        assert load_recipe("base", words).objective.divergence.model_dump() == {"name": "jsd", "beta": 0.3}, words


def test_root_is_filled_in_wherever_a_text_asks_for_it_and_no_other_brace_is_touched():
    recipe = load_recipe("child", ["root=/big/disk"])
    assert recipe.models.teacher.weights == "/big/disk/teacher/export"
    assert recipe.pipeline[0].tokenizer.files == ["/big/disk/rows.jsonl"]
    assert recipe.data.train.path == "{other}/rows.jsonl"
    assert "Write one without braces" in refusal("base", "root='{root}'")


def test_every_value_knows_the_line_that_set_it_and_a_default_the_line_of_what_is_around_it():
    base, stage = load("child", ["seed=3"]), load("child", stage="sft")
    assert base.where("train.learning_rate") == "recipes/child.yaml:3: train.learning_rate"
    assert base.where("train.steps") == "recipes/base.yaml:7: train.steps"
    assert base.where("models.teacher.revision") == "recipes/base.yaml:3: models.teacher.revision"
    assert base.where("train.beta1") == "recipes/child.yaml:2: train.beta1"
    assert base.where("seed") == "command line: seed"
    assert base.where("pipeline.1.name") == "recipes/child.yaml:7: pipeline.1.name"
    assert stage.where("train.steps") == "recipes/child.yaml:10: stage sft: train.steps"


def test_extends_takes_a_name_or_a_path_beside_the_file_and_refuses_circles():
    Path("recipes/deep").mkdir()
    deep = written("extends: ../child.yaml\nseed: 5\n", "recipes/deep/a.yaml")
    assert load_recipe(written("extends: a\n", "recipes/deep/b.yaml")).seed == 5
    assert load(deep).where("seed") == "recipes/deep/a.yaml:2: seed"
    written("seed: 1\nextends: two\n", "recipes/one.yaml")
    written("extends: one\n", "recipes/two.yaml")
    assert refusal("one") == "recipes/two.yaml:1: extends: one leads back to itself. Remove one extends."
    assert refusal(written("extends: bas\n")).startswith("recipes/case.yaml:1: extends: recipe bas: no recipe has")


def test_of_several_that_are_extended_the_later_ones_bring_what_they_add_but_not_where_they_lie():
    Path("recipes/methods").mkdir()
    Path("recipes/on_base").mkdir()
    method = "extends: child\nroot: runs/child\nrun: kd\ntrain: {warmup_steps: 2}\npipeline: [{name: kd, train: {}}]\n"
    written(method, "recipes/methods/kd.yaml")
    laid = load(written("extends: [base, methods/kd]\nseed: 4\n", "recipes/on_base/kd.yaml"))
    recipe, base = laid.recipe, load_recipe("base")
    assert (recipe.root, recipe.run, recipe.seed) == ("runs/kd", "kd", 4)
    assert [stage.name for stage in recipe.pipeline] == ["kd"] and recipe.train.warmup_steps == 2
    assert recipe.train.learning_rate == base.train.learning_rate == 1.0  # child's 1.0e-3 is what kd lies on
    assert laid.where("train.warmup_steps") == "recipes/methods/kd.yaml:4: train.warmup_steps"
    assert read_added("on_base/kd") == {
        "run": "kd",
        "seed": 4,
        "train": {"warmup_steps": 2},
        "pipeline": [{"name": "kd", "train": {}}],
    }
    again = load_recipe(written("extends: [child, on_base/kd]\ntrain: {steps: 7}\n", "recipes/third.yaml"))
    assert (again.train.steps, again.train.warmup_steps, again.train.learning_rate) == (7, 2, 1.0e-3)
    looped = written("extends: [base, loop]\n", "recipes/loop.yaml")
    assert refusal(looped) == "recipes/loop.yaml:1: extends: loop leads back to itself. Remove one extends."
    assert "extends: 3 is no file" in refusal(written("extends: [base, 3]\n"))
    assert "extends: [] is no file" in refusal(written("extends: []\n"))


def test_a_stage_is_changed_by_its_name_from_a_file_and_from_the_command_line():
    path = written("extends: child\npipeline:\n  words: {tokenizer: {vocab_size: 400}}\n  sft: {train: {seed: 4}}\n")
    recipe = load_recipe(path)
    assert [stage.name for stage in recipe.pipeline] == ["words", "sft"]
    assert (recipe.pipeline[0].tokenizer.vocab_size, recipe.pipeline[0].tokenizer.files) == (
        400,
        ["runs/case/rows.jsonl"],
    )
    stage = load_recipe(path, ["pipeline.sft.train.train.steps=9", "pipeline.sft.train.seed=5"], "sft")
    assert (stage.train.steps, stage.seed, stage.objective.sft_weight, stage.train.learning_rate) == (9, 5, 1.0, 1.0e-3)
    assert load_recipe(path, ["pipeline.sft.train.seed=5", "train.steps=7"], "sft").train.steps == 7
    for own in ("pipeline.sft.train.train.steps=9", "pipeline={sft: {train: {train: {steps: 9}}}}"):
        stage = load_recipe(path, [own, "train.steps=7", "train.learning_rate=0.5"], "sft")
        assert (stage.train.steps, stage.train.learning_rate) == (9, 0.5)  # what is said of one stage wins over all
    words = ["models.teacher.weights=mine", "pipeline.sft.train.models.student.weights='{models.teacher.weights}'"]
    words.append("pipeline.sft.train.models.teacher.weights=other")
    assert load_recipe(path, words, "sft").models.student.weights == "mine"  # the recipe's teacher, not the stage's
    table = "pipeline: [{name: table, evaluate: {models: {a: org/a, b: org/b}, baseline: b, teacher: a}}]\n"
    written("extends: base\n" + table, "recipes/tabled.yaml")
    path = written("extends: tabled\npipeline: {table: {evaluate: {models: {a: null}, teacher: null}}}\n")
    assert load_recipe(path).pipeline[0].evaluate.models == {"b": "org/b"}  # as an accelerator too small for a wants
    assert "recipes/case.yaml:2: word: nothing here has this name" in refusal(
        written("extends: child\npipeline: {word: {tokenizer: {vocab_size: 400}}}\n")
    )


def test_a_text_may_stand_for_the_weights_of_a_model_of_the_recipe_whoever_sets_them():
    pipeline = (
        "pipeline:\n  - {name: t, train: {models: {student: {weights: '{models.teacher_raw.weights}'}}}}\n"
        "  - {name: table, evaluate: {models: {raw: '{models.student.weights}'}, baseline: raw}}\n"
    )
    written("extends: base\nmodels: {teacher_raw: {weights: org/large}}\n" + pipeline, "recipes/parent.yaml")
    path = written("extends: parent\nmodels: {student: {weights: org/other}, teacher_raw: {weights: org/huge}}\n")
    stage = load_recipe(path, stage="t")
    assert stage.models.student.weights == "org/huge"
    for recipe in (load_recipe(path), stage):
        assert recipe.pipeline[1].evaluate.models == {"raw": "org/other"}
    assert load_recipe("parent", ["models.teacher_raw.weights=x/y"], "t").models.student.weights == "x/y"


texts = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda text: "{root}" not in text)


@settings(deadline=None, max_examples=50)
@given(
    texts.filter(lambda root: root and not set(root) & set("{}")),
    texts,
    st.floats(min_value=0, max_value=1000, exclude_min=True),
    st.dictionaries(texts, st.none() | st.booleans() | st.integers() | texts | st.lists(texts), max_size=3),
)
def test_a_dumped_recipe_reads_back_equal(root, weights, learning_rate, changes):
    recipe = Recipe.model_validate(
        yaml.safe_load(BASE)
        | {"root": root, "models": {"student": {"weights": weights}}, "pipeline": [{"name": "a", "train": changes}]}
    )
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": learning_rate})})
    recipe = Recipe.model_validate(recipe.model_dump(by_alias=True) | {"data": {"train": {"path": "x"}}})
    for resolved in (recipe, load_recipe("child", ["root=elsewhere"], "sft")):
        assert load_recipe(written(dump_recipe(resolved), "dumped.yaml")) == resolved


def test_loading_and_checking_import_no_heavy_library():
    code = (
        "import sys; from deltakd.recipe.checks import check_every_stage; check_every_stage('base'); "
        "print(sorted({'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)))"
    )
    repository = Path(sys.modules["deltakd"].__file__).parents[1]
    environment = {"PYTHONPATH": str(repository), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_what_a_recipe_adds_is_its_own_folder_s_and_means_the_same_as_overrides(tmp_path):
    """The base lies elsewhere: what it sets is not added. 1e-5 as JSON writes it would be a text to YAML."""
    (tmp_path / "more").mkdir()
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(load_recipe("quickstart").model_dump(by_alias=True)))
    (tmp_path / "more" / "one.yaml").write_text(
        'extends: ../base.yaml\nobjective: {target: {name: taid}}\ndata: {train: {path: "{root}/a, b: c.jsonl"}}\n'
    )
    (tmp_path / "more" / "two.yaml").write_text(
        "extends: one\ntrain: {learning_rate: 1.0e-05}\nobjective: {divergence: {name: jsd, beta: 0.3}}\n"
    )
    two = str(tmp_path / "more" / "two.yaml")
    added = read_added(two)
    assert set(added) == {"train", "objective", "data"} and added["objective"]["target"] == {"name": "taid"}
    overrides = [as_override(key, value) for key, value in added.items()]
    assert load_recipe(str(tmp_path / "base.yaml"), overrides) == load_recipe(two, ["root=runs/quickstart"])
