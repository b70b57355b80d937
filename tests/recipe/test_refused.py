"""Every refusal of a recipe says where, what, and what to write."""

from pathlib import Path

import pytest

from deltakd.recipe.load import find_recipe
from tests.recipe.written import BASE, recipes, refusal, written  # noqa: F401 (a fixture)


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
