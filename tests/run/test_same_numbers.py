"""Two ways to the same numbers, through the launchers that users type, with real processes, sockets and ZeRO-3."""

import json

import pytest
from safetensors.torch import load_file

from tests.run.running import ZERO_3, curve, same_weights

IN_PROCESS = "references.from=in_process"  # the same numbers, as the first test says, and one process less


@pytest.fixture(scope="module")
def delta(lab):
    return lab.train("delta")


@pytest.fixture(scope="module")
def forward_kl(lab):
    return lab.train("forward_kl", "objective.target={name: teacher}")


def test_the_service_equals_references_in_process_bit_for_bit(lab, delta, forward_kl):
    assert curve(lab.train("delta_in_process", IN_PROCESS)) == curve(delta)
    assert curve(lab.train("fkl_in_process", IN_PROCESS, "objective.target={name: teacher}")) == curve(forward_kl)
    assert same_weights(lab, "delta", "delta_in_process") and same_weights(lab, "forward_kl", "fkl_in_process")
    assert not same_weights(lab, "delta", "forward_kl")


def test_whole_logits_give_the_curve_of_hidden_states_within_their_16_bits(lab, delta):
    """The exact payload of one run, float32 logits, against float16 hidden states, through the service both."""
    steps = lab.train("logits", "references.payload=logits", "references.dtype=float32")
    assert curve(steps) != curve(delta)
    for mine, theirs in zip(curve(steps), curve(delta), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-2)
    student = next(line for line in lab.lines("logits", "processes.jsonl") if line["role"] == "student")
    assert student["heads"] == []


@pytest.mark.parametrize(
    "engine",
    ["engine={name: single}", *(pytest.param(one, marks=pytest.mark.soak) for one in (ZERO_3, "engine={name: fsdp2}"))],
)
def test_bfloat16_and_checkpointed_activations_stay_near_the_float32_curve(lab, delta, engine):
    """bf16 weights keep 8 bits, and these models are loud: 25% on a gradient norm is rounding, a factor of 2 is not."""
    overrides = ["models.dtype=bfloat16", "train.gradient_checkpointing=true", "train.steps=2", IN_PROCESS]
    steps = lab.train(f"bf16_{len(engine)}", *overrides, engine)
    for mine, theirs in zip(curve(steps), curve(delta)[:2], strict=True):
        assert mine == pytest.approx(theirs, rel=0.25)


def test_delta_at_alpha_zero_equals_forward_kl_bit_for_bit(lab, forward_kl):
    assert curve(lab.train("alpha_zero", "objective.target.alpha=0", IN_PROCESS)) == curve(forward_kl)


def test_a_teacher_in_two_halves_is_the_teacher_bit_for_bit(lab, forward_kl):
    """A mixture of two teachers by name, which are one: half of each, summed before one product with their one head."""
    steps = lab.train(
        "halves",
        f"models.teachers={{same: {{weights: {lab.folder}/teacher}}}}",
        "objective.target={name: mixture, weights: {teacher: 0.5, teacher.same: 0.5}}",
        IN_PROCESS,
    )
    assert curve(steps) == curve(forward_kl)


def test_a_scheduled_alpha_starts_as_its_start_and_stands_in_every_record(lab, delta):
    steps = lab.train("moving", "objective.target.schedule={end: 1.0, steps: 3}", IN_PROCESS)
    assert [step["alpha"] for step in steps] == [0.5, 0.75, 1.0, 1.0, 1.0]
    assert curve(steps)[0] == curve(delta)[0] and curve(steps)[1] != curve(delta)[1]
    assert {step["alpha"] for step in delta} == {0.5}


def test_without_a_shift_delta_at_alpha_one_starts_at_its_target(lab, delta):
    """teacher = teacher_raw: the target is the raw student, which is where the student starts."""
    steps = lab.train(
        "no_shift",
        "objective.target.alpha=1.0",
        f"models.teacher.weights={lab.folder}/teacher_raw",
        "train.steps=2",
        IN_PROCESS,
    )
    # The same payload with weights +1 and -1 cancels to a float32 rounding; that of the raw student is fp16.
    assert abs(steps[0]["divergence"]) < 1e-5 < 1e-1 < delta[0]["divergence"]


@pytest.mark.parametrize(
    "ranks,layout,examples", [(3, "padded", 1), pytest.param(3, "packed", 4, marks=pytest.mark.soak)]
)
def test_ranks_micro_batches_and_layout_leave_the_loss_curve_alone(lab, delta, ranks, layout, examples):
    """Two students and a teacher rank against one student. Same tokens, other sums: fp32 rounding only."""
    steps = lab.train(
        f"ranks{ranks}_{layout}{examples}",
        f"data.layout={layout}",
        f"train.examples_per_micro_batch={examples}",
        ZERO_3,
        ranks=ranks,
    )
    assert [step["num_tokens"] for step in steps] == [step["num_tokens"] for step in delta]
    assert steps[0]["num_micro_batches"] > delta[0]["num_micro_batches"] or examples == 4
    for mine, theirs in zip(curve(steps), curve(delta), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)


def test_zero_3_equals_plain_torch(lab, delta):
    """Started as a user starts it, by deepspeed's launcher."""
    steps = lab.train("zero_3", ZERO_3, ranks=1, launcher="deepspeed")
    for mine, theirs in zip(curve(steps), curve(delta), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)


def test_the_run_directory_tells_the_whole_run(lab, delta):
    run = lab.folder / "runs" / "delta"
    assert {"recipe.yaml", "run.json", "processes.jsonl", "steps.jsonl", "export", "finished.json"} <= {
        path.name for path in run.iterdir()
    }
    assert json.loads((run / "run.json").read_text())["seed"] == 17
    by_role = {line["role"]: line for line in lab.lines("delta", "processes.jsonl")}
    assert by_role["teacher"]["models"] == ["student_raw", "teacher", "teacher_raw"]
    assert by_role["student"]["models"] == ["student"] and by_role["student"]["heads"] == by_role["teacher"]["models"]
    assert by_role["student"]["pid"] != by_role["teacher"]["pid"]


def test_a_student_with_a_larger_head_than_its_teachers_trains_on_what_they_share_and_keeps_its_own_size(lab):
    """As the other way round: rows above the smallest head take no part. A repeated row is held out, and counted."""
    from deltakd.models.new import write_new_model
    from deltakd.models.settings import NewModelSettings

    shape = {"num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 64, "hidden_size": 32}
    tokenizer = str(lab.folder / "tokenizer")
    write_new_model(NewModelSettings(tokenizer=tokenizer, head_rows=333, **shape), lab.folder / "wide")
    seen = (lab.folder / "train.jsonl").read_text().splitlines()[0]
    (lab.folder / "held_out.jsonl").write_text(seen + "\n")
    overrides = [f"models.student.weights={lab.folder}/wide", f"data.validation.path={lab.folder}/held_out.jsonl"]
    overrides += [IN_PROCESS, "references.dtype=float32"]
    curves = [
        curve(lab.train(f"wide_{payload}", *overrides, f"references.payload={payload}"))
        for payload in ("hidden", "logits")
    ]
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    run = lab.folder / "runs" / "wide_hidden"
    assert load_file(run / "export" / "model.safetensors")["model.embed_tokens.weight"].shape[0] == 333
    assert json.loads((run / "run.json").read_text())["data"]["dropped_in_validation"] >= 1


def test_the_export_is_a_folder_that_transformers_loads(lab, delta):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = lab.folder / "runs" / "delta" / "export"
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(folder).chat_template
