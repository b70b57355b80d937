"""What a report reads and how it thins it: nothing that stands out is lost, nothing half written is fatal."""

import json
from dataclasses import fields

import numpy as np
import pytest

from deltakd.base.errors import RunError
from deltakd.evaluate.compare import ModelScores, compare, write_comparison
from deltakd.evaluate.grouped import write_groups
from deltakd.report.build import gather
from deltakd.report.evaluations import better, interval_of_mean, number, read_evaluation, tables, title
from deltakd.report.examples import answers_of, examples
from deltakd.report.find import find
from deltakd.report.gaps import gaps, scored_runs
from deltakd.report.lines import read_columns
from deltakd.report.recipes import differences, flat
from deltakd.report.run import read_run, read_runs
from deltakd.report.sweeps import responses
from deltakd.report.thin import bucket_means, thin
from deltakd.train.step import StepRecord
from tests.report.made import KNOWN, make_evaluation, make_run, make_sweep


@pytest.mark.parametrize("num_points", [1, 2, 3, 50, 999, 10_000])
@pytest.mark.parametrize("most", [10, 240])
def test_a_thinned_curve_keeps_its_ends_and_its_extremes_and_no_more_than_asked(num_points, most):
    y = np.random.default_rng(5).normal(size=num_points)
    kept = thin(y, most)
    assert len(kept) <= max(most, 2) and (np.diff(kept) > 0).all()
    assert {0, num_points - 1, int(y.argmin()), int(y.argmax())} <= set(kept.tolist())


def test_a_single_spike_among_ten_thousand_equal_steps_is_all_that_stays():
    y = np.ones(10_000)
    y[4321] = 9.0
    kept = thin(y, 240)
    assert y[kept].max() == 9.0 and len(kept) < 10
    assert len(thin(np.ones(10_000), 240)) == 2


def test_running_means_have_the_mean_of_the_curve():
    x, y = np.arange(1000.0), np.random.default_rng(1).normal(size=1000)
    mean_x, mean_y = bucket_means(x, y, 50)
    assert len(mean_x) == 50 and mean_y.mean() == pytest.approx(y.mean(), abs=1e-12)
    assert mean_x[0] == 0 and mean_x[-1] == 999


