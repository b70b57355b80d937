"""Scores: rouge-score's own numbers, intervals that cover, lists that must match."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rouge_score import rouge_scorer

from deltakd.base.errors import DataError
from deltakd.data.examples import Example
from deltakd.data.packing import pack
from deltakd.evaluate.compare import CROSS_ENTROPY, KEPT, ModelScores, compare, markdown_table, write_comparison
from deltakd.evaluate.cross_entropy import cross_entropy_rows, kl_rows, target_rows
from deltakd.evaluate.scores import ROUGE, mean_interval, paired_difference, rouge_rows, two_level_difference
from deltakd.losses.objectives import objective
from deltakd.models.load import load_model
from deltakd.models.settings import ModelsSettings, WeightsSettings

PREDICTIONS = ["the cat sat on the mat", "", "running dogs ran"]
REFERENCES = ["the cats sat on a mat", "something", "the dog runs"]


def test_rouge_is_rouge_score_called_by_hand_with_its_stemmer():
    rows = rouge_rows(PREDICTIONS, REFERENCES)
    scorer = rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=True)
    for index, (prediction, reference) in enumerate(zip(PREDICTIONS, REFERENCES, strict=True)):
        by_hand = scorer.score(reference, prediction)
        assert [rows[name][index] for name in ROUGE] == [by_hand[name].fmeasure for name in ROUGE]
    assert rows["rouge1"][1] == 0 < rows["rouge1"][2]


def test_of_several_references_the_best_counts_for_each_score():
    several = rouge_rows(["the cat sat"], [["a dog", "the cat sat on a mat", "cat the sat"]])
    one_by_one = [rouge_rows(["the cat sat"], [one]) for one in ("a dog", "the cat sat on a mat", "cat the sat")]
    assert several == {name: [max(one[name][0] for one in one_by_one)] for name in ROUGE}
    assert several["rouge1"][0] == 1 > several["rougeL"][0] == several["rougeL"][0] > one_by_one[0]["rougeL"][0]


@pytest.mark.parametrize("predictions,references", [(["a"], ["a", "b"]), ([], [])])
def test_lists_that_do_not_match_are_refused(predictions, references):
    with pytest.raises(DataError, match=f"{len(predictions)} predictions for {len(references)} references"):
        rouge_rows(predictions, references)


def test_a_paired_interval_covers_the_true_difference_in_about_95_of_100_worlds():
    rng = np.random.default_rng(0)
    covered = 0
    for world in range(200):
        prompts = rng.normal(size=80)  # shared difficulty: unpaired intervals would be far wider
        one, other = prompts + 0.3 + 0.1 * rng.normal(size=80), prompts + 0.1 * rng.normal(size=80)
        interval = paired_difference(list(one), list(other), 400, seed=world)
        assert interval.high - interval.low < 0.1
        covered += interval.low <= 0.3 <= interval.high
        assert interval.p < 0.01
    assert 180 <= covered <= 198  # 190 expected, standard deviation 3


def test_the_interval_of_a_mean_covers_it_in_about_95_of_100_worlds():
    rng = np.random.default_rng(1)
    intervals = [mean_interval(list(rng.exponential(size=100)), 400, seed) for seed in range(200)]
    assert 176 <= sum(one.low <= 1 <= one.high for one in intervals) <= 198  # skewed rows: a little below 190


@pytest.mark.parametrize("draw", ["normal", "standard_cauchy", "sign"])
def test_p_values_are_uniform_where_neither_model_is_better(draw):
    """Whatever the differences are, if they are symmetric: of 500 worlds, shares below a level are that level."""
    rng = np.random.default_rng(2)
    several = []
    for seed in range(500):
        rows = rng.choice([-1.0, 1.0], 301) if draw == "sign" else getattr(rng, draw)(size=25)
        several.append(paired_difference(list(rows), [0.0] * len(rows), 199, seed).p)
    assert min(several) >= 1 / 200
    for level in (0.05, 0.25, 0.5, 0.75):
        slack = 3 * np.sqrt(level * (1 - level) / 500)
        # Signs alone have few different sums, and a p-value counts those that are alike: it is then a little large.
        assert level - slack - (0.04 if draw == "sign" else 0) <= np.mean(np.array(several) <= level) <= level + slack


def test_a_difference_that_is_everywhere_0_has_p_1_and_one_that_is_clear_the_smallest():
    assert paired_difference([1.0, 2.0], [1.0, 2.0], 99, 0).p == 1
    rows = [1.0 + 0.01 * index for index in range(40)]
    assert paired_difference(rows, [0.0] * 40, 99, 0).p == paired_difference([0.0] * 40, rows, 99, 0).p == 0.01
    # All nine of one sign are 2 of 512 draws; their sums differ from the one that was seen by its last bits.
    nine = np.random.default_rng(10).random(9).tolist()
    assert paired_difference(nine, [0.0] * 9, 4000, 0).p == pytest.approx(2 / 512, abs=0.003)
    assert paired_difference(nine, [0.0] * 9, 4000, 0).p > 0.002
    assert paired_difference([0.1, 0.2, 0.3], [0.0] * 3, 4000, 0).p == pytest.approx(0.25, abs=0.03)  # 2 of 8 signs


def test_rows_of_other_prompts_are_refused():
    with pytest.raises(DataError, match="3 rows against 2"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0], 10, 0)
    with pytest.raises(DataError, match="no rows to take a mean of"):
        mean_interval([], 10, 0)


def scores(label: str, rouge: float, cross_entropy: float) -> ModelScores:
    rng = np.random.default_rng(0)
    rows = {name: list(rouge + 0.01 * rng.normal(size=30)) for name in ROUGE}
    rows[CROSS_ENTROPY] = list(cross_entropy + 0.01 * rng.normal(size=30))
    rows[f"{KEPT}raw"] = [1.0, 2.0]
    return ModelScores(label, "folder", "id", rows, 0)


def test_a_teacher_that_is_not_clearly_better_is_warned_about():
    better = compare([scores("sft", 0.5, 1.0), scores("teacher", 0.7, 0.5)], "sft", "teacher", 200, 0)
    assert better.warnings == []
    worse = compare([scores("sft", 0.5, 1.0), scores("teacher", 0.7, 1.0)], "sft", "teacher", 200, 0)
    assert len(worse.warnings) == 1 and "teacher is not clearly better than sft" in worse.warnings[0]


def test_the_table_has_a_row_a_model_and_differences_to_the_baseline():
    table = markdown_table(compare([scores("sft", 0.5, 1.0), scores("delta", 0.7, 0.5)], "sft", None, 200, 0))
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 6
    assert rows[1] == "| sft | 49.9 | 50.3 | 50.2 | 1.000 | 1.500 |"
    assert rows[2].count("(+20.0 [+20.0, +20.0])") == 3 and "0.500 (-0.500 [-0.500, -0.500])" in rows[2]
    assert rows[4:] == ["| sft | - | - | 0 |", "| delta | - | - | 0 |"]


def test_the_share_of_the_teacher_lengths_and_what_was_kept_stand_beside_them(tmp_path):
    models = [scores("teacher", 0.8, 0.5), replace(scores("sft", 0.4, 1.0), num_truncated=3, num_tokens=[4.0, 5.0])]
    raw = ModelScores("student_raw", "folder", "id", {f"{KEPT}raw": [0.5, 1.5]}, 0)
    comparison = compare(models, "sft", "teacher", 200, 0, raw)
    write_comparison(comparison, {"protocol": "paper"}, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    sft, teacher = results["models"]["sft"], results["models"]["teacher"]
    assert sft["retained"] == pytest.approx(sft["rougeL"] / teacher["rougeL"]) and teacher["retained"] == 1
    assert (sft["num_truncated"], sft["mean_tokens"], teacher["mean_tokens"]) == (3, 4.5, None)
    assert sft["difference"] == {} and teacher["difference"][CROSS_ENTROPY]["p"] == 1 / 201
    assert sft["intervals"]["rougeL"]["low"] < sft["rougeL"] < sft["intervals"]["rougeL"]["high"]
    assert sft["intervals"]["num_tokens"]["mean"] == 4.5
    assert results["kept_before"] == {f"{KEPT}raw": 1.0} and sft["kept_change"][f"{KEPT}raw"]["mean"] == 0.5
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| sft")]
    assert (tmp_path / "table.md").read_text().endswith("\n\nProtocol: paper.\n")
    assert rows[1] == "| sft | 50% | 4.5 | 3 | 1.000 -> 1.500 (+0.500 [+0.500, +0.500]) |"


def test_a_comparison_with_what_is_not_there_or_of_other_rows_is_refused():
    one, other = scores("sft", 0.5, 1.0), scores("delta", 0.5, 1.0)
    with pytest.raises(DataError, match=r"delta is none of the models sft\. Write one of them"):
        compare([one], "delta", None, 10, 0)
    with pytest.raises(DataError, match="29 rows against 30"):
        compare([one, replace(other, rows={name: rows[:29] for name, rows in other.rows.items()})], "sft", None, 10, 0)
    with pytest.raises(DataError, match="2 rows against 0"):
        fewer = {name: rows for name, rows in one.rows.items() if not name.startswith(KEPT)}
        compare([replace(one, rows=fewer), other], "sft", None, 10, 0)


def test_cross_entropy_of_each_row_is_torch_s_own(lab):
    settings = ModelsSettings(student=WeightsSettings(weights="x"), dtype="float32")
    model = load_model("teacher", lab.folder / "teacher", settings)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 300, (n,), generator=generator) for n in (7, 12, 5)]
    batch = pack([Example(d.int().numpy(), (torch.arange(len(d)) >= 3).numpy()) for d in documents])
    for value, tokens in zip(cross_entropy_rows(model, [batch], 300), documents, strict=True):
        logits = model(input_ids=tokens[None]).logits[0, 2:-1, :300]
        expected = torch.nn.functional.cross_entropy(logits, tokens[3:])
        assert value == pytest.approx(expected.item(), rel=1e-5)


def test_kl_to_the_teacher_of_each_row_is_that_of_plain_softmax_in_float64(lab):
    """The teacher's head has more rows than the student's: what lies above the shared vocabulary counts nowhere."""
    settings = ModelsSettings(student=WeightsSettings(weights="x"), dtype="float32")
    student, teacher = (load_model(name, lab.folder / name, settings) for name in ("student", "teacher"))
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, 300, (n,), generator=generator) for n in (9, 30, 4, 17)]
    examples = [Example(d.int().numpy(), (torch.arange(len(d)) >= 2).numpy()) for d in documents]
    rows = kl_rows(student, teacher, [pack(examples[:3]), pack(examples[3:])], 300)
    for value, tokens in zip(rows, documents, strict=True):
        log_q, log_p = (
            model(input_ids=tokens[None]).logits[0, 1:-1, :300].double().log_softmax(-1) for model in (student, teacher)
        )
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert value == pytest.approx(expected.item(), rel=1e-5) and value > 0.01
    assert kl_rows(teacher, teacher, [pack(examples)], 300) == pytest.approx([0.0] * 4, abs=1e-6)


def test_kl_to_the_target_of_each_row_is_that_of_plain_softmax_in_float64(lab):
    settings = ModelsSettings(student=WeightsSettings(weights="x"), dtype="float32")
    student, *frozen = (load_model(n, lab.folder / n, settings) for n in ("student", "teacher", "teacher_raw"))
    other = load_model("student_raw", lab.folder / "student", settings).requires_grad_(False)
    for weight in other.parameters():
        weight.mul_(0.7)
    models = {"teacher": frozen[0], "teacher_raw": frozen[1], "student_raw": other}
    tokens = torch.randint(0, 300, (23,), generator=torch.Generator().manual_seed(2))
    batch = pack([Example(tokens.int().numpy(), (torch.arange(23) >= 2).numpy())])
    log = {
        name: model(input_ids=tokens[None]).logits[0, 1:-1, :300].double().log_softmax(-1)
        for name, model in {**models, "student": student}.items()
    }
    log_p = (log["teacher"] + 0.5 * (log["student_raw"] - log["teacher_raw"])).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log["student"])).sum(-1).mean()
    # Whatever divergence the recipe trains on: the figure is the KL.
    of = objective({"target": {"name": "delta", "alpha": 0.5}, "divergence": {"name": "reverse_kl"}})
    (value,) = target_rows(student, models, of, [batch], 300)
    assert value == pytest.approx(expected.item(), rel=1e-5) and value > 0.01


def test_an_interval_over_seeds_and_prompts_is_as_wide_as_both_variances_say():
    """Where a difference is a part of its seed and a part of its prompt, the resampled mean's variance is known."""
    rng = np.random.default_rng(0)
    of_seed, of_prompt = rng.normal(size=40), 2 * rng.normal(size=60)
    values = 0.3 + of_seed[:, None] + of_prompt[None, :]
    interval = two_level_difference(values.tolist(), np.zeros_like(values).tolist(), 20_000, seed=1)
    assert interval.mean == pytest.approx(values.mean())
    expected = 1.96 * np.sqrt(of_seed.var() / 40 + of_prompt.var() / 60)
    # 20,000 resamples give either end to about 2% of the half width.
    assert [interval.mean - interval.low, interval.high - interval.mean] == pytest.approx([expected] * 2, rel=0.05)


