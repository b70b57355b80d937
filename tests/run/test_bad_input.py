"""What a user gets wrong: one sentence with where, what and what to do, exit code 2, nothing half-written."""

import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from deltakd.__main__ import guarded
from deltakd.base.files import write_json
from deltakd.base.ranks import Placement
from deltakd.data.settings import TokenizerSettings
from deltakd.data.tokenizer import train_tokenizer
from deltakd.models.new import write_new_model
from deltakd.models.settings import NewModelSettings
from deltakd.recipe.load import load
from deltakd.recipe.ranks import Launch, run_rank
from tests.run.running import ZERO_3

ALONE = Launch(Placement(0, 1, 0, 1))
GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def rows(*messages):
    return "".join(json.dumps({"messages": list(m)} if isinstance(m, tuple) else m) + "\n" for m in messages)


def turn(role, content="x"):
    return {"role": role, "content": content}


FILES = {
    "empty.jsonl": "",
    "no_messages.jsonl": rows(GOOD, {"text": "hi"}),
    "order.jsonl": rows((turn("assistant"), turn("user"))),
    "no_assistant.jsonl": rows((turn("user"),)),
    "unknown_role.jsonl": rows((turn("human"), turn("assistant"))),
    "broken.jsonl": rows(GOOD) + '{"messages": [\n',
    "special.jsonl": rows((turn("user"), turn("assistant", "a <|im_end|> b"))),
    "long.jsonl": rows((turn("user"), turn("assistant", "word " * 500))),
}

IN = "references.from=in_process"
CASES = {
    "unknown key": (["train.stepps=3"], r"command line: train\.stepps: .*Write (train\.)?steps"),
    "wrong type": (["train.learning_rate=fast"], r"command line: train\.learning_rate: .*fast"),
    "a number that YAML reads as text": (["train.learning_rate=1e-5"], r"Write 1\.0e-0?5"),
    "out of range": (["objective.sft_weight=1.5"], r"objective\.sft_weight: .*1\.5"),
    "missing data file": (["data.train.path={folder}/none.jsonl"], r"data\.train\.path: .*none\.jsonl"),
    "no rows": (["data.train.path={folder}/empty.jsonl"], r"empty\.jsonl: .*"),
    "a row without messages": (["data.train.path={folder}/no_messages.jsonl"], r"no_messages\.jsonl:2: .*messages"),
    "roles out of order": (["data.train.path={folder}/order.jsonl"], r"order\.jsonl:1: .*assistant.*user"),
    "no assistant turn": (["data.train.path={folder}/no_assistant.jsonl"], r"no_assistant\.jsonl:1: .*assistant"),
    "unknown role": (["data.train.path={folder}/unknown_role.jsonl"], r"unknown_role\.jsonl:1: .*human"),
    "broken JSON": (["data.train.path={folder}/broken.jsonl"], r"broken\.jsonl.*2"),
    "a special token in a text": (["data.train.path={folder}/special.jsonl"], r"special\.jsonl:1: .*<\|im_end\|>"),
    "only rows that are too long": (["data.train.path={folder}/long.jsonl"], r"long\.jsonl: .*data\.max_tokens 128"),
    "missing model": (["models.teacher.weights={folder}/none"], r"models\.teacher\.weights: .*/none"),
    "a folder that is no model": (["models.student.weights={folder}"], r"models\.student\.weights: "),
    "a foreign tokenizer": (["models.teacher.weights={folder}/foreign"], r"models\.teacher\.weights: .*id \d+ is"),
    "a head that is too small": (["models.teacher_raw.weights={folder}/small"], r"models\.teacher_raw: .*250 rows"),
    "weights that lack a tensor": (["models.teacher.weights={folder}/lacking", IN], r"lacks 1 tensors .*up_proj"),
    "truncated weights": (
        ["models.teacher.weights={folder}/truncated"],
        r"models\.teacher\.weights: .*cannot be loaded",
    ),
    "heads that do not split": (
        ["teachers.tensor_parallel=4", "teachers.per_node=4"],
        r"models\.student_raw\.weights: .*2 key-value heads of .* over 4 processes",
    ),
    "a model without a tokenizer": (["models.student.weights={folder}/mute"], r"mute: holds no tokenizer"),
    "a head that is not finite": (
        ["models.teacher.weights={folder}/nan"],
        r"models\.teacher\.weights: the head of .*nan",
    ),
    "text that is not UTF-8": (["data.train.path={folder}/latin.jsonl"], r"latin\.jsonl: .*UTF-8"),
    "the folder of another stage": (["run=stage"], r"runs/stage: made by another stage"),
    "shared memory too small": (
        ["train.tokens_per_micro_batch=900000000", "train.tokens_per_step=900000000", "references.payload=logits"],
        r"/dev/shm/deltakd-\w+: the slots need [\d,.]+ MiB, [\d,.]+ MiB are free\. Lower ",
    ),
    "too few slots": (["teachers.slots=2", "references.payload=hidden"], r"teachers\.slots: 2 hold no micro-batch"),
    "two students of an engine for one": (["engine={name: single}"], r"engine\.name: single trains in one process"),
}