def test_a_half_written_last_line_is_left_out_and_said(tmp_path):
    run = make_run(tmp_path / "torn", num_steps=10)
    with (run / "steps.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 0.')
    columns, torn = read_columns(run / "steps.jsonl", ["step", "loss"])
    assert columns["step"].tolist() == list(range(1, 11)) and torn == 1
    read = read_run(("torn", run), 100)
    assert read.steps == 10 and any("half-written" in note for note in read.notes)


def test_a_line_without_a_step_is_left_out_as_a_torn_one_is(tmp_path):
    run = make_run(tmp_path / "stray", num_steps=10)
    with (run / "steps.jsonl").open("a") as file:
        file.write('{"step": null, "loss": 7.0}\n{}\n')
    read = read_run(("stray", run), 100)
    assert read.steps == 10 and read.curves["loss"].y.max() < 7
    assert "2 half-written line(s) of its records are left out" in read.notes


def test_a_missing_number_is_nan_and_so_is_a_key_that_older_runs_do_not_know(tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "reward": null}\n{"step": 2}\n')
    columns, torn = read_columns(tmp_path / "steps.jsonl", ["step", "reward", "policy"])
    assert torn == 0 and np.isnan(columns["reward"]).all() and np.isnan(columns["policy"]).all()


def test_an_empty_run_is_a_gap_and_no_fault(tmp_path):
    run = tmp_path / "empty"
    run.mkdir()
    (run / "recipe.yaml").write_text("train: {steps: 50}\n")
    material = gather([str(tmp_path)])
    texts = [gap.what for gap in gaps(material.runs, material.evaluations, material.tables)]
    assert "not finished (no step): no step of 50 yet" in texts
    assert any("no run.json" in text for text in texts)


@pytest.mark.parametrize("name", ["run.json", "finished.json", "recipe.yaml", "status/student-0.json"])
def test_a_file_that_is_broken_becomes_a_note(tmp_path, name):
    run = make_run(tmp_path / "broken")
    (run / name).write_text('{"half": [')
    read = read_run(("broken", run), 100)
    assert any(name in note for note in read.notes) and read.steps == 40


def test_folders_are_found_once_whatever_leads_to_them(tmp_path):
    make_run(tmp_path / "a" / "one")
    make_run(tmp_path / "b" / "one", seed=2)
    make_evaluation(tmp_path / "a" / "evaluation", ["one"], "one")
    found = find([str(tmp_path), str(tmp_path / "a" / "one"), str(tmp_path / "a" / "evaluation")])
    assert [found.name(path) for path in found.runs] == ["a/one", "b/one"]
    assert [found.name(path) for path in found.evaluations] == ["a/evaluation"]
    assert find([str(tmp_path / "a" / "one")]).name(tmp_path / "a" / "one") == "one"


def test_a_folder_that_is_not_there_or_holds_nothing_is_refused(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        find([str(tmp_path / "nowhere")])
    with pytest.raises(RunError, match="holds no run"):
        find([str(tmp_path)])


def test_several_processes_read_what_one_does(tmp_path, monkeypatch):
    folders = [(f"run{n}", make_run(tmp_path / f"run{n}", seed=n)) for n in range(3)]
    alone = read_runs(folders, 100)
    monkeypatch.setattr("deltakd.report.run.SEVERAL_BYTES", 0)
    together = read_runs(folders, 100)
    assert [run.name for run in alone] == [run.name for run in together] == ["run0", "run1", "run2"]
    for one, other in zip(alone, together, strict=True):
        assert one.seconds == other.seconds and (one.curves["loss"].y == other.curves["loss"].y).all()


def test_who_took_part_is_counted_and_rates_are_of_a_teachers_own_work(tmp_path):
    serving = read_run(("one", make_run(tmp_path / "one")), 100).serving
    assert [(one.role, one.starts) for one in serving.processes] == [("student 0", 1), ("teacher 0", 2)]
    assert serving.restarts == 1
    assert serving.teachers[0].tokens_per_s == 20_000 and serving.queues[0].waiting == 0.1
    assert (serving.queues[0].refused, serving.queues[0].again) == (2, 1)


def test_only_settings_that_differ_are_listed(tmp_path):
    runs = [read_run((str(n), make_run(tmp_path / str(n), 10 * n, seed=n, alpha=n / 4)), 100) for n in (1, 2)]
    found = differences(runs)
    differing = {"seed": ["1", "2"], "objective.target.alpha": ["0.25", "0.5"]}
    assert found.values == {**differing, "train.steps": ["10", "20"]}
    assert flat({"a": {"b": [1]}, "c": {}}) == {"a.b": [1], "c": {}}


def test_evaluations_of_the_same_baseline_are_one_table_and_others_are_not(tmp_path):
    names = {"first": ["sft", "delta"], "second": ["sft", "delta", "gkd"], "third": ["gkd", "sft"]}
    made = [read_evaluation(name, make_evaluation(tmp_path / name, labels, "sft")) for name, labels in names.items()]
    merged, apart = tables(made)
    assert [row.label for row in merged.rows] == ["sft", "delta", "gkd"] and len(apart.rows) == 2
    assert merged.num_prompts == 3 and merged.best("cross_entropy") == pytest.approx(0.4 / 3)


def test_a_metric_that_a_model_of_a_table_lacks_is_a_gap(tmp_path):
    folder = make_evaluation(tmp_path / "evaluation", ["sft", "delta"], "sft")
    results = json.loads((folder / "results.json").read_text())
    del results["models"]["delta"]["rougeL"]
    (folder / "results.json").write_text(json.dumps(results))
    evaluation = read_evaluation("evaluation", folder)
    said = [(gap.about, gap.what) for gap in gaps([], [evaluation], tables([evaluation]))]
    assert said == [("evaluation: delta", "not taken: ROUGE-L")]


def test_more_right_answers_are_better_and_no_length_is(tmp_path):
    """Of an evaluation as it is written, of math: right answers are shares, as ROUGE is, and so is what is retained."""

    def scored(label, right, tokens):
        rows = {"rougeL": right, "answer": right, "cross_entropy": [1 - one for one in right]}
        return ModelScores(label, f"{label}/export", label, rows, 0, tokens)

    models = [scored("sft", [0.0, 0.0, 0.0, 0.5], [3.0] * 4), scored("delta", [1.0, 1.0, 1.0, 0.5], [9.0] * 4)]
    write_comparison(compare(models, "sft", "delta", 200, 0), {"protocol": "paper"}, tmp_path)
    [table] = tables([read_evaluation("evaluation", tmp_path)])
    sft, delta = table.rows
    assert delta.cells["answer"].verdict("answer") == "better" == delta.cells["cross_entropy"].verdict("cross_entropy")
    assert {metric: table.best(metric) for metric in table.metrics} == {
        **dict.fromkeys(("rougeL", "answer"), 0.875),
        **{"cross_entropy": 0.125, "retained": 1.0, "mean_tokens": None},
    }
    directions = {"rougeL": "more", "answer": "more", "retained": "more", "cross_entropy": "less", "mean_tokens": ""}
    assert {metric: better(metric) for metric in table.metrics} == directions
    assert title("retained") == "of the teacher's ROUGE-L, %" and number(1 / 7, "retained") == "14.3"
    assert number(sft.cells["mean_tokens"].mean, "mean_tokens") == "3.0"


def test_an_interval_of_a_mean_covers_it_about_as_often_as_it_says():
    """300 samples of 100 normal rows; 95% of 300 are 285, and 3 standard deviations of that count are 11."""
    rng = np.random.default_rng(3)
    intervals = [interval_of_mean(rng.normal(size=100)) for _ in range(300)]
    assert 285 - 14 <= sum(low < 0 < high for low, high in intervals) <= 297


def test_answers_to_one_prompt_stand_together_with_their_scores(tmp_path):
    evaluation = read_evaluation("evaluation", make_evaluation(tmp_path / "evaluation", ["sft", "delta"], "sft"))
    [table] = tables([evaluation])
    shown = examples(table, {"evaluation": evaluation})
    assert list(shown.models) == ["sft", "delta"] and len(shown.rows) == 3
    assert shown.rows[0]["answers"][1]["scores"] == {"rougeL": 0.6, "cross_entropy": 0.2}
    few = examples(table, {"evaluation": evaluation}, most_letters=400)
    assert 0 < len(few.rows) < 3 and few.num_prompts == 3


def test_a_row_of_several_seeds_is_their_mean_by_prompt_with_the_first_one_s_answers(tmp_path):
    labels = ["sft_seed1", "sft_seed2", "delta_seed1"]
    folder = make_evaluation(tmp_path / "evaluation", labels, "sft_seed1")
    scores = {label: read_evaluation("each", folder).rows(label) for label in labels}
    runs = {label: ModelScores(label, f"{label}/export", "id", scores[label], 3) for label in labels}
    groups = {"sft": [runs["sft_seed1"], runs["sft_seed2"]], "delta": [runs["delta_seed1"]]}
    taken = {"delta": {"cross_entropy": {"mean": -1.0, "low": -2.0, "high": -0.5}}}
    write_groups(folder, groups, "sft", taken, {"seed": 3})
    evaluation = read_evaluation("evaluation", folder)
    [table] = tables([evaluation])
    sft, delta = table.rows
    both = np.mean([scores["sft_seed1"]["cross_entropy"], scores["sft_seed2"]["cross_entropy"]], axis=0)
    assert evaluation.rows("sft")["cross_entropy"] == pytest.approx(list(both))
    assert sft.cells["cross_entropy"].mean == pytest.approx(both.mean()) and table.baseline == "sft"
    assert sft.cells["cross_entropy"].low == pytest.approx(interval_of_mean(both)[0])
    assert delta.cells["cross_entropy"].verdict("cross_entropy") == "better"
    shown = examples(table, {"evaluation": evaluation})
    assert list(shown.models) == ["sft", "delta"]
    assert shown.rows[0]["answers"][0]["text"] == answers_of(evaluation, "sft")[0]["answer"]
    assert answers_of(evaluation, "sft") == answers_of(evaluation, "sft_seed1")


def test_the_runs_within_a_sweep_are_known_to_be_scored_wherever_its_folder_lies_now(tmp_path):
    label = "alpha=0,seed=1"
    make_run(tmp_path / "sweeps" / "alpha" / label)
    evaluation = read_evaluation("alpha", make_evaluation(tmp_path / "sweeps" / "alpha", [label], label))
    runs = read_runs([(f"alpha/{label}", tmp_path / "sweeps" / "alpha" / label)], 100)
    assert scored_runs(runs, [evaluation]) == {("alpha", label): f"alpha/{label}"}


def test_answers_that_cannot_be_read_are_none(tmp_path):
    folder = make_evaluation(tmp_path / "evaluation", ["sft", "delta"], "sft")
    evaluation = read_evaluation("evaluation", folder)
    assert [row["answer"] for row in answers_of(evaluation, "delta")][1:] == ["second answer", "third answer"]
    path = folder / "predictions" / "delta.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    assert answers_of(evaluation, "delta") == [] == answers_of(evaluation, "nobody")


def test_a_broken_evaluation_is_a_gap(tmp_path):
    folder = make_evaluation(tmp_path / "evaluation", ["sft"], "sft")
    (folder / "results.json").write_text("{")
    assert "cannot be read" in read_evaluation("evaluation", folder).notes[0]
    (folder / "results.json").unlink()
    assert "not compared yet" in read_evaluation("evaluation", folder).notes[0]


def test_runs_made_on_the_spot_write_the_lines_that_training_does(lab):
    """The page's columns are those of a real run, which is read here as any other."""
    assert [field.name for field in fields(StepRecord)] == list(KNOWN)
    lab.train_here("reported", "validation.every_steps=2", "references.from=in_process")
    read = read_run(("reported", lab.folder / "runs" / "reported"), 100)
    assert read.steps == 5 and read.is_finished and not read.notes
    assert {"loss", "kl_to_target", "grad_norm", "learning_rate", "alpha", "memory"} <= read.curves.keys()
    assert read.validated["step"] == [2, 4, 5] and read.seconds["validation"] > 0
    assert read.facts["seed"] == 17 or isinstance(read.facts["seed"], int)
    assert json.loads((read.path / "finished.json").read_text())["steps"] == 5


def test_a_sweeps_curves_have_the_tables_scale_and_a_name_only_where_it_says_more(tmp_path):
    found = responses("sweeps/alpha", make_sweep(tmp_path / "alpha", "two"))
    assert [one.title for one in found] == ["ROUGE-L over alpha", "cross-entropy over alpha"]
    rouge, nats = (one.lines["x=one"] for one in found)
    assert rouge[0] == (0.0, 50.0, 48.0, 52.0, "the baseline") and nats[0][:4] == (0.0, 0.5, 0.48, 0.52)
    assert rouge[2][4] == "+10.0 [+9.0, +11.0] to the baseline"
    for name in ("sweeps/first", "one/sweeps/alpha"):
        assert responses(name, tmp_path / "alpha")[0].title == f"ROUGE-L over alpha, {name}"
