"""Whoever shards the student, it is the same training: losses, gradients and weights, and where it goes on from."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.run.running import Running, curve, same_weights

SETTINGS = ["train.learning_rate=1.0e-3", "train.weight_decay=0.1", "train.schedule=constant"]
SETTINGS += ["references.from=in_process"]
LORA = "models.lora={rank: 4, alpha: 16}"


@pytest.fixture(scope="module")
def plain(lab):
    def train(steps: int) -> list[list[float]]:
        if not (lab.folder / "runs" / f"engines_plain_{steps}").exists():
            lab.train(f"engines_plain_{steps}", *SETTINGS, f"train.steps={steps}")
        return curve(lab.lines(f"engines_plain_{steps}", "steps.jsonl"))

    return train


def letters(engine: str) -> str:
    return "".join(letter for letter in engine if letter.isalnum()).lower()


def weights_apart(lab, one, other) -> float:
    first, second = (load_file(lab.folder / "runs" / run / "export" / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


soak = pytest.mark.soak


@pytest.mark.parametrize(
    "engine,ranks,steps",
    [
        ("{name: fsdp2}", 2, 10),
        *(
            pytest.param(engine, ranks, 50, marks=soak)
            for engine, ranks in [
                ("{name: fsdp2}", 2),
                ("{name: fsdp2}", 1),
                ("{name: fsdp2, offload: all}", 2),
                ("{name: deepspeed, zero_stage: 1}", 2),
                ("{name: deepspeed, zero_stage: 2, offload: optimizer}", 2),
                ("{name: deepspeed, zero_stage: 3}", 2),
                ("{name: deepspeed, zero_stage: 3, offload: all}", 2),
            ]
        ),
    ],
)
def test_every_engine_trains_alike(lab, plain, engine, ranks, steps):
    """In float32: losses within 1e-5, the first gradient within 1e-6, the weights with them. make soak: 50 steps."""
    expected, name = plain(steps), f"{letters(engine)}_{ranks}_{steps}"
    launcher = "torchrun" if "fsdp2" in engine else "deepspeed"
    own = [*SETTINGS, f"train.steps={steps}", f"engine={engine}"]
    mine = curve(lab.train(name, *own, ranks=ranks, launcher=launcher))
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(expected), rtol=1e-5, atol=0)
    assert mine[0][3] == pytest.approx(expected[0][3], rel=1e-6)
    assert weights_apart(lab, name, f"engines_plain_{steps}") < 1e-5


@pytest.mark.parametrize(
    "engine,kills",
    [
        ("{name: fsdp2}", [6]),
        pytest.param("{name: fsdp2}", [6, 11], marks=soak),
        pytest.param("{name: deepspeed, zero_stage: 1}", [6, 11], marks=soak),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit_and_on_another_number_of_ranks_within_1e_6(lab, engine, kills):
    """On as many ranks first, up to a later kill; then on one. The whole one validates: it changes no bit."""
    name = f"{letters(engine)}_{len(kills)}_kills"
    settings = [*SETTINGS, "train.steps=12", f"engine={engine}", "checkpoints.every_steps=5"]
    whole = lab.train(f"{name}_whole", *settings, "validation={every_steps: 3, answers_every: 1}", ranks=2)
    for step in kills:
        killed = Running(lab, name, *settings, ranks=2)
        killed.reaches(step)
        assert curve(killed.lines("steps.jsonl")) == curve(whole)[: len(killed.lines("steps.jsonl"))]
        killed.is_sent(signal.SIGKILL, *[process.pid for process in killed.family()])
    ended = Running(lab, name, *settings, ranks=1).ends()
    torch.testing.assert_close(torch.tensor(ended), torch.tensor(curve(whole)), rtol=1e-6, atol=0)
    assert weights_apart(lab, name, f"{name}_whole") < 1e-6


@pytest.mark.parametrize(
    "engine,ranks",
    [
        ("{name: single}", None),
        *(
            pytest.param(engine, 2, marks=soak)
            for engine in ("{name: fsdp2}", "{name: deepspeed, zero_stage: 1}", "{name: deepspeed, zero_stage: 3}")
        ),
    ],
)
def test_adapters_train_alike_and_go_on_from_a_checkpoint_that_holds_nothing_else(lab, engine, ranks):
    """Two runs, one of which is stopped half-way; both beside plain torch. A rate that moves the merged weights."""
    settings = [*SETTINGS, LORA, "train.learning_rate=1.0e-2"]
    expected = curve(lab.train("lora_plain", *settings, "train.steps=10"))
    name, own = f"lora_{letters(engine)}", [*settings, f"engine={engine}", "checkpoints.every_steps=5"]
    whole = curve(lab.train(f"{name}_whole", *own, "train.steps=10", ranks=ranks))
    lab.train(name, *own, "train.steps=5", ranks=ranks)
    mine = curve(lab.train(name, *own, "train.steps=10", ranks=ranks))
    assert mine == whole and same_weights(lab, name, f"{name}_whole")
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(expected), rtol=1e-5, atol=0)
    assert weights_apart(lab, name, "lora_plain") < 1e-5
    run = lab.folder / "runs" / name
    before, after = (load_file(f / "model.safetensors") for f in (lab.folder / "student", run / "export"))
    moved = {key for key in before if not before[key].equal(after[key])}
    assert moved and all("proj.weight" in key for key in moved)
    if ranks:
        mine = curve(lab.train(name, *own, "train.steps=12", ranks=1))
        expected = curve(lab.train("lora_plain_12", *settings, "train.steps=12"))
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(expected), rtol=1e-5, atol=0)
    else:
        saved = load_file(run / "checkpoints" / "step-00000010" / "engine" / "weights.safetensors")
        assert saved and all(".lora_" in key for key in saved)
