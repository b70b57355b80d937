"""What editors, shells and readers are given is what the loader takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from deltakd.__main__ import main
from deltakd.recipe import api
from deltakd.recipe.load import load_recipe
from deltakd.recipe.reference import json_schema, keys, markdown

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))
RECIPES = [path for path in FILES if path.parent.name != "studies"]


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    Draft202012Validator.check_schema(json_schema())
    return Draft202012Validator(json_schema())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(REPOSITORY / "recipes")))
def test_the_schema_takes_every_recipe_as_it_is_written_and_as_it_resolves(schema, recipe):
    schema.validate(yaml.safe_load(recipe.read_text()))
    schema.validate(load_recipe(str(recipe)).model_dump(by_alias=True))


@pytest.mark.parametrize(
    "text",
    [
        "train: {step: 3}",
        "train: {steps: 0}",
        "objective: {target: {name: deltas}}",
        "objective: {target: {alpa: 0.5}}",
        "objective: {divergence: gkd}",
        "engine: {name: single, zero_stage: 3}",
        "extends: 3",
        "pipeline: [{name: a, train: {train: {step: 3}}}]",
        "pipeline: [{name: Big, train: {}}]",
        "data: {train: {path: x, where: {kind: a}}}",
        "evaluation: {kept: {text: 3}}",
    ],
)
def test_the_schema_refuses_what_the_loader_would(schema, text):
    assert not schema.is_valid(yaml.safe_load(text))


def test_an_editor_sees_what_each_key_is_for_and_a_file_may_leave_out_what_it_inherits(schema):
    for text in ("extends: [a, b]", "objective: {target: {alpha: 0.9}}", "objective: {divergence: jsd}", "data: {}"):
        schema.validate(yaml.safe_load(text))
    source = json_schema()["$defs"]["SourceSettings"]["properties"]
    assert all("description" in one for one in source.values())


def test_the_page_is_what_the_settings_say_now():
    """If this fails: python -m deltakd schema --markdown > docs/reference.md."""
    page = (REPOSITORY / "docs" / "reference.md").read_text()
    assert page == markdown()
    assert "| `steps` | a whole number above 0 | **must** |" in page and page.count("## `objective.target`, name ") == 5


def test_the_page_of_the_interface_is_what_the_source_says_now(capsys):
    """If this fails: python -m deltakd schema --api > docs/api.md."""
    page = (REPOSITORY / "docs" / "api.md").read_text()
    assert main(["schema", "--api"]) == 0
    assert page == capsys.readouterr().out == api.markdown()
    links = set(re.findall(r"\]\(#([\w-]+)\)", page))
    assert links <= {re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall("^## (.+)$", page, re.MULTILINE)}
    assert "    draws: Draws | None = None,\n) -> LinearLoss\n```" in page  # a signature as it is written
    assert "- `at(alpha: float) -> Objective`: Return the objective with its target at another alpha" in page


def test_every_module_class_and_function_of_the_interface_says_what_it_is():
    parts = re.split("^##+ ", api.markdown(), flags=re.MULTILINE)[1:]
    assert len(parts) > 100
    for part in parts:
        words = re.sub("```python.*?```", "", part.partition("\n")[2], flags=re.DOTALL).strip()
        assert words and not words.startswith("- "), part


def test_every_key_can_be_overridden_and_brings_its_few_values():
    known = keys()
    assert known["engine.name"] == ["deepspeed", "fsdp2", "single"] and known["models.lora.rank"] == []
    assert known["train.gradient_checkpointing"] == ["true", "false"] and "train" not in known
    assert set(known["objective.divergence.name"]) >= {"jsd", "tvd", "adaptive_kl"}
    load_recipe("quickstart", ["engine={name: single}", "models.lora.rank=4"])


@pytest.mark.parametrize(
    "line,expected,absent",
    [
        ("deltakd che", {"check "}, {"run "}),
        ("deltakd s", {"sweep", "study"}, {"shard"}),
        ("deltakd run ultrachat/g", {"ultrachat/gkd "}, {"ultrachat/lora "}),
        ("deltakd train quickstart --stage s", {"student_raw", "student_new", "sft"}, {"delta"}),
        ("deltakd train quickstart train.ste", {"train.steps="}, {"train.seed="}),
        ("deltakd train quickstart engine.name=f", {"fsdp2 "}, {"single "}),
    ],
)
def test_a_shell_completes_verbs_recipes_stages_settings_and_their_values(tmp_path, line, expected, absent):
    answer = tmp_path / "answer"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:",
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    done = subprocess.run(
        [sys.executable, "-m", "deltakd"], env=environment, capture_output=True, text=True, cwd=REPOSITORY
    )
    offered = set(answer.read_text().split("\n"))
    assert expected <= offered and not absent & offered, (offered, done.stderr)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_s_script_names_the_command(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "deltakd" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
