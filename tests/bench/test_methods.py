"""bench methods: what it trains follows from the recipes, its table from the rows, and nothing is done twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from deltakd.__main__ import main
from deltakd.base.errors import DataError, RunError
from deltakd.bench.method_plan import Base, default_methods, plan, read_method
from deltakd.bench.method_table import Measured, markdown, summarise
from deltakd.evaluate.compare import CROSS_ENTROPY, KEPT, KL_TO_TEACHER, ModelScores
from deltakd.recipe import pipeline
from deltakd.recipe.load import load_recipe
from deltakd.recipe.stages import stages_behind

RECIPES = Path(__file__).parents[2] / "recipes"
SHARED = ("models", "train", "references", "engine", "seed", "root")


def base_of(name: str, *own: str) -> Base:
    return Base(name, [], own, Path("runs") / name)


def test_the_methods_are_those_of_the_pipelines_and_every_baseline_there_is():
    baselines = sorted(path.stem for path in (RECIPES / "baselines").glob("*.yaml"))
    assert default_methods() == ["sft", "forward_kl", "delta", *baselines] and {"gkd", "seqkd"} <= set(baselines)


@pytest.mark.parametrize("name", ["quickstart", "small_chat", "small_math"])
def test_every_method_fits_on_every_base_and_shares_its_models_its_batches_and_its_number_of_steps(name):
    runs = plan(base_of(name), default_methods(), [5, 6], 70, "single")
    assert [run.seed for run in runs] == [5] * (len(runs) // 2) + [6] * (len(runs) // 2)
    assert len({run.recipe.directory for run in runs}) == len(runs)
    by_label = {run.label: run for run in runs}
    sft = by_label["sft_seed5"].recipe
    for run in runs:
        recipe = run.recipe
        assert recipe.directory == f"runs/{name}/{run.method.name}_seed{run.seed}"
        assert (recipe.train.steps, recipe.seed, recipe.engine.name) == (70, run.seed, "single"), run.label
        assert recipe.references.source == "in_process" and recipe.pipeline == []
        assert recipe.train.tokens_per_step == sft.train.tokens_per_step, run.label
        if run.method.generate is None:
            assert recipe.data.model_copy(update={"corpus": None}) == sft.data, run.label
    assert sft.objective.sft_weight == 1 and by_label["delta_seed5"].recipe.objective.target.name == "delta"
    assert by_label["gkd_seed6"].recipe.objective == load_recipe("baselines/gkd").objective


@pytest.mark.parametrize("name", ["quickstart", "small_chat", "small_math"])
def test_seqkd_learns_responses_to_the_prompts_of_the_base(name):
    base = base_of(name, "generation.num_prompts=9")
    (run,) = plan(base, ["seqkd"], [1], None, "single")
    asked = load_recipe(name, run.method.generate)
    (stage,) = asked.pipeline
    assert stage.name == run.method.responses == "responses" and stage.generate.rows is None
    assert asked.data == base.load().recipe.data
    assert (asked.generation.num_prompts, asked.generation.batch_size) == (9, 64)
    learnt = run.recipe.data
    assert learnt.train.path == f"runs/{name}/responses/responses.jsonl" and learnt.format == "messages"
    assert (learnt.train.skip_rows, learnt.train.num_rows) == (0, None)
    assert run.recipe.train.steps == base.load().recipe.train.steps


@pytest.mark.parametrize(
    "name,path,num_rows",
    [("quickstart", "runs/quickstart/world/raw_train.jsonl", None), ("small_chat", "chat_train.jsonl.gz", 20_000)],
)
def test_plain_text_beside_a_method_s_steps_is_what_the_base_s_raw_student_has_read(name, path, num_rows):
    (run,) = plan(base_of(name), ["minillm"], [1], None, "single")
    corpus = run.recipe.data.corpus
    assert (corpus.path, corpus.skip_rows, corpus.num_rows, corpus.weight) == (path, 0, num_rows, 1.0)


def test_of_a_base_s_pipeline_only_what_the_methods_read_is_made():
    base = base_of("quickstart")
    methods = [run.recipe for run in plan(base, default_methods(), [1], None, "single")]
    shared = ["world", "tokenizer", "teacher_new", "student_new", "teacher_raw", "student_raw", "teacher"]
    assert stages_behind("quickstart", base.overrides, methods) == shared
    from_sft = load_recipe("quickstart", [*base.overrides, 'models.student.weights="{root}/sft/export"'])
    assert stages_behind("quickstart", base.overrides, [*methods, from_sft]) == [*shared, "sft"]


def test_the_user_s_settings_win_over_a_method_s():
    (run,) = plan(base_of("quickstart", "rollouts.refresh_steps=3"), ["gkd"], [1], None, "deepspeed")
    assert run.recipe.rollouts.refresh_steps == 3 and run.recipe.rollouts.on_policy_fraction == 0.5
    assert run.recipe.engine.zero_stage == 3 and run.recipe.references.source == "service"


def test_a_method_that_nobody_knows_is_refused():
    with pytest.raises(RunError, match="--methods: gdk is no training stage of quickstart and no recipe of"):
        read_method(base_of("quickstart"), "gdk")


def measured(seed: int, shift: float, wall_s: float | None = 30.0) -> Measured:
    """Rows that differ from those of no shift by it, a tenth more or less by prompt and by seed."""
    rng = np.random.default_rng(0)
    prompts, own = rng.normal(size=40), 0.1 * shift * (seed - 2)
    by_prompt = shift * (1 + 0.1 * rng.normal(size=40))
    rows = {name: list(0.5 + 0.01 * prompts + by_prompt + own) for name in ("rouge1", "rougeL")}
    rows |= {CROSS_ENTROPY: list(1 + prompts - by_prompt - own), KL_TO_TEACHER: list(2 + prompts)}
    rows[f"{KEPT}text"] = [1.0, 2.0, 3.0]
    return Measured(seed, ModelScores(f"m_seed{seed}", "folder", "id", rows, 4), 9.0 * seed, 1.0 * seed, wall_s, "abc")


def test_the_table_has_means_over_seeds_and_prompts_and_paired_differences_to_sft():
    methods = {
        "sft": [measured(seed, 0.0) for seed in (1, 2, 3)],
        "delta": [measured(seed, 0.2, None if seed == 3 else 7.0 + seed) for seed in (1, 2, 3)],
    }
    summary = summarise(methods, "sft", 2000, 0)
    difference = summary["delta"]["difference"]
    assert difference[CROSS_ENTROPY]["mean"] == pytest.approx(-0.2, abs=0.01)
    assert difference[CROSS_ENTROPY]["low"] < -0.205 and difference[CROSS_ENTROPY]["high"] > -0.195
    assert difference[CROSS_ENTROPY]["high"] < 0 < difference["rouge1"]["low"]  # prompts' own noise cancels in pairs
    assert difference[KL_TO_TEACHER] == {"mean": 0, "low": 0, "high": 0} and summary["sft"]["difference"] == {}
    assert list(summary["delta"]["seeds"]) == ["1", "2", "3"] and summary["delta"]["seeds"]["3"]["wall_s"] is None
    assert (summary["delta"]["training_s"], summary["delta"]["wall_s"]) == (20, 8.5)

    table = markdown(summary, [methods["sft"][0].scores], "sft").splitlines()
    assert table[0] == (
        "| method | ROUGE-1 | ROUGE-L | cross-entropy | KL to teacher | kept: text | training, s | whole process, s |"
    )
    assert table[2].startswith("| m_seed1 | ") and table[2].endswith(" | 2.000 | - | - |")
    assert table[3].startswith("| sft | ") and "(" not in table[3] and table[3].endswith(" | 20.0 | 30.0 |")
    assert table[4].count("(") == 5 and table[4].endswith(" | 2.000 (+0.000 [+0.000, +0.000]) | 20.0 | 8.5 |")
    assert "seeds 1, 2, 3" in table[-1] and "both resampled" in table[-1]
    assert "there is one seed" in markdown(summarise({"sft": methods["sft"][:1]}, "sft", 10, 0), [], "sft")


def test_methods_of_different_seeds_are_not_held_against_each_other():
    with pytest.raises(DataError, match="same seeds and prompts"):
        summarise({"sft": [measured(1, 0.0)], "delta": [measured(1, 0.1), measured(2, 0.1)]}, "sft", 10, 0)


@pytest.fixture(scope="module")
def command(lab, tmp_path_factory):
    """The command on models of a few thousand parameters that are there already."""
    folder = tmp_path_factory.mktemp("methods")
    trained = {"sft": {"objective": {"sft_weight": 1.0}}, "delta": {}}
    recipe = {"extends": str(lab.recipe), "pipeline": [{"name": name, "train": one} for name, one in trained.items()]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    few = ["--methods=sft,delta", "--steps=2", f"--root={folder}", f"--out={folder}/out.json"]
    return folder, ["bench", "methods", f"--bases={folder}/tiny.yaml", *few, "evaluation.num_prompts=4"]


@pytest.mark.soak
def test_the_command_trains_scores_and_writes_and_does_nothing_twice(command, capsys, monkeypatch):
    folder, words = command
    assert main([*words, "--seeds=3", "--jobs=2"]) == 0, capsys.readouterr().err
    report = json.loads((folder / "out.json").read_text())
    (base,) = report["bases"].values()
    assert list(base["methods"]) == ["sft", "delta"] and base["steps"] == 2 and report["settings"]["seeds"] == [3]
    for name, one in base["methods"].items():
        assert one["kl_to_teacher"] > 0 and 0 < one["training_s"] < one["wall_s"], name
        assert one["seeds"]["3"]["kl_to_teacher"] == one["kl_to_teacher"]
        steps = (folder / "tiny" / f"{name}_seed3" / "steps.jsonl").read_text().splitlines()
        assert len(steps) == 2 and (folder / "tiny" / "methods" / "predictions" / f"{name}_seed3.parquet").exists()
    assert base["frozen"]["teacher"]["kl_to_teacher"] == pytest.approx(0, abs=1e-5)
    table = (folder / "out.md").read_text()
    assert "| sft | " in table and "| delta | " in table and table in capsys.readouterr().out

    monkeypatch.setattr(pipeline.sys, "executable", "/bin/false")  # nothing can be started now
    assert main([*words, "--seeds=3"]) == 0
    assert (folder / "out.md").read_text().splitlines()[4:] == table.splitlines()[4:]
    capsys.readouterr()
    assert main([*words, "--seeds=3,4"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 4 runs failed: " in said and f"its log is {folder}/tiny/sft_seed4/log.txt." in said


@pytest.mark.parametrize(
    "words, said",
    [
        (["--methods=delta"], "--methods: sft is missing"),
        (["--seeds=1,1"], "--seeds: 1,1 has one of them twice"),
        (["--seeds=one"], "--seeds: one are no whole numbers"),
        (["--out=table.md"], "--out: table.md does not end in .json"),
        (["root=elsewhere"], "bench methods sets root itself"),
        (["--bases=small_chat"], "--chat-data: missing, but small_chat needs rows"),
        (["--bases=small_math", "--math-data=nowhere.jsonl"], "--math-data: nowhere.jsonl does not exist"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_made(words, said, capsys):
    assert main(["bench", "methods", "--root=nowhere", *words]) == 2
    assert said in capsys.readouterr().err and not Path("nowhere").exists()