def test_an_interval_of_one_seed_is_that_over_prompts():
    rng = np.random.default_rng(3)
    one, other = list(rng.normal(size=50)), list(rng.normal(size=50))
    over_prompts, over_both = paired_difference(one, other, 20_000, 0), two_level_difference([one], [other], 20_000, 0)
    assert over_both.mean == pytest.approx(over_prompts.mean)
    assert [over_both.low, over_both.high] == pytest.approx([over_prompts.low, over_prompts.high], abs=0.02)


@pytest.mark.parametrize("num_seeds,least,most", [(3, 250, 330), (20, 360, 392)])
def test_an_interval_over_seeds_covers_as_often_as_its_docstring_says(num_seeds, least, most):
    """Of 400 worlds in which seeds matter more than prompts: about 72 of 100 of three seeds, nearly 95 of many."""
    rng = np.random.default_rng(0)
    covered = 0
    for world in range(400):
        values = 0.3 + rng.normal(size=(num_seeds, 1)) + 0.3 * rng.normal(size=(1, 40))
        interval = two_level_difference(values.tolist(), np.zeros_like(values).tolist(), 300, seed=world)
        covered += interval.low <= 0.3 <= interval.high
    assert least <= covered <= most, covered


def test_seeds_or_rows_that_do_not_match_are_refused():
    for values, baseline in (([[1.0], [2.0]], [[1.0]]), ([[1.0, 2.0]], [[1.0]]), ([[1.0], []], [[1.0], []]), ([], [])):
        with pytest.raises(DataError, match="same seeds and prompts"):
            two_level_difference(values, baseline, 10, 0)
