"""The step and the schedule, with a real engine on a model made on the spot."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltakd.base.errors import RunError
from deltakd.base.ranks import SoloWorld
from deltakd.data.examples import Example
from deltakd.data.packing import pack
from deltakd.engine.protocol import Optimizer, StudentModule
from deltakd.engine.single import SingleEngine
from deltakd.losses import objective
from deltakd.losses.schedules import ScheduledAlpha
from deltakd.models.load import load_model
from deltakd.models.settings import ModelsSettings, WeightsSettings
from deltakd.teacher.references import NoReferences
from deltakd.train.schedule import schedule
from deltakd.train.settings import TrainSettings
from deltakd.train.step import train_step

SETTINGS = {"steps": 20, "tokens_per_step": 64, "tokens_per_micro_batch": 64, "learning_rate": 0.5}


def make_engine(lab, dtype="float32") -> SingleEngine:
    settings = ModelsSettings(student=WeightsSettings(weights="x"), dtype=dtype)
    model = load_model("student", lab.folder / "student", settings)
    module = StudentModule(model, objective({"sft_weight": 1.0}), "packed", 300)
    return SingleEngine(module, Optimizer(0.1, (0.9, 0.95), 0.0, 1.0), "cpu")


@pytest.fixture
def engine(lab):
    return make_engine(lab)


def batch():
    tokens = torch.randint(0, 300, (12,), generator=torch.Generator().manual_seed(1))
    return pack([Example(tokens.int().numpy(), (torch.arange(12) > 4).numpy())])


def step(engine, number, batches):
    still = ScheduledAlpha(0.0, None, 1)
    return train_step(
        engine,
        SoloWorld(),
        lambda _: 0.01,
        still,
        batches,
        NoReferences().ahead([(batch, 0.5) for batch in batches]),
        number,
    )


def test_a_step_learns_and_its_record_adds_up(engine):
    records = [step(engine, number, [batch(), batch()]) for number in range(1, 6)]
    assert records[-1].loss < records[0].loss == records[0].cross_entropy
    assert records[0].num_tokens == 24 and records[0].num_supervised == 14 and records[0].num_micro_batches == 2
    spent = records[0].wait_s + records[0].forward_backward_s + records[0].update_s
    assert spent == pytest.approx(records[0].step_s, rel=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(engine):
    weight = engine._module.model.get_output_embeddings().weight
    with torch.no_grad():
        weight[7] = math.nan
    before = [parameter.clone() for parameter in engine._module.parameters()]
    with pytest.raises(RunError, match=r"step 4: loss nan, gradient norm nan; the weights were not updated"):
        step(engine, 4, [batch()])
    assert all(
        torch.equal(old.nan_to_num(9), new.nan_to_num(9))
        for old, new in zip(before, engine._module.parameters(), strict=True)
    )


def test_a_gradient_above_the_limit_is_clipped_and_its_norm_is_told_unclipped(engine):
    """AdamW's first moment after one step is 0.1 times the gradient that it was given."""
    norm = step(engine, 1, [batch()]).grad_norm
    moments = [state["exp_avg"].square().sum() for state in engine._adamw.state.values()]
    assert norm > 2.0
    assert float(sum(moments)) ** 0.5 == pytest.approx(0.1 * 1.0, rel=1e-4)


def test_a_step_of_many_micro_batches_is_the_step_of_one(lab):
    """Two steps each, so that a gradient that is not cleared, not added or weighted twice shows in the weights."""
    tokens = torch.randint(0, 300, (4, 12), generator=torch.Generator().manual_seed(2))
    examples = [Example(row.int().numpy(), (torch.arange(12) > 3 + 2 * i).numpy()) for i, row in enumerate(tokens)]
    results = []
    for cut in ([examples], [examples[:1], examples[1:]], [[example] for example in examples]):
        one = make_engine(lab)
        for number in (1, 2):
            step(one, number, [pack(part) for part in cut])
        results.append([parameter.detach().clone() for parameter in one._module.parameters()])
    for other in results[1:]:
        for mine, whole in zip(other, results[0], strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)


@given(warmup=st.integers(0, 19), floor=st.floats(0, 1), kind=st.sampled_from(["cosine", "linear", "constant"]))
def test_the_rate_rises_to_its_peak_then_never_rises_and_ends_at_its_floor(warmup, floor, kind):
    settings = TrainSettings(**SETTINGS, warmup_steps=warmup, schedule=kind, min_learning_rate_ratio=floor)
    rates = [schedule(settings)(number) for number in range(1, 21)]
    peak = max(1, warmup) - 1
    assert all(a <= b + 1e-12 for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[peak:]))
    assert max(rates) <= 0.5 + 1e-12
    assert rates[-1] == pytest.approx(0.5 if kind == "constant" else 0.5 * floor)
    if warmup:
        assert rates[0] == pytest.approx(0.5 / warmup)
    elif kind == "linear":
        assert all(a - b == pytest.approx(rates[0] - rates[1]) for a, b in pairwise(rates))


def test_weights_in_16_bit_have_masters_that_take_steps_too_small_for_16_bit(lab):
    """Of 2e-4 on weights around 1, of which bfloat16 tells those apart that differ by 8e-3."""
    moved = {}
    for dtype in ("float32", "bfloat16"):
        engine = make_engine(lab, dtype)
        norm = engine._module.model.get_decoder().norm.weight
        for _ in range(60):
            engine.backward(norm.float().sum(), weight=1.0, last=True)
            engine.update(2e-4, 1e-3)
        moved[dtype] = float(norm.detach().float().mean()) - 1
    assert moved["float32"] == pytest.approx(-60 * 2e-4, rel=1e-3)
    assert moved["bfloat16"] == pytest.approx(moved["float32"], abs=2**-8)
