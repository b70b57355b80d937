"""The verb: what it chooses, what it refuses, how fast it answers."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from deltakd.__main__ import main
from deltakd.base.errors import ModelError, RunError
from deltakd.plan.hardware import OURS, choose_hardware, read_hardware
from deltakd.plan.plan import plan
from deltakd.recipe.load import load, recipe_names

ROOT = Path(__file__).parents[2]


def test_it_answers_fast_and_without_heavy_libraries(tmp_path):
    code = (
        "import sys, time; from deltakd.__main__ import main; "
        f"assert main(['plan', 'ultrachat', '--gpus', '8xH100', '--json', {str(tmp_path / 'plan.json')!r}]) == 0; "
        "print(time.process_time()); "
        "print(sorted({'torch', 'transformers', 'deepspeed', 'datasets', 'zmq'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    *shown, seconds, heavy = output.splitlines()
    assert heavy == "[]" and float(seconds) < 2
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["split"]["students"] + report["split"]["teachers"] == 8
    assert f"{report['tokens_per_s']:,.0f} tokens/s" in "\n".join(shown)
    assert {row["payload"]: row["bytes_per_token"] for row in report["payloads"]} == {
        "hidden": 17_408,  # docs/concepts.md: payloads
        "logits": 911_616,
        "target": 303_872,
        "top_k": 64 * 6 + 2,
        "sampled": 256,
    }


def test_the_split_is_the_fastest_that_fits():
    planned = plan("ultrachat", [], gpus="8xH100")
    assert [split.teachers for split in planned.found] == list(range(1, 8))
    assert planned.best.step_s == min(split.step_s for split in planned.found if split.lacking is None)
    assert planned.best.teachers > planned.best.students  # three frozen models of 16 billion, a student of 1.5
    # Where teachers bind one more of them is a gain, and where students bind one less.
    steps = [split.step_s for split in planned.found]
    lowest = steps.index(min(steps))
    assert steps == sorted(steps[: lowest + 1], reverse=True) + sorted(steps[lowest + 1 :])


def thin(tmp_path, **numbers):
    """Write H100s of which some numbers are others."""
    entry = yaml.safe_load(OURS.read_text())["H100"] | numbers
    path = tmp_path / f"{len(numbers)}.yaml"
    path.write_text(yaml.safe_dump({"thin": entry}))
    return str(path)


def test_hours_are_those_of_all_steps():
    planned = plan("ultrachat", [], gpus="8xH100")
    train = planned.run.recipe.train
    assert 3600 * planned.hours * planned.tokens_per_s == pytest.approx(train.steps * train.tokens_per_step)


def test_host_memory_can_be_lacking_too(tmp_path):
    little = thin(tmp_path, host_memory_gib=12)
    with pytest.raises(RunError, match="a node's host memory needs"):
        plan("ultrachat", ["engine.offload=optimizer"], gpus="8xthin", hardware_file=little)
    notes = plan("ultrachat", ["engine.zero_stage=1"], gpus="8xthin", hardware_file=little).notes
    assert any("every student rank first loads the model whole" in note for note in notes)
    assert not any("loads the model whole" in note for note in plan("ultrachat", [], gpus="8xH100").notes)


def test_parts_of_a_teacher_wait_for_each_other(tmp_path):
    split = "teachers={tensor_parallel: 2, per_node: 4}"
    fast, slow = (
        next(one for one in plan("ultrachat", [split], gpus="8xthin", hardware_file=file).found if one.teachers == 4)
        for file in (thin(tmp_path), thin(tmp_path, nvlink_gbs=1))
    )
    assert slow.teacher_s > 2 * fast.teacher_s


def test_only_what_is_worth_it_is_advised_smaller_micro_batches_among_it():
    large = plan("ultrachat", ["train.tokens_per_micro_batch=65536"], gpus="8xL40S")
    assert any("tokens_per_micro_batch=16384" in change.setting for change in large.changes)
    for planned in (large, plan("ultrachat", [], gpus="8xH100"), plan("ultrachat/lora", [], gpus="8xH100")):
        assert all(change.step_s < 0.98 * planned.best.step_s for change in planned.changes)


def test_a_reader_is_told_that_narrow_models_are_slower_than_planned():
    notes = [" ".join(plan(name, [], gpus="8xH100").notes) for name in ("quickstart", "ultrachat")]
    assert ["so narrow a model" in text for text in notes] == [True, False]


def test_the_foretold_speed_is_the_simulations():
    """docs/scaling.md: simulated with the same arithmetic and sheet, spread and waiting included: 72,000 tokens/s."""
    planned = plan("ultrachat", [], gpus="8xH100")
    assert (planned.best.students, planned.best.teachers) == (3, 5)
    assert planned.tokens_per_s == pytest.approx(72_000, rel=0.1)


def test_twice_the_nodes_are_nearly_twice_as_fast_until_weights_bind():
    one, two = (plan("ultrachat", [], gpus="8xH100", nodes=nodes).tokens_per_s for nodes in (1, 2))
    assert 1.6 < two / one <= 2.01
    # 128 documents of 2,048 tokens make a step: more students than that have nothing to do.
    many = [plan("ultrachat", [], gpus="8xH100", nodes=nodes, stage="sft") for nodes in (16, 512)]
    assert many[1].tokens_per_s <= many[0].tokens_per_s and "room for" in many[1].notes[-1]
    slow = ["train.tokens_per_micro_batch=2048"]
    assert plan("ultrachat", slow, gpus="8xRTX4090", nodes=1, stage="sft").best.binds == "network"


def test_teachers_that_are_split_hold_a_part_and_count_as_one():
    large = ["models.teacher.weights=Qwen/Qwen2.5-32B", "models.teacher_raw.weights=Qwen/Qwen2.5-14B"]
    with pytest.raises(RunError, match=r"a teacher process needs 9\d\.\d GiB, H100 has 74\.8 to give. Write teachers"):
        plan("ultrachat", large, gpus="8xH100")
    planned = plan("ultrachat", [*large, "teachers={per_node: 4, tensor_parallel: 2}"], gpus="8xH100")
    assert {split.teachers % 2 for split in planned.found} == {0}
    assert planned.best.memory["teacher"].on_device < 60 * 2**30
    with pytest.raises(RunError, match=r"2 key-value heads of Qwen/Qwen2\.5-1\.5B do not split over 4 processes"):
        plan("ultrachat", ["teachers={per_node: 4, tensor_parallel: 4}"], gpus="8xH100")


def test_a_teacher_that_fits_no_accelerator_is_not_answered_with_more_of_them(capsys):
    assert main(["plan", "pairs/qwen2.5_72b_to_7b", "--gpus", "8xH100", "--nodes", "16"]) == 2
    said = capsys.readouterr().err
    assert "a teacher process needs" in said
    assert "Take larger accelerators, smaller models, or frozen ones in 8 bit" in said


def test_parts_of_a_teacher_beside_its_student_share_the_students_device():
    """So a split saves nothing there, and is not proposed."""
    said = r"teacher beside it needs \d+\.\d GiB, L40S has 41\.8 to give\. Take a larger accelerator, another engine"
    for shards in (1, 2):
        split = f"teachers={{tensor_parallel: {shards}, per_node: {shards}}}"
        with pytest.raises(RunError, match=said):
            plan("ultrachat/lora", ["engine={name: single}", split], gpus="4xL40S")


def test_what_cannot_fit_is_refused_with_the_number(capsys):
    """And with a change that does fit, where there is one."""
    assert main(["plan", "ultrachat", "--gpus", "2xRTX4090"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "a student process needs" in said and "RTX4090 has 22.1 to give" in said
    assert main(["plan", "ultrachat", "--gpus", "8xRTX4090"]) == 2
    said = capsys.readouterr().err
    assert "Write teachers.tensor_parallel=2 teachers.per_node=4, which fits" in said
    assert main(["plan", "ultrachat", "--gpus", "8xRTX4090", "teachers={tensor_parallel: 2, per_node: 4}"]) == 0


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--gpus", "8xB7000"], "--gpus: 8xB7000 is not known"),
        (["--gpus", "0xH100"], "--gpus: 0xH100 is not known"),
        (["--gpus", "00xH100", "--stage", "sft"], "--gpus: 00xH100 is not known"),
        (["--gpus", "99999999xH100"], "--gpus: 99999999xH100: no node has so many"),
        (["--gpus", "H100", "--nodes", "0"], "--nodes 0"),
        (["--gpus", "H100", "--supervised", "1.5"], "--supervised 1.5"),
        (["--gpus", "H100", "--hardware", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--gpus", "H100", "--hardware", sys.executable], "cannot be read ('utf-8' codec"),
        (["--gpus", "H100", "models.student.weights=some/model"], "models.student.weights: some/model is no folder"),
        (["--gpus", "1xH100", "--json", "README.md/plan.json"], "--json: README.md/plan.json cannot be written"),
        (["--gpus", "2xH100", "teachers={tensor_parallel: 2, per_node: 2}"], "teachers of 2 processes leave none"),
    ],
)
def test_a_wrong_word_is_one_sentence(arguments, words, capsys):
    assert main(["plan", "ultrachat", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_help_names_all_hardware(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in read_hardware())


def test_a_file_of_hardware_wins_and_must_be_whole(tmp_path):
    text = OURS.read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("H100:", "mine:").replace("memory_gib: 79.6", "memory_gib: 10"))
    assert choose_hardware("4xmine", str(tmp_path / "mine.yaml"))[0].memory_gib == 10
    (tmp_path / "number.yaml").write_text(text.replace("H100:", "4090:"))  # a number to YAML
    assert choose_hardware("8x4090", str(tmp_path / "number.yaml"))[0].memory_gib == 79.6
    (tmp_path / "alone.yaml").write_text(text.replace("network_gbs: 400", "network_gbs: 0"))
    with pytest.raises(RunError, match="H100: network_gbs is 0"):
        read_hardware(str(tmp_path / "alone.yaml"))
    (tmp_path / "named.yaml").write_text(text.replace("H100:", "H100 x/2:"))
    assert choose_hardware("8xH100 x/2", str(tmp_path / "named.yaml"))[0].name == "H100 x/2"
    wrong = {"1e400": "no number", ".inf": "no number", ".nan": "no number", "true": "no number", "-1": "no number"}
    for value, words in (wrong | {f"1{400 * '0'}": "no number", "1.5": "reserve is 1.5, and a share"}).items():
        (tmp_path / "wrong.yaml").write_text(text.replace("reserve: 0.06", f"reserve: {value}"))
        with pytest.raises(RunError, match=words):
            read_hardware(str(tmp_path / "wrong.yaml"))
    (tmp_path / "part.yaml").write_text("mine: {memory_gib: 10}")
    with pytest.raises(RunError, match="is missing"):
        read_hardware(str(tmp_path / "part.yaml"))


@pytest.mark.parametrize(
    "line,found",
    [
        ("NVIDIA H100 80GB HBM3, 81559 MiB", "H100"),
        ("NVIDIA H200, 143771 MiB", "H200"),
        ("NVIDIA A100-SXM4-80GB, 81920 MiB", "A100-80"),
        ("NVIDIA A100-SXM4-40GB, 40960 MiB", "A100-40"),
        ("NVIDIA GeForce RTX 4090, 24564 MiB", "RTX4090"),
        ("NVIDIA GH200 480GB, 97871 MiB", None),  # 96 GB beside a CPU of its own
        ("Tesla V100-SXM2-32GB, 32768 MiB", None),
    ],
)
def test_without_gpus_it_is_what_the_driver_lists_and_what_is_not_known_is_refused(line, found, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{line}'\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if found is None:
        with pytest.raises(RunError, match="of which nothing is known"):
            choose_hardware(None, None)
    else:
        hardware, count = choose_hardware(None, None)
        assert (hardware.name, count) == (found, 2)


def test_every_number_of_the_hardware_has_a_source():
    import yaml

    for name, entry in yaml.safe_load(OURS.read_text()).items():
        stated = set(entry) - {"sources", "is_cpu"}
        assert stated == set(entry["sources"]) and set(read_hardware()) > {"H100", "H200", "CPU"}, name


def test_an_unknown_form_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "num_experts": 8}))
    with pytest.raises(ModelError, match="a mixture of experts"):
        plan("ultrachat", [f"models.student.weights={tmp_path}"], gpus="8xH100")


def test_memory_that_is_saved_costs_time_where_it_should():
    """Each of these saves memory; recomputing costs a forward pass, offload the way to the host."""
    base = plan("ultrachat", ["train.gradient_checkpointing=false"], gpus="8xH100", stage="sft")
    again = plan("ultrachat", [], gpus="8xH100", stage="sft")
    waiting = plan("ultrachat", ["engine.offload=optimizer"], gpus="8xH100", stage="sft")
    held = [one.best.memory["student"].on_device for one in (base, again, waiting)]
    assert held == sorted(held, reverse=True)
    assert base.best.step_s < again.best.step_s < 1.34 * base.best.step_s
    assert waiting.best.update_s > again.best.update_s
    assert waiting.best.memory["student"].on_host > again.best.memory["student"].on_host
    assert any(change.setting.startswith("train.gradient_checkpointing=false") for change in again.changes)
    # Each node's memory updates the share of its own students.
    nodes = plan("ultrachat", ["engine.offload=optimizer"], gpus="2xH100", nodes=8, stage="sft")
    assert nodes.best.update_s < 0.3 * waiting.best.update_s


def test_look_ahead_hides_the_shorter_side():
    ahead, waiting = (plan("ultrachat", [f"teachers.look_ahead={n}"], gpus="8xH100") for n in (2, 0))
    split = next(one for one in waiting.found if one.teachers == ahead.best.teachers)
    assert split.step_s == pytest.approx(ahead.best.student_s + ahead.best.teacher_s + ahead.best.update_s)
    assert ahead.best.step_s == pytest.approx(max(ahead.best.student_s, ahead.best.teacher_s) + ahead.best.update_s)
    assert replace(ahead.best, writing_s=99.0).binds == "writing"


def test_each_teacher_holds_what_it_serves_and_8_bit_is_half():
    serves = "teachers={per_node: 3, serves: [[teacher], [teacher_raw], [student_raw]]}"
    planned = plan("ultrachat", [serves], gpus="8xH100")
    weights = {name: part.device["weights"] for name, part in planned.best.memory.items() if name != "student"}
    assert weights["teacher 0"] == weights["teacher 1"] == pytest.approx(2 * 7.6156e9, rel=1e-3)
    assert weights["teacher 2"] == pytest.approx(2 * 1.5437e9, rel=1e-3)
    assert len(planned.found) == 1 and planned.best.teachers == 3
    # The busiest of three, which serves a 7B model to all five students, sets the pace.
    alone = plan("ultrachat", [serves, "objective.target={name: teacher}"], gpus="8xH100")
    assert planned.best.teacher_s == pytest.approx(alone.best.teacher_s, rel=0.01)

    both = [f"models.{role}={{weights: Qwen/Qwen2.5-7B, load_in_8bit: true}}" for role in ("teacher", "teacher_raw")]
    rounded = plan("ultrachat", [*both, "objective.target={name: teacher}"], gpus="8xH100")
    head_and_embedding = 2 * 2 * 152_064 * 3584
    linear = 7_615_616_512 - head_and_embedding // 2
    assert rounded.best.memory["teacher"].device["weights"] == pytest.approx(linear + head_and_embedding, rel=1e-3)


def test_a_student_that_writes_holds_a_copy_and_takes_time_for_it():
    written = plan("ultrachat", ["rollouts.on_policy_fraction=0.5"], gpus="8xH100")
    plain = plan("ultrachat", [], gpus="8xH100")
    assert written.best.memory["student"].device["rollouts' copy"] > 2 * 1_543_714_304
    assert written.best.writing_s > 0 and written.best.step_s > plain.best.step_s
    # A teacher whose tokens are mixed in reads its weights for every token as well: 7.6 billion beside 1.5.
    mixed = plan("ultrachat", ["rollouts={on_policy_fraction: 0.5, teacher_mix: 0.2}"], gpus="8xH100")
    alone = next(split for split in written.found if split.students == mixed.best.students)
    assert 4 * alone.writing_s < mixed.best.writing_s < 6 * alone.writing_s
    assert mixed.best.memory["student"].device["rollouts' copy"] > 2 * (1_543_714_304 + 7_615_616_512)
    assert not any(change.setting.startswith("references.from=cache") for change in written.changes)
    assert any(change.setting.startswith("references.from=cache") for change in plain.changes)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_book_can_be_planned_before_anything_is_fetched_or_made(name, tmp_path, monkeypatch):
    """Of the book's own names and folders: nothing of an earlier run lies where the plan is made."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    stages = [stage.name for stage in load(name).recipe.pipeline if stage.train is not None]
    for stage in (None, *stages[:1]):
        assert plan(name, [], stage, gpus="8xH200", nodes=2).tokens_per_s > 0
