"""The house itself: layers point down, heavy libraries stay in the files that adapt them, rooms stay small."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "base": 0,
    "models": 1,
    "data": 1,
    "losses": 1,
    "teacher": 2,
    "engine": 2,
    "evaluate": 2,
    "rollout": 3,
    "train": 4,
    "recipe": 5,
    "bench": 6,
    "report": 6,
    "plan": 6,
    "doctor": 6,
    "study": 7,
    "dry_run": 7,
    "command_line": 8,
    "__main__": 9,
    "launchers": 10,
}
ADAPTERS = {
    "deepspeed": {"engine/deepspeed.py"},
    "zmq": {f"teacher/{name}.py" for name in ("addresses", "heart", "members", "server")} | {"bench/transport.py"},
    "msgspec": {"teacher/messages.py", "teacher/addresses.py", "report/lines.py", "report/build.py"},
    "plotly": {"report/figures.py", "study/drawing.py"},
    "jinja2": {"report/build.py", "data/template.py"},
    "playwright": set(),  # tests alone drive a browser
    "datasets": {"data/sources.py", "bench/trl.py"},
    "rouge_score": {"evaluate/scores.py"},
    "pyarrow": {"evaluate/predictions.py"},
    "math_verify": {"evaluate/answers.py"},
    "wandb": {"train/records.py"},
    "torchao": {"models/load.py"},
    "peft": {"models/lora.py"},
    "vllm": {"evaluate/vllm.py"},
    "argcomplete": {"recipe/completing.py"},
    "trl": {"bench/trl.py", "bench/candidates.py"},
}
FILES = sorted((ROOT / "deltakd").rglob("*.py")) + sorted((ROOT / "launchers").rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "deltakd" else parts[0]


def imports(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    """A room imports itself and lower layers; settings, which hold no code, may be composed by any room above base."""
    if room(path) == "__init__":
        return
    here = LAYERS[room(path)]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "deltakd" or len(parts) < 2 or parts[1] not in LAYERS:
            continue
        there = LAYERS[parts[1]]
        assert parts[1] == room(path) or there < here, f"{path.relative_to(ROOT)} (layer {here}) imports {name}"


@pytest.mark.parametrize("library", sorted(ADAPTERS))
def test_a_library_is_imported_only_where_it_is_adapted(library):
    found = {
        str(path.relative_to(ROOT / "deltakd"))
        for path in FILES
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert found <= ADAPTERS[library]


HEAVY = {"torch", "transformers", "deepspeed", "datasets", "zmq", "huggingface_hub", "argcomplete"}


@pytest.mark.parametrize(
    "words", ["check ultrachat", "doctor", "train --help", "schema", "schema --api", "stages ultrachat"]
)
def test_what_answers_at_once_imports_neither_torch_nor_transformers_and_takes_less_than_two_seconds(words):
    """Of the processor's time: other work shares the machine."""
    code = (
        "import contextlib, sys, time; from deltakd.__main__ import main; import deltakd.recipe.ranks\n"
        f"with contextlib.suppress(SystemExit): main({words.split()!r})\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), time.process_time())"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    heavy, seconds = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert heavy == "[]" and float(seconds) < 2, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_stay_small(path):
    """About 300 lines a file and 40 a function: a little slack, for docstrings and signatures."""
    text = path.read_text()
    assert text.count("\n") <= 320
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 50, f"{path.name}: {node.name}"


def test_the_loop_knows_no_method_by_its_name():
    """Methods are made of streams and objectives: nothing that trains, holds weights or serves asks which one runs."""
    names = re.compile(r"\b(sft|seqkd|gkd|minillm|distillm|taid|exopd|opd2?|delta)\b", re.IGNORECASE)
    for path in FILES:
        if path.parent.name not in ("train", "engine", "teacher", "rollout"):
            continue
        tree = ast.parse(path.read_text())
        words = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        words += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        compared = [part for node in ast.walk(tree) if isinstance(node, ast.Compare) for part in ast.walk(node)]
        words += [str(part.value) for part in compared if isinstance(part, ast.Constant)]
        assert not [word for word in words if names.fullmatch(word)], path
