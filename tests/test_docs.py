"""Every command that README and docs show is one that works: its recipe loads, its options parse, its files are there.

That the commands do what they say is tested where they are run: tests/run.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deltakd.__main__ import main
from deltakd.command_line import EXAMPLES, parse, parser
from deltakd.recipe.checks import check_every_stage, check_recipe
from deltakd.recipe.load import dump_recipe, load
from deltakd.recipe.stages import describe_stages
from deltakd.study.grid import read_grid
from deltakd.study.results import find_baseline

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
RECIPES = [path for path in FILES if path.parent.name != "studies"]
START = re.compile(
    r"^(make|python|deepspeed|torchrun|launchers/|slurm/|sbatch|bash|\.venv/bin/|([A-Z_]+=\S+ )+(make|sbatch))"
)
LINKS = re.compile(r"\]\((?!https?:)([^)#]+)")


def commands(page: Path) -> list[str]:
    lines = [line.strip() for line in page.read_text().splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", page.read_text())
    # Two blanks end a command; what follows says what it does. Words in capitals stand for the reader's own.
    return [line.split("  ")[0] for line in lines if START.match(line) and " " in line]


def first_lines(recipe: Path) -> list[str]:
    return [recipe.read_text().splitlines()[0].removeprefix("# ").split("  ")[0]]


def words_of(command: str) -> list[str]:
    words = shlex.split(re.split(r" >>? ", command)[0], comments=True)
    while "=" in words[0]:
        words = words[1:]
    if words[:3] == [".venv/bin/python", "-m", "deltakd"] or words[:3] == ["python", "-m", "deltakd"]:
        words = ["deltakd", *words[3:]]
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


CASES = [(page, command) for page in PAGES for command in commands(page)]
CASES += [(recipe, command) for recipe in FILES for command in first_lines(recipe)]


@pytest.mark.parametrize("page,command", CASES, ids=lambda value: value if isinstance(value, str) else value.name)
def test_a_command_in_the_docs_is_one_that_works(page, command, capsys):
    words = words_of(command)
    if words[0] == "make":
        assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0
    elif words[0] == "deltakd":
        if words[1] == "VERB":
            return
        options = parse(parser(), words[1:])
        if options.verb == "watch" or not hasattr(options, "recipe"):
            return
        if options.verb == "plan" and options.hardware is None:
            assert main([word for word in words[1:] if word not in ("--json", options.json)]) == 0
            assert "tokens/s" in capsys.readouterr().out
        if options.verb == "sweep":
            grid = read_grid(options.recipe, options.overrides, options.name)
            find_baseline(grid, options.baseline)
        elif options.recipe not in ("mine", "llama_gkd"):
            check_every_stage(options.recipe, options.overrides)
        if options.verb == "check":
            assert main(words[1:]) == 0 and "models:" in capsys.readouterr().out
    elif words[:2] == ["python", "launchers/teacher.py"]:
        stage = words[words.index("--stage") + 1] if "--stage" in words else None
        load(words[words.index("--recipe") + 1], [], stage)
        shown = subprocess.run([sys.executable, *words[1:2], "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        assert all(word in shown for word in words if word.startswith("--"))
    elif words[0] in ("deepspeed", "torchrun") and "--recipe" in words:
        overrides = [word for word in words if "=" in word]
        assert "launchers/train.py" in words
        loaded = load(words[words.index("--recipe") + 1], overrides)
        check_recipe(loaded.recipe, loaded.where)
    elif words[0] == "launchers/local.sh":
        loaded = load(words[1], [word for word in words if "=" in word])
        check_recipe(loaded.recipe, loaded.where)
    elif words[0] == "sbatch":  # run for real: tests/slurm
        script = next(word for word in words if word.endswith(".sbatch"))
        given = dict(word.split("=", 1) for word in shlex.split(command) if re.match(r"[A-Z]+=", word))
        overrides = [word for word in words[words.index(script) :] if "=" in word]
        load(given.get("RECIPE", "ultrachat"), overrides, given.get("STAGE"))
    elif words[0] == "slurm/submit.sh":
        describe_stages(words[1], words[words.index("--") + 1 :] if "--" in words else [])
    else:
        pytest.fail(f"{page.name}: no test knows how to try `{command}`")


@pytest.mark.parametrize("verb", sorted(EXAMPLES))
def test_the_help_of_every_verb_ends_with_an_example_that_works(verb, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args([verb, "--help"])
    shown = capsys.readouterr().out
    assert shown.endswith(f"Example:\n  python -m deltakd {EXAMPLES[verb]}\n")
    options = parse(parser(), words_of(f"python -m deltakd {EXAMPLES[verb]}")[1:])
    if verb == "sweep":
        read_grid(options.recipe, options.overrides, options.name)
    elif hasattr(options, "recipe"):
        load(options.recipe, options.overrides, options.stage if verb in ("train", "outcome") else None)


def test_no_verb_of_a_user_s_is_without_an_example():
    (verbs,) = (action for action in parser()._actions if action.dest == "verb")
    assert set(verbs.choices) - {"shard"} == set(EXAMPLES)


def test_a_setting_is_refused_where_no_recipe_is_read_and_taken_anywhere_else(capsys):
    for verb in ("doctor", "tidy", "schema", "watch runs/x", "bench transport"):
        with pytest.raises(SystemExit):
            parse(parser(), [*verb.split(), "train.steps=3"])
        assert "reads no recipe" in capsys.readouterr().err, verb
    assert parse(parser(), ["plan", "ultrachat", "--gpus", "H100", "train.steps=3"]).overrides == ["train.steps=3"]


def test_the_docs_show_commands():
    assert len(CASES) > 15 and {page.name for page, _ in CASES} >= {"README.md", "recipes.md", "quickstart.yaml"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINKS.findall(page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_opens_with_its_command_and_what_was_measured(recipe):
    first, second = recipe.read_text().splitlines()[:2]
    assert re.match(r"# (make|python -m deltakd|deepspeed) ", first) and second.startswith("# Measured: ")
    assert check_every_stage(str(recipe.relative_to(ROOT / "recipes").with_suffix("")))


@pytest.mark.parametrize("data", ["ultrachat", "openmath"])
def test_every_baseline_is_laid_on_real_data_with_its_own_objective_and_the_base_s_models(data):
    base = load(data).recipe
    for path in sorted((ROOT / "recipes" / "baselines").glob("*.yaml")):
        method, recipe = load(f"baselines/{path.stem}").recipe, load(f"{data}/{path.stem}").recipe
        assert recipe.objective == method.objective and recipe.models == base.models, path.stem
        assert (recipe.root, recipe.run) == (base.root, method.run) and recipe.train == base.train
        assert recipe.rollouts.on_policy_fraction == method.rollouts.on_policy_fraction
        if recipe.data.train.path.startswith("HF") or recipe.data.train.path.startswith("nvidia"):
            assert recipe.data.model_copy(update={"corpus": None}) == base.data
        assert "runs/quickstart" not in dump_recipe(recipe)


@pytest.mark.parametrize("data", ["ultrachat", "openmath"])
def test_the_teacher_answers_the_base_s_rows_in_their_format_and_the_student_reads_messages(data):
    base, recipe = load(data).recipe.data, load(f"{data}/seqkd").recipe
    (asked,) = (stage.generate for stage in recipe.pipeline if stage.generate is not None)
    assert (asked.rows, recipe.data.format) == (base.train, base.format)
    learnt = load(f"{data}/seqkd", stage="seqkd").recipe.data
    assert (learnt.train.path, learnt.format) == (f"{recipe.root}/responses/responses.jsonl", "messages")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_repeats_no_setting_that_it_inherits(recipe, tmp_path):
    """But a baseline says its objective whole: it is laid on other recipes than the one that it extends."""
    tree = yaml.safe_load(recipe.read_text())
    extends = tree.pop("extends", None)
    name = str(recipe.relative_to(ROOT / "recipes").with_suffix(""))
    if extends is None or recipe.parent.name in ("baselines", "studies"):
        return
    (bare := tmp_path / "bare.yaml").write_text(yaml.safe_dump({"extends": extends}))
    inherited = load(str(bare)).recipe.model_dump(by_alias=True)
    own = load(name).recipe.model_dump(by_alias=True)
    for key, value in leaves({key: part for key, part in tree.items() if key not in ("pipeline", "root")}):
        before, after = (at(one, key) for one in (inherited, own))
        assert before != after, f"{name}: {'.'.join(key)}: {value} is inherited"


@pytest.mark.parametrize("name", ["single_24gb", "ultrachat"])
def test_a_teacher_is_fine_tuned_at_the_learning_rate_of_the_recipe_that_is_run(name):
    """A stage wins over every file that extends it: what it repeats of its own file can no longer be changed there."""
    assert load(name, stage="teacher").recipe.train == load(name).recipe.train


def leaves(tree: dict, above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    """A mapping with a name is one choice: its settings come with it."""
    found = []
    for key, value in tree.items():
        whole = not isinstance(value, dict) or "name" in value or not value
        found += [((*above, key), value)] if whole else leaves(value, (*above, key))
    return found


def at(tree: object, path: tuple[str, ...]) -> object:
    for step in path:
        tree = tree.get(step) if isinstance(tree, dict) else None
    return tree


def test_the_python_example_runs():
    page = (ROOT / "docs" / "objectives.md").read_text()
    given: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], given)
    assert given["per_token"].shape == (100,) and given["hidden"].grad.isfinite().all()
    assert given["head"].grad.abs().sum() > 0
