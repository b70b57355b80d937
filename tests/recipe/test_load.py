"""Laws of the recipe loader: who wins, where a value came from, and that every refusal says what to write."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakd.base.errors import RecipeError
from deltakd.recipe.load import as_override, dump_recipe, find_recipe, load, load_recipe, read_added
from deltakd.recipe.schema import Recipe

BASE = """\
models:
  student: {weights: org/student}
  teacher: {weights: "{root}/teacher/export"}
data:
  train: {path: "{other}/rows.jsonl"}
train:
  steps: 10
  tokens_per_step: 8_192
  tokens_per_micro_batch: 4_096
  learning_rate: 1
engine: {name: deepspeed, zero_stage: 3}
"""
CHILD = """\
extends: base
train:
  learning_rate: 1.0e-3
pipeline:
  - name: words
    tokenizer: {vocab_size: 300, files: ["{root}/rows.jsonl"]}
  - name: sft
    train:
      objective: {sft_weight: 1.0}
      train: {steps: 3}
"""


@pytest.fixture(autouse=True)
def recipes(tmp_path, monkeypatch):
    """Work in a folder with recipes/base.yaml and recipes/child.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/base.yaml").write_text(BASE)
    Path("recipes/child.yaml").write_text(CHILD)


def refusal(name: str, *overrides: str, stage: str | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load(name, overrides, stage)
    return str(caught.value)


def written(text: str, name: str = "recipes/case.yaml") -> str:
    Path(name).write_text(text)
    return name


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


def test_an_unknown_recipe_lists_the_known_ones():
    assert find_recipe("base") == Path("recipes/base.yaml")
    assert "Write child" in refusal("chil") and "base" in refusal("chil")
    assert "./x.yaml: no such file" in refusal("./x.yaml")


REFUSED_OVERRIDES = {
    "train.learning_rate=1e-5": "train.learning_rate: '1e-5' is a text in YAML. Write 1.0e-5.",
    "train.learning_rate=-.5e3": "train.learning_rate: '-.5e3' is a text in YAML. Write -0.5e+3.",
    "train.steps=1e6": "train.steps: '1e6' is a text in YAML. Write 1_000_000.",
    "train.steps=5.0": "train.steps: 5.0 is no whole number. Write 5.",
    "train.steps=yes": "train.steps: yes is true or false in YAML. Write a whole number above 0.",
    "train.steps=0": "train.steps: 0 does not fit. Write a whole number above 0.",
    "objective.sft_weight=2": "objective.sft_weight: 2 does not fit. Write a number of at least 0 and of at most 1.",
    "train.learning_rate=.inf": "train.learning_rate: .inf does not fit. Write a number above 0 and of at most 1000.",
    "train=null": "train: empty. Write a mapping with steps, tokens_per_step, tokens_per_micro_batch, learning_rate.",
    "models.student.revision=0123": "models.student.revision: 0123 is a number in YAML. Write '0123', in quotes.",
    "engine.name=fsdp": "engine.name: 'fsdp' is not known. Write fsdp2 (known: deepspeed, fsdp2, single).",
    "engine.zero_stag=3": "engine.zero_stag: unknown key. Write zero_stage (known here: meet_s, name, ",
    "objective.target.alpha=1": "objective.target.name: missing. Write name: teacher, delta, mixture, ",
    "data.layout=pack": "data.layout: 'pack' is not known. Write packed (known: packed, padded).",
    "pipeline=[{name: a}]": "pipeline.0: stage a has no kind. Write exactly one of world, tokenizer, model, ",
    "data.train={path: a, path: b}": "data.train.path: written twice, first at command line. Remove one of them.",
    "train.steps=[1": "train.steps: not YAML: expected ',' or ']', but got '<stream end>'. Check indentation, ",
    "root={root}/x": "root: not YAML: expected '<document start>', but found '<scalar>'. Write a text that starts",
    "train.steps=": "train.steps: no value. Write train.steps=VALUE, or train.steps=null.",
    "train.steps": "train.steps: not a setting. Write it as train.steps=100.",
    "pipeline.0.name=x": "pipeline.0.name: pipeline is a list of words, sft. Write pipeline.words... for one of ",
    "pipeline={x: {train: {}}}": "x: nothing here has this name. Write one of words, sft.",
    "pipeline.words.tokenizer.files.0=x": "pipeline.words.tokenizer.files.0: pipeline.words.tokenizer.files is a list, "
    "and lists are replaced whole. Write pipeline.words.tokenizer.files=[...], or edit recipes/child.yaml:6.",
}


@pytest.mark.parametrize(("override", "sentence"), REFUSED_OVERRIDES.items())
def test_a_refused_value_comes_with_the_one_to_write(override, sentence):
    assert refusal("child", override).startswith(f"command line: {sentence}")


BROKEN_FILES = {
    "# nothing\n": ": the file is empty. Write",
    "- a\n": ":1: the file holds a list. Write",
    "a: 1\n\tb: 2\n": ":2: not YAML: found character",
    "data:\n  train: {path: {root}/x}\n": ":2: not YAML: expected ',' or '}', but got '<scalar>'. Write a text that",
    "a: 1\nb: 2\na: 3\n": ":3: a: written twice, first at recipes/case.yaml:1. Remove one of them.",
    "a: &x {b: *x}\n": ":1: a.b: an alias of something that contains it. Write the value out.",
    "evaluation:\n  7: 1\n": ":2: evaluation: the key 7 is no text to YAML. Write it in quotes.",
    "extends: base\n<<: {seed: 1}\n": ":2: top level: `<<` is not read. Write the keys out, or use extends.",
    "extends: base\ndata:\n  train: {path: {root}}\n": ":3: data.train.path: {root} is a mapping in YAML. Write '{r",
    "extends: base\nseed: 2024-13-01\n": ":2: seed: 2024-13-01 cannot be read (month must be in 1..12). Write '2",
    "seed: 1\n": ":1: models: missing. Write models: a mapping with student.",
}


@pytest.mark.parametrize(("text", "sentence"), BROKEN_FILES.items())
def test_a_broken_file_is_refused_with_its_line(text, sentence):
    assert refusal(written(text)).startswith(f"recipes/case.yaml{sentence}")


def test_several_problems_make_at_most_three_lines_and_a_typo_hides_the_key_it_misses():
    path = written("extends: base\nsed: 1\ntrain:\n  steps: 0\n  beta1: 2\n  beta2: 2\n  bet: 3\n  warmup_step: 1\n")
    lines = refusal(path).splitlines()
    assert [line.split(":")[1] for line in lines] == ["7", "8", "2"]
    typo = refusal(written(BASE.replace("  steps: 10", "  step: 10")))
    assert typo == "recipes/case.yaml:7: train.step: unknown key. Write steps."


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
