"""Students that write their own batches: with the weights of the right step, through kills, and on several ranks."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from deltakd.data.template import ChatTemplate
from deltakd.data.tokenizer import load_tokenizer
from deltakd.evaluate.generate import write_tokens
from deltakd.evaluate.settings import SamplingSettings
from deltakd.models.load import load_model
from deltakd.models.settings import ModelsSettings, WeightsSettings
from tests.run.running import ZERO_3, Running, curve, same_weights

STEPS = 12
WRITES = "rollouts={on_policy_fraction: 0.6, refresh_steps: 4, max_new_tokens: 12, batch_size: 4}"
SETTINGS = (f"train.steps={STEPS}", "objective.divergence={name: reverse_kl}", "train.schedule=constant", WRITES)


def test_what_is_trained_on_comes_of_the_weights_of_the_last_refresh(lab):
    """Greedily, so that a model which was kept can be asked again; the teacher's process is asked two batches ahead."""
    kept = ["checkpoints={every_steps: 1, keep_last: 20, models: true}", "teachers.look_ahead=2"]
    lab.train("greedy", *SETTINGS, "rollouts.on_policy_fraction=1", "rollouts.temperature=0", *kept)
    run = lab.folder / "runs" / "greedy"
    state = load_file(run / "checkpoints" / "step-00000005" / "rollouts.safetensors")
    assert sorted(set(state["steps"].tolist())) == [6, 7, 8]  # of four that the weights after step 4 have written
    settings = ModelsSettings(student=WeightsSettings(weights="x"), dtype="float32")
    model = load_model("student", run / "models" / "step-00000004", settings).eval()
    end_id = ChatTemplate(load_tokenizer(str(lab.folder / "student"))).end_of_turn_id
    lengths = state["lengths"].tolist()
    rows = zip(state["steps"].tolist(), state["tokens"].split(lengths), state["supervised"].split(lengths), strict=True)
    rows = [(tokens[~learnt].tolist(), tokens[learnt].tolist()) for step, tokens, learnt in rows if step == 8]
    asked = SamplingSettings(max_new_tokens=12, batch_size=4)
    again = write_tokens(model, [prompt for prompt, _ in rows], end_id, asked)
    assert len(rows) > 1 and again == [answer for _, answer in rows]


MINILLM = (
    "objective.policy_gradient={reward: {teacher: 1, student: -1}, reward_scale: 2, discount: 0.95, whiten: true, "
    "length_normalised: true, divergence_weight: 1}",
    "rollouts.teacher_mix=0.2",
    "rollouts.on_policy_fraction=1",
    "data.corpus={path: '{root}/../train.jsonl', tokens_per_step: 64}",
)
DISTILLM = (
    "objective.divergence={name: skew_kl}",
    "rollouts={adaptive: {raise_by: 0.2, tolerance: 0}, replay: {capacity: 12}, on_policy_fraction: 0.6}",
    "validation={every_steps: 2, num_rows: 4}",
)


@pytest.mark.parametrize("method", [(), MINILLM, DISTILLM], ids=["gkd", "minillm", "distillm"])
def test_a_killed_run_goes_on_bit_for_bit_in_the_middle_of_what_it_has_written(lab, method):
    name = {(): "gkd", MINILLM: "minillm", DISTILLM: "distillm"}[method]
    settings = (*SETTINGS, *method, "references.from=in_process")  # one process, which starts no other
    whole = curve(lab.train(f"on_policy_{name}", *settings))
    written = lab.lines(f"on_policy_{name}", "rollouts.jsonl")
    assert 1 <= len(written) <= 3 and any(line["tokens"] > 0 for line in written)
    running = Running(lab, f"on_policy_{name}_killed", *settings, "checkpoints.every_steps=1")
    running.reaches(6)
    running.is_sent(signal.SIGKILL, *[process.pid for process in running.family()])
    assert curve(lab.train(f"on_policy_{name}_killed", *settings)) == whole
    assert same_weights(lab, f"on_policy_{name}_killed", f"on_policy_{name}")
    assert [line["step"] for line in lab.lines(f"on_policy_{name}_killed", "rollouts.jsonl")] == [
        line["step"] for line in written
    ]


@pytest.mark.soak  # how ranks share the writing: tests/rollout; how they share a reward: tests/train
@pytest.mark.parametrize("method", [(), MINILLM, DISTILLM], ids=["gkd", "minillm", "distillm"])
def test_two_students_write_and_learn_what_one_does(lab, method):
    name = {(): "gkd", MINILLM: "minillm", DISTILLM: "distillm"}[method]
    one = curve(lab.train(f"{name}_one", *SETTINGS, *method, ZERO_3, ranks=2))
    two = curve(lab.train(f"{name}_two", *SETTINGS, *method, ZERO_3, ranks=3))
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-4, atol=1e-6)
