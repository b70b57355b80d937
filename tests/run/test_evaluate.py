"""The verb evaluate: one table whoever takes its parts and through kills; both protocols; what a user gets wrong."""

import json
import os
import signal
import subprocess

import pytest
from rouge_score import rouge_scorer

from deltakd.__main__ import main
from deltakd.evaluate.generate import Answer
from deltakd.evaluate.predictions import COLUMNS, read_predictions
from deltakd.evaluate.protocols import PROTOCOLS
from deltakd.evaluate.scores import ROUGE
from deltakd.evaluate.settings import EvaluationSettings
from deltakd.recipe import scoring
from tests.conftest import chat_rows, write_rows
from tests.run.running import wait_until

SAMPLED = "evaluation={max_new_tokens: 6, temperature: 1.0, batch_size: 32, num_resamples: 100}"


@pytest.fixture(scope="module")
def words(lab):
    """What a call says, with its rows: three chunks, the last of them not full."""
    rows = write_rows(lab.folder / "held_out.jsonl", chat_rows(0, 150))
    kept = f"evaluation.kept={{text: {lab.folder}/validation.jsonl}}"

    def build(root, *more):
        models = ["--model", str(lab.folder / "student"), f"other={lab.folder}/teacher_raw", "--target"]
        settings = [f"root={root}", f"data.validation.path={rows}", SAMPLED, kept]
        return ["evaluate", str(lab.recipe), *settings, *models, *more]

    return build


def results(root, name="paper"):
    return json.loads((root / "evaluations" / name / "results.json").read_text())


def parts_of(root):
    return list(root.rglob("chunks/*/*.json"))


def same_results(one, other):
    assert results(one)["models"] == results(other)["models"]
    for label in results(one)["models"]:
        first, second = (read_predictions(root / "evaluations" / "paper", label) for root in (one, other))
        assert first == second and len(first) == 150
    assert not parts_of(one) and not parts_of(other)


def test_whoever_takes_the_parts_and_whenever_it_is_stopped_no_digit_changes(words, tmp_path, capsys, monkeypatch):
    assert main(words(tmp_path)) == 0
    whole = results(tmp_path)
    assert list(whole["models"]) == ["teacher", "student", "other"] and whole["baseline"] == "student"
    # The student is what it starts from: what it kept is what the raw student knew.
    kept = whole["models"]["student"]["kept_change"]["kept: text"]
    assert kept == {"mean": 0, "low": 0, "high": 0, "p": 1} and whole["models"]["other"]["kl_to_target"] > 0.01
    printed = capsys.readouterr()
    assert f"Results: {tmp_path}/evaluations/paper/results.json" in printed.out and "student" in printed.err

    root, real = tmp_path / "stopped", scoring.write_json

    def write(path, value):
        if len(parts_of(root)) == 4:
            raise KeyboardInterrupt
        real(path, value)

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "write_json", write)
        assert main(words(root)) == 130
    left = {path: path.stat().st_mtime_ns for path in parts_of(root)}
    assert len(left) == 4 and not list(root.rglob("results.json"))
    assert main(words(root, "--shard", "1/3")) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in left.items()) and len(parts_of(root)) > 8
    assert not list(root.rglob("results.json"))
    assert main(words(root)) == 0
    same_results(tmp_path, root)


@pytest.mark.soak  # on a busy machine three processes take minutes to import what they need
def test_processes_that_share_the_work_and_are_killed_change_no_digit(lab, words, tmp_path):
    assert main(words(tmp_path)) == 0
    root = tmp_path / "shared"
    command = ["python", "-m", "deltakd", *words(root, "--processes", "2")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=lab.folder, env=lab.environment(), **quiet)
    wait_until(lambda: parts_of(root), "the first part")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(root.rglob("results.json"))
    done = lab.run(*command)
    assert done.returncode == 0, done.stderr
    same_results(tmp_path, root)


def test_a_second_call_loads_no_model_and_another_question_asks_again(words, tmp_path, capsys, monkeypatch):
    assert main(words(tmp_path, "evaluation.num_prompts=5", "--teacher", "none")) == 0
    monkeypatch.setattr(scoring, "generate", None)  # to be called is a TypeError
    assert main(words(tmp_path, "evaluation.num_prompts=5", "--teacher", "none", "--baseline", "other")) == 0
    assert results(tmp_path)["models"]["other"]["difference"] == {} and results(tmp_path)["teacher"] is None
    with pytest.raises(TypeError):
        main(words(tmp_path, "evaluation.num_prompts=6", "--teacher", "none"))


def test_minillm_takes_the_mean_of_five_seeds_and_the_best_of_several_references(lab, tmp_path):
    rows = [{**row, "other_answers": ["anna has a book .", "what has bela"]} for row in chat_rows(0, 3)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    settings = [f"root={tmp_path}", f"data.validation.path={path}"]
    model = ["--model", f"student={lab.folder}/student", "--teacher=none", "--protocol=minillm"]
    assert main(["evaluate", str(lab.recipe), *settings, *model]) == 0
    answers = read_predictions(tmp_path / "evaluations" / "minillm", "student")
    assert list(answers[0]) == list(COLUMNS) and [row["seed"] for row in answers[::3]] == [10, 20, 30, 40, 50]
    assert len({row["answer"] for row in answers}) > 10 and max(row["num_tokens"] for row in answers) > 64
    scorer = rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=True)
    for row in answers:
        references = [row["reference"], "anna has a book .", "what has bela"]
        by_hand = [scorer.score(reference, row["answer"]) for reference in references]
        assert [row[name] for name in ROUGE] == [max(one[name].fmeasure for one in by_hand) for name in ROUGE]
        assert row["answer_correct"] is None and row["kl_to_teacher"] is None and row["cross_entropy"] > 0
    said = results(tmp_path, "minillm")
    model = said["models"]["student"]
    assert model["rouge1"] == pytest.approx(sum(row["rouge1"] for row in answers) / 15)
    assert model["mean_tokens"] == pytest.approx(sum(row["num_tokens"] for row in answers) / 15)
    assert model["num_truncated"] == sum(not row["ended"] for row in answers)
    assert said["asked"]["max_new_tokens"] + said["asked"]["max_prompt_tokens"] == 512
    # Over 3 prompts, not over 15 answers: the outermost resamples are those of one prompt alone.
    by_prompt = [sum(row["rougeL"] for row in answers[first::3]) / 5 for first in range(3)]
    ends = model["intervals"]["rougeL"]
    assert (ends["low"], ends["high"]) == pytest.approx((min(by_prompt), max(by_prompt)))


