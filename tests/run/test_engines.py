"""Whoever shards the student, it is the same training: losses, gradients and weights, and where it goes on from."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.run.running import Running, curve

SETTINGS = ["train.steps=50", "train.learning_rate=1.0e-3", "train.weight_decay=0.1", "references.from=in_process"]


@pytest.fixture(scope="module")
def plain(lab):
    return curve(lab.train("engines_plain", *SETTINGS, "engine={name: single}"))


def weights_apart(lab, one, other) -> float:
    first, second = (load_file(lab.folder / "runs" / run / "export" / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


soak = pytest.mark.soak


@pytest.mark.parametrize(
    "engine,ranks",
    [
        ("{name: fsdp2}", 2),
        pytest.param("{name: deepspeed, zero_stage: 2, offload: optimizer}", 2, marks=soak),
        pytest.param("{name: fsdp2}", 1, marks=soak),
        pytest.param("{name: fsdp2, offload: all}", 2, marks=soak),
        pytest.param("{name: deepspeed, zero_stage: 1}", 2, marks=soak),
        pytest.param("{name: deepspeed, zero_stage: 3}", 2, marks=soak),
        pytest.param("{name: deepspeed, zero_stage: 3, offload: all}", 2, marks=soak),
    ],
)
def test_every_engine_trains_alike(lab, plain, engine, ranks):
    """50 steps in float32: losses within 1e-5, the first gradient within 1e-6, the weights with them."""
    name = "".join(letter for letter in engine if letter.isalnum()).lower() + f"_{ranks}"
    steps = curve(lab.train(name, *SETTINGS, f"engine={engine}", ranks=ranks))
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(plain), rtol=1e-5, atol=0)
    assert steps[0][3] == pytest.approx(plain[0][3], rel=1e-6)
    assert weights_apart(lab, name, "engines_plain") < 1e-5


@pytest.mark.parametrize("engine", ["{name: fsdp2}", pytest.param("{name: deepspeed, zero_stage: 1}", marks=soak)])
def test_a_killed_run_goes_on_bit_for_bit_and_on_another_number_of_ranks_within_1e_6(lab, engine):
    """On as many ranks first, up to a later kill; then on one."""
    letters = "".join(letter for letter in engine if letter.isalnum()).lower()
    settings = [*SETTINGS[1:], "train.steps=12", f"engine={engine}", "checkpoints.every_steps=5"]
    whole = lab.train(f"{letters}_whole", *settings, ranks=2)
    for ranks, step in ((2, 6), (2, 11)):
        killed = Running(lab, f"{letters}_killed", *settings, ranks=ranks)
        killed.reaches(step)
        assert curve(killed.lines("steps.jsonl")) == curve(whole)[: len(killed.lines("steps.jsonl"))]
        killed.is_sent(signal.SIGKILL, *[process.pid for process in killed.family()])
    ended = Running(lab, f"{letters}_killed", *settings, ranks=1).ends()
    torch.testing.assert_close(torch.tensor(ended), torch.tensor(curve(whole)), rtol=1e-6, atol=0)
    assert weights_apart(lab, f"{letters}_killed", f"{letters}_whole") < 1e-6
