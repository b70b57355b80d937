"""The grid of a sweep: which values there are, what its points are called, and what is refused before anything runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from deltakd.__main__ import main
from deltakd.base.errors import RunError
from deltakd.evaluate.compare import ModelScores
from deltakd.evaluate.scores import two_level_difference
from deltakd.recipe.load import load_recipe
from deltakd.study.grid import read_grid, split_values
from deltakd.study.results import find_baseline, markdown, report
from deltakd.study.sharing import share

ALPHA = "objective.target.alpha"


@pytest.mark.parametrize(
    "text, parts",
    [
        ("0,0.25,1", ["0", "0.25", "1"]),
        ("jsd", ["jsd"]),
        ("[1, 2],[3]", ["[1, 2]", "[3]"]),
        ("forward_kl,{name: jsd, beta: 0.3}", ["forward_kl", "{name: jsd, beta: 0.3}"]),
        ("\"a,b\",'c,d'", ['"a,b"', "'c,d'"]),
        ("it's,this", ["it's", "this"]),
        ("{x: [1, {y: '},'}]},2", ["{x: [1, {y: '},'}]}", "2"]),
        ("1,,2", ["1", "", "2"]),
    ],
)
def test_commas_at_top_level_separate_and_those_inside_do_not(text, parts):
    assert split_values(text) == parts


def test_every_combination_is_a_recipe_in_a_folder_that_names_its_values():
    words = [f"{ALPHA}=0,0.5", "seed=3,4", "train.steps=70", "objective.divergence=forward_kl,{name: jsd, beta: 0.3}"]
    grid = read_grid("quickstart", words)
    assert grid.name == "alpha_divergence" and list(grid.keys) == [ALPHA, "seed", "objective.divergence"]
    assert len(grid.points) == 8 and len({point.label for point in grid.points}) == 8
    point = grid.points[3]
    recipe = point.loaded.recipe
    assert point.values == {ALPHA: 0, "seed": 4, "objective.divergence": {"name": "jsd", "beta": 0.3}}
    assert (recipe.objective.target.alpha, recipe.seed, recipe.objective.divergence.beta) == (0, 4, 0.3)
    assert recipe.train.steps == 70 and point.label.startswith("alpha=0,seed=4,divergence=name_jsd_beta_0.3_")
    assert recipe.directory == f"runs/quickstart/sweeps/alpha_divergence/{point.label}"
    # The same command with one more value leaves the folders of the others as they are.
    more = read_grid("quickstart", [words[0] + ",1", *words[1:]])
    assert {one.label for one in grid.points} < {one.label for one in more.points}
    both = read_grid("quickstart", ["seed=1,2", "generation.seed=1,2"])
    assert both.points[0].label == "seed=1,generation_seed=1"


@pytest.mark.parametrize("run", ["sweeps/../teacher", "../x", "/etc", "a//b", "a/.b", "A"])
def test_a_run_s_folder_never_lies_outside_its_root(run):
    with pytest.raises(ValueError, match="run"):
        load_recipe("quickstart", [f"run={run}"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["objective.target.alpa=0,1"], "objective.target.alpa: unknown key. Write alpha"),
        (["seed=1"], "no setting has several values, which is one training"),
        ([], "no setting has several values"),
        (["seed=1,2,1"], "seed: 1 and 1 are one value"),
        ([f"{ALPHA}=0,0.0"], "alpha: 0 and 0.0 are one value"),
        (["objective.divergence=forward_kl,{name: forward_kl}"], "are the same training"),
        ([f"{ALPHA}=0,high"], "alpha: 'high' is a text"),
        (["train.steps=0,5"], "train.steps: 0 does not fit"),
        (["train.warmup_steps=5,400"], "400 steps of warm-up leave none"),
        (["seed=1,,2"], "seed=1,,2: a value between commas is missing"),
        (["seed=1,2", "seed=3"], "seed: given twice"),
        (["run=a,b"], "a sweep sets run itself"),
        (["root=a,b"], "a sweep sets root itself"),
        (["evaluation.num_prompts=3,4"], "cannot be compared"),
        (["seed=1,2", "--name=My sweep"], "--name: 'My sweep' is no name"),
        (["seed=1,2", "--jobs=0"], "--jobs: 0 trainings at a time"),
        (["seed=1,2", "--slurm", "--sbatch=--comment='one"], "--sbatch: --comment='one cannot be cut into words (No"),
        (
            [f"models.{role}.weights={'a' * 60},b" for role in ("student", "student_raw", "teacher", "teacher_raw")],
            "a folder would have a name of 2",
        ),
        (
            [f"{ALPHA}=0,1", "--baseline=beta=1"],
            "--baseline: beta=1 names no setting of this sweep. Write some of alpha",
        ),
        ([f"{ALPHA}=0,1", "--baseline=alpha=2"], "has no such value here. Write one of 0, 1."),
        (["seed=1,2", "data.validation=null", "pipeline=[]"], "data.validation: missing, and a sweep scores"),
    ],
)
def test_what_is_no_sweep_is_one_sentence_before_anything_runs(words, said, capsys):
    at = [] if any(word.startswith("root=") for word in words) else ["root=nowhere"]
    assert main(["sweep", "quickstart", *at, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not Path("nowhere").exists()


@pytest.mark.parametrize(
    "words, num_asked, said",
    [
        ([f"{ALPHA}=0,0.5,1", "seed=1,2"], 4, "6 points share 2 sets of batches"),  # alpha 0 asks the teacher alone
        (["train.learning_rate=1.0e-3,2.0e-3", "models.lora={rank: 4},{rank: 8}"], 1, "4 points share 1 sets"),
        (["train.steps=10,20", "train.warmup_steps=0"], 1, "2 points share 1 sets"),
        (["seed=1,2"], 0, "no two points have the same batches"),
        ([f"{ALPHA}=0.5,1", "references.payload=target"], 0, "the payload holds the target"),
        (["data.max_tokens=128,256", f"{ALPHA}=0,1"], 0, "data.max_tokens changes what the frozen models are asked"),
        (["models.teacher_raw.weights=a,b", "seed=1,2"], 0, "models.teacher_raw.weights changes what"),
        ([f"{ALPHA}=0.5,1", "references.from=service"], 0, "references.from=service, as the command line says"),
        (["seed=1,2", "objective.sft_weight=1.0"], 0, "no frozen model is asked"),
    ],
)
def test_points_share_one_cache_where_they_ask_about_the_same_batches(words, num_asked, said, tmp_path):
    sharing = share(read_grid("quickstart", [*words, f"root={tmp_path}"]))
    assert said in sharing.why and len(sharing.to_cache) == num_asked
    sources = {point.loaded.recipe.references.source for point in sharing.points}
    assert sources == ({"cache"} if num_asked else {"service"})
    if num_asked == 1 and "train.steps=10,20" in words:
        assert sharing.to_cache[0].recipe.train.steps == 20  # which holds the batches of the shorter run


def test_a_student_that_writes_its_own_batches_asks_for_itself(tmp_path):
    sharing = share(read_grid("baselines/gkd", ["train.learning_rate=1.0e-3,2.0e-3", f"root={tmp_path}"]))
    assert "not shared: the student writes its own batches" in sharing.why and not sharing.to_cache


def scores(label: str, shift: float, seed: int) -> ModelScores:
    rows = np.random.default_rng(seed).normal(size=30) + shift
    return ModelScores(label, "folder", "id", {"cross_entropy": list(rows), "rouge1": list(rows / 10)}, 0)


def test_curves_hold_means_over_seeds_and_paired_intervals_against_the_baseline():
    grid = read_grid("quickstart", [f"{ALPHA}=0,0.5,1", "seed=1,2", "train.learning_rate=1.0e-3,2.0e-3"])
    given = {point.label: scores(point.label, point.values[ALPHA], point.seed) for point in grid.points}
    lost = "alpha=1,seed=2,learning_rate=1.0e-3"
    del given[lost]
    status = {point.label: "finished" if point.label in given else "failed" for point in grid.points}
    baseline = find_baseline(grid, "alpha=0.5")
    found = report(grid, status, {lost: "it fell over."}, given, [], baseline)
    assert json.loads(json.dumps(found)) == found and found["baseline"] == {ALPHA: 0.5}
    assert [point["why"] for point in found["points"] if point["status"] == "failed"] == ["it fell over."]
    assert len(found["points"]) == 12 and len(found["settings"]) == 5  # of alpha 1 at 1.0e-3 a seed is missing
    first = found["settings"][0]
    rows = {label: one.rows["cross_entropy"] for label, one in given.items()}
    names = [[f"alpha={alpha},seed={seed},learning_rate=1.0e-3" for seed in (1, 2)] for alpha in ("0", "0.5")]
    own, other = ([rows[label] for label in side] for side in names)
    assert first["metrics"]["cross_entropy"]["mean"] == pytest.approx(np.mean(own))
    assert first["metrics"]["cross_entropy"]["by_seed"] == [pytest.approx(np.mean(one)) for one in own]
    evaluation = grid.points[0].loaded.recipe.evaluation
    expected = two_level_difference(own, other, evaluation.num_resamples, evaluation.seed)
    assert first["metrics"]["cross_entropy"]["difference"] == vars(expected) and expected.mean == pytest.approx(-0.5)
    (short, whole) = found["curves"][ALPHA]
    assert [point["value"] for point in short["points"]] == [0, 0.5] and whole["at"] == {"train.learning_rate": 0.002}
    assert [point["value"] for point in whole["points"]] == [0, 0.5, 1] and "seed" not in found["curves"]
    table = markdown(found).splitlines()
    assert "| alpha | learning_rate | cross-entropy | ROUGE-1 |" in table and "12 points (1 failed)" in table[-1]
    # A learning rate is held against its own alpha 0.5, which has no difference to itself.
    assert all("(" not in line for line in table if line.startswith("| 0.5 |"))
    assert "mean difference to alpha=0.5 and all else alike with" in table[-1]
    names = [[f"alpha={alpha},seed={seed},learning_rate=2.0e-3" for seed in (1, 2)] for alpha in ("1", "0.5")]
    own, other = ([rows[label] for label in side] for side in names)
    (last,) = (one for one in found["settings"] if one["values"] == {ALPHA: 1, "train.learning_rate": 0.002})
    expected = two_level_difference(own, other, evaluation.num_resamples, evaluation.seed)
    assert last["metrics"]["cross_entropy"]["difference"] == vars(expected)
    first = report(grid, status, {}, given, [], find_baseline(grid, None))
    assert [one["metrics"]["rouge1"]["difference"] is None for one in first["settings"]] == [True] + 4 * [False]
    assert "mean difference to alpha=0, learning_rate=0.001 with" in markdown(first)


def test_seeds_alone_are_compared_with_each_other():
    grid = read_grid("quickstart", ["seed=1,2"])
    given = {point.label: scores(point.label, 0, point.seed) for point in grid.points}
    found = report(grid, dict.fromkeys(given, "finished"), {}, given, [], find_baseline(grid, None))
    assert [point["value"] for point in found["curves"]["seed"][0]["points"]] == [1, 2]
    assert "there is one seed" in markdown(found)


def test_a_baseline_is_named_by_the_short_or_the_whole_key():
    grid = read_grid("quickstart", [f"{ALPHA}=0,0.5", "seed=1,2"])
    assert find_baseline(grid, "alpha=0.50") == find_baseline(grid, f"{ALPHA}=0.5") == {ALPHA: 0.5}
    with pytest.raises(RunError, match="names no setting"):
        find_baseline(grid, "seed=1")