@pytest.fixture(scope="module")
def folder(lab, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    for name, text in FILES.items():
        (path / name).write_text(text)
    (path / "words.jsonl").write_text(json.dumps({"text": "something else entirely " + "0123456789 " * 5}) + "\n")
    words = TokenizerSettings(files=[str(path / "words.jsonl")], vocab_size=290)
    train_tokenizer(words, path / "foreign_tokenizer")
    size = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 8}
    write_new_model(NewModelSettings(tokenizer=str(path / "foreign_tokenizer"), **size), path / "foreign")
    write_new_model(NewModelSettings(tokenizer=str(lab.folder / "tokenizer"), head_rows=250, **size), path / "small")
    (path / "latin.jsonl").write_bytes(rows(GOOD).replace("hello", "h\u00e9llo").encode("latin-1"))
    write_json(lab.folder / "runs" / "stage" / "finished.json", {"settings": {}})
    for name in ("lacking", "truncated", "mute", "nan"):
        shutil.copytree(lab.folder / "teacher", path / name)
    weights = load_file(path / "lacking" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "lacking" / "model.safetensors", {"format": "pt"})
    os.truncate(path / "truncated" / "model.safetensors", 100)
    for file in (path / "mute").glob("tokenizer*"):
        file.unlink()
    weights = load_file(path / "nan" / "model.safetensors")
    weights["lm_head.weight"][3] = float("nan")
    save_file(weights, path / "nan" / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_exit_code_2_and_nothing_half_written(lab, folder, capfd, monkeypatch, case):
    overrides, said = CASES[case]
    run = "bad_" + re.sub(r"\W", "_", case)
    given = [
        override.replace("{folder}", str(folder))
        for override in [*overrides, *([] if "run=" in str(overrides) else [f"run={run.lower()}"])]
    ]
    launch = Launch(Placement(0, 2, 0, 2)) if "two students" in case else ALONE
    monkeypatch.setenv("DELTAKD_LAUNCH", run.lower())
    if "two students" in case:
        given.append("objective.sft_weight=1.0")

    assert guarded(lambda: run_rank(load(str(lab.recipe), given), launch)) == 2

    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("deltakd: ")]
    assert len(lines) == 1 and re.search(said, lines[0]), lines
    assert re.search(r"\. (Write|Lower|Take|Add|Fetch|Convert|Correct|Remove)[^.]* .*\.$", lines[0]), lines[0]
    left = lab.folder / "runs" / run.lower()
    assert not any((left / name).exists() for name in ("export", "export.part", "steps.jsonl", "finished.json"))
    assert not list(Path("/dev/shm").glob(f"deltakd-{run.lower()}/arena*"))


def test_the_launcher_passes_the_sentence_and_the_exit_code_on(lab):
    done = lab.run(*lab.command("run=bad_launch", "train.steps=0", ranks=3))
    assert done.returncode == 2
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("deltakd: ")]
    assert said == ["deltakd: command line: train.steps: 0 does not fit. Write a whole number above 0."]
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [("train.warmup_steps=900", "warm-up leave none"), ("data.train.path=none.jsonl", "none.jsonl")],
)
def test_the_verb_train_refuses_a_recipe_before_it_starts_the_launcher(lab, override, said):
    done = lab.run("python", "-m", "deltakd", "train", str(lab.recipe), "run=bad_verb", override)
    assert done.returncode == 2 and done.stdout == "" and not (lab.folder / "runs" / "bad_verb").exists()
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("deltakd: command line: ") and said in lines[0]


def test_a_rendezvous_port_that_is_taken_is_named(lab):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = lab.run(*lab.command("run=bad_port", ZERO_3, "objective.sft_weight=1.0", ranks=2, port=port))
    assert done.returncode == 2
    assert f"port {port} is taken" in done.stdout + done.stderr and "--master_port" in done.stderr + done.stdout
    assert not (lab.folder / "runs" / "bad_port" / "export").exists()


def test_a_pipeline_that_needs_the_hub_stops_with_one_sentence_where_it_cannot_be_reached(lab):
    done = lab.run("python", "-m", "deltakd", "run", "ultrachat", f"root={lab.folder}/runs/hub")
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()
    assert len(said) == 1 and "the hub cannot be reached" in said[0] and "Traceback" not in done.stderr