def test_a_prompt_that_is_too_long_keeps_its_end_and_paper_asks_as_the_recipe_says():
    minillm, paper = (PROTOCOLS[name](EvaluationSettings(max_new_tokens=9, seed=4)) for name in ("minillm", "paper"))
    assert minillm.cut(list(range(300))) == list(range(44, 300)) and minillm.cut([1]) == [1]
    assert (minillm.sampling.temperature, minillm.sampling.top_p, minillm.sampling.max_new_tokens) == (1, 1, 256)
    assert paper.cut(list(range(999))) == list(range(999)) and paper.sampling.max_new_tokens == 9
    assert (paper.seeds, paper.sampling.temperature) == ((4,), 0)


def test_final_answers_of_math_rows_are_judged_where_there_is_one(lab, tmp_path, monkeypatch):
    golds = ["\\frac{1}{2}", "3", None]
    rows = [
        {"problem": f"what {n} ?", "generated_solution": "so it is .", "expected_answer": g}
        for n, g in enumerate(golds)
    ]
    rows[1] |= {"expected_answer": None, "generated_solution": "so \\boxed{3}"}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    said = [Answer("\\boxed{7} no, \\boxed{0.5}", True, 5), Answer("it is 3", False, 3), Answer("\\boxed{1}", True, 1)]
    monkeypatch.setattr(scoring, "generate", lambda *given: said)
    settings = [f"root={tmp_path}", f"data.validation.path={path}", "data.format=math"]
    model = ["--model", f"{lab.folder}/student", "--teacher=none"]
    assert main(["evaluate", str(lab.recipe), *settings, *model]) == 0
    answers = read_predictions(tmp_path / "evaluations" / "paper", "student")
    assert [row["answer_correct"] for row in answers] == [True, False, None]
    scores = results(tmp_path)["models"]["student"]
    assert (scores["answer"], scores["intervals"]["answer"]["high"], scores["num_truncated"]) == (0.5, 1, 1)


@pytest.mark.parametrize(
    "more,said",
    [
        (["--baseline", "base"], "--baseline: base is none of the labels teacher, student, other"),
        (["--shard", "3/3"], "--shard: 3/3 is no share"),
        (["--processes", "0"], "--processes: 0. Write 1 or more"),
        (["--name", "a/b"], "--name: 'a/b' is no folder's name"),
        (["--teacher", "nowhere/x/y"], "nowhere/x/y does not exist"),
        (["--model", "third=/nowhere"], "--model third: /nowhere does not exist"),
        (["--model", "other=/nowhere"], "--model: other is the label of "),
        (["--model", "unfinished"], "unfinished is a run without an export yet"),
        (["data.validation=null"], "data.validation: missing. Write data.validation.path"),
        (["data.validation.path=nowhere.jsonl"], "data.validation.path: nowhere.jsonl does not exist"),
        (["data.format=text"], "data.format: text has no prompts"),
        (["evaluation.kept={gone: gone.jsonl}"], "evaluation.kept.gone: gone.jsonl does not exist"),
        (["objective.sft_weight=1.0"], "objective: no frozen model is learnt from. Leave --target out"),
        (["models.teacher_raw=null"], "models.teacher_raw: missing, and --target reads it"),
        (["evaluation.num_prompts=0"], "evaluation.num_prompts"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(words, tmp_path, capsys, more, said):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text("")
    assert main(words(tmp_path, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("deltakd: ") and said in error and error.count("\n") == 0
    assert not list(tmp_path.rglob("results.json"))


def test_checkpoints_are_compared_on_held_out_rows_that_are_there(lab, capsys):
    assert main(["compare", str(lab.recipe), "--run", "sft", "data.validation=null"]) == 2
    assert "data.validation: missing. Write data.validation.path" in capsys.readouterr().err


def test_a_run_is_its_export_and_settings_among_the_models_are_settings(lab, tmp_path, monkeypatch):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "export").symlink_to(lab.folder / "student")
    seen = {}
    monkeypatch.setattr("deltakd.recipe.evaluating.finish", lambda plan, console: seen.update(plan=plan))
    start = ["evaluate", str(lab.recipe), "--model", "sft"]
    end = ["seed=3", f"root={tmp_path}"]
    assert main([*start, str(tmp_path / "sft"), *end]) == 2  # the same label twice
    with pytest.raises(FileNotFoundError):  # of the table that nobody made
        main([*start, f"again={tmp_path}/sft/export", str(lab.folder / "teacher"), *end])
    settings = seen["plan"].settings
    assert settings.models["sft"] == settings.models["again"] == str(tmp_path / "sft" / "export")
    assert settings.teacher == "teacher" and list(settings.models) == ["sft", "again", "teacher"]
    assert seen["plan"].loaded.recipe.seed == 3
