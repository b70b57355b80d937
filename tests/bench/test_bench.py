"""The bench's commands end with what they promise, on sizes that take seconds, and its candidates compute one thing."""

import json

import pytest
import torch

from deltakd.__main__ import main
from deltakd.bench.arms import ARMS
from deltakd.bench.candidates import Case, candidate, draw


def test_every_candidate_gives_the_gradients_that_plain_torch_gives():
    grads = {}
    for name in ("plain", "deltakd"):
        case = Case(name, tokens=20, hidden=8, teacher_hidden=12, vocab=300, chunk_tokens=7)
        inputs = draw(case)
        candidate(case)(inputs, case)
        grads[name] = (inputs.student.grad, inputs.head.grad)
    for ours, plain in zip(grads["deltakd"], grads["plain"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_bench_losses_divides_by_the_products_and_says_what_it_could_not_run(tmp_path, capsys):
    out = tmp_path / "losses.json"
    sizes = ["--tokens=64", "--hidden=8", "--teacher-hidden=8", "--vocab=500", "--chunk-tokens=16", "--repeats=1"]
    assert main(["bench", "losses", *sizes, "--dtypes=float32", "--only=deltakd,liger", "--out", str(out)]) == 0
    results = {result["name"]: result for result in json.loads(out.read_text())["results"]}
    assert list(results) == ["deltakd", "liger"]
    (own,), (bare,) = results["deltakd"]["seconds"], results["deltakd"]["products_seconds"]
    ratio = own / bare
    printed = capsys.readouterr().out
    assert f"{ratio:.2f}" in printed and "not measured: " in printed and "liger_kernel" in results["liger"]["missing"]


def test_bench_variants_trains_with_and_without_remedies_and_writes_table_and_plot(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(lab.folder)
    out = tmp_path / "variants"
    few = ["--steps=2", "--variants=v1,v8", "--alphas=0.5"]
    assert main(["bench", "variants", str(lab.recipe), *few, "--out", str(out)]) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    runs = {(run["variant"], run["remedy"]): run for run in report["results"]}
    assert len(runs) == 3 + 4 and all(run["num_steps"] == 2 for run in runs.values())
    assert runs["v1", "none"]["grad_norm_first"] == runs["v1", "gradient clipped at 1"]["grad_norm_first"] > 0
    assert runs["v8", "none"]["loss_first"] != runs["v8", "support top_p 0.99"]["loss_first"]
    assert out.with_suffix(".md").read_text().count("\n") == 2 + 7 and "<svg" in out.with_suffix(".svg").read_text()
    assert all(point["bad_in_logs"] == 0 for point in report["probabilities"])
    assert any(point["bad_in_probabilities"] > 0 for point in report["probabilities"])


def test_bench_payloads_finds_hidden_states_nearest_and_top_k_farthest(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(lab.folder)
    out = tmp_path / "payloads.json"
    assert main(["bench", "payloads", str(lab.recipe), "--out", str(out)]) == 0
    kl = json.loads(out.read_text())["results"]
    assert 0 < kl["hidden, float16"] < kl["hidden, bfloat16"] < kl["logits, bfloat16"]
    assert kl["top_k 8, mass that is left out"] > kl["top_k 128, mass that is left out"] > 0


@pytest.mark.parametrize(
    "command, words",
    [
        (["bench", "losses", "--only=ours"], "ours is no candidate"),
        (["bench", "variants", "x.yaml"], "x.yaml"),
        (["bench", "step", "--out=tests"], "--out: tests is a folder. Write the name of a file."),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(command, words, capsys):
    assert main(command) == 2
    assert words in capsys.readouterr().err


@pytest.mark.soak
def test_bench_step_runs_every_arm_at_a_tiny_shape(tmp_path, capsys):
    """But TRL's, which is no part of the installation. Ratios are what the run's own seconds say."""
    out = tmp_path / "step.json"
    arms = [arm for arm in ARMS if arm != "trl"]
    words = ["--shape=tiny", "--steps=4", "--rounds=1", f"--arms={','.join(arms)}", f"--out={out}"]
    assert main(["bench", "step", *words]) == 0, capsys.readouterr().err
    report = json.loads(out.read_text())["arms"]
    assert list(report) == arms
    for arm, row in report.items():
        assert row["tokens_per_s"] > 0 and row["peak_bytes"] > 2**20 and row["padding"] == 0
        if "of_sft" in row:
            assert row["of_sft"] == pytest.approx(sum(row["step_s"][0]) / sum(report["sft"]["step_s"][0])), arm
    assert report["cache_hidden"]["of_demanded"] < report["cache_hidden"]["of_sft"]
    assert report["service"]["waiting"] > report["sft"]["waiting"]


@pytest.mark.soak
def test_bench_growth_measures_both_axes_and_draws_them(tmp_path):
    out = tmp_path / "growth.json"
    assert main(["bench", "growth", "--steps=1", "--points=2", f"--out={out}"]) == 0
    points = json.loads(out.read_text())["points"]
    assert {axis: [point["size"] for point in line] for axis, line in points.items()} == {
        "length": [256, 512],
        "vocabulary": [4096, 16_384],
    }
    assert "<svg" in out.with_suffix(".svg").read_text()


def test_bench_step_refuses_an_arm_that_is_none(tmp_path, capsys):
    assert main(["bench", "step", "--arms=sft,fast", f"--out={tmp_path}/step.json"]) == 2
    assert "--arms: fast is not known. Write some of sft, " in capsys.readouterr().err


@pytest.mark.soak
def test_bench_rollouts_writes_the_same_answers_with_a_copy_and_from_shards(tmp_path, capsys):
    """Two ranks under ZeRO-3. The ratios are what each round's own seconds say."""
    out = tmp_path / "rollouts.json"
    words = ["--shape=tiny", "--prompts=3", "--new-tokens=4", "--rounds=2", "--refresh-steps=4", f"--out={out}"]
    assert main(["bench", "rollouts", *words]) == 0, capsys.readouterr().err
    report = json.loads(out.read_text())
    assert report["machine"]["commit"] and report["ranks"] == 2 and len(report["measured"]) == 2
    for line in report["measured"]:
        assert line["tokens"] == 2 * 3 * 4 and line["same_answers"] == 2 * 3
        copied = line["copy_write_s"] + line["refresh_s"] / 4
        assert line["ratio"] == pytest.approx(line["sharded_write_s"] / copied) and line["ratio"] > 0
        assert line["copy_tokens_per_s"] == pytest.approx(line["tokens"] / copied)
        assert line["ratio_every_step"] < line["ratio"] < line["ratio_writing"]
    assert "12 of 12 answers are the same" in capsys.readouterr().out


def test_bench_rollouts_refuses_too_few(tmp_path, capsys):
    assert main(["bench", "rollouts", "--ranks=0", f"--out={tmp_path}/rollouts.json"]) == 2
    assert "--ranks: 0 is too few. Write 1 or more." in capsys.readouterr().err
