"""Laws of targets, of tokens that a model rules out, of the remedies, of schedules, and what is refused."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from deltakd.base.errors import LossError, RecipeError
from deltakd.losses import objective
from deltakd.losses.divergences import DIVERGENCES
from deltakd.losses.points import mix
from deltakd.losses.schedules import TaidAlpha, alpha_over_steps
from deltakd.losses.settings import VARIANTS, ObjectiveSettings, TaidTarget, point_weights

FROZEN = ("teacher", "teacher_raw", "student_raw")
VOCAB = 23


def logits(seed: int, scale: float = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(9, VOCAB, generator=generator, dtype=torch.float64) for name in (*FROZEN, "student")
    }


def target(**block) -> Tensor:
    """The probabilities of a target on logits(6)."""
    settings = ObjectiveSettings(target=block).target
    weights, _ = point_weights(settings, settings.alpha if hasattr(settings, "alpha") else 0.0)
    return mix(weights, logits(6)).softmax(-1)


def test_delta_at_alpha_zero_is_the_teacher_bit_for_bit_and_needs_nothing_else():
    plain, delta = objective({"target": "teacher"}), objective({"target": {"name": "delta", "alpha": 0.0}})
    assert delta.needs == plain.needs == {"teacher"}
    assert torch.equal(delta.per_token(logits(5)), plain.per_token(logits(5)))


def test_the_anchors_agree_at_alpha_one_and_differ_elsewhere():
    ones = [target(name="delta", alpha=1.0, anchor=anchor) for anchor in ("teacher", "student")]
    halves = [target(name="delta", alpha=0.5, anchor=anchor) for anchor in ("teacher", "student")]
    torch.testing.assert_close(*ones, rtol=1e-12, atol=1e-12)
    assert (halves[0] - halves[1]).abs().max() > 0.1


def test_without_a_shift_the_target_is_the_raw_student():
    z = logits(7)
    z["teacher_raw"] = z["student"] = z["teacher"]
    raw = objective({"target": {"name": "mixture", "weights": {"student_raw": 1.0}}}).per_token(z)
    for block in ({"alpha": 1.0}, {"alpha": 0.3, "anchor": "student"}):
        torch.testing.assert_close(objective({"target": {"name": "delta", **block}}).per_token(z), raw)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_zero_with_zero_gradient_at_the_delta_point(name):
    """The parallelogram closes: a student that is the delta target is a minimum of all eight."""
    z = logits(8)
    z["student"] = (z["teacher"] + 0.4 * (z["student_raw"] - z["teacher_raw"])).requires_grad_()
    loss = objective({"target": {"name": "parallelogram", "variant": name, "alpha": 0.4}}).per_token(z).sum()
    (grad,) = torch.autograd.grad(loss, z["student"])
    assert abs(loss.item()) < 1e-12 and grad.abs().max() < 1e-12


def test_variant_one_is_delta_kd():
    delta = objective({"target": {"name": "delta", "alpha": 0.4}})
    assert torch.equal(
        objective({"target": {"name": "parallelogram", "variant": "v1", "alpha": 0.4}}).per_token(logits(9)),
        delta.per_token(logits(9)),
    )


@pytest.mark.parametrize("name", [name for name in VARIANTS if int(name[1]) % 2])
def test_the_gradient_of_forward_variants_is_bounded_by_the_student_s_weight(name):
    """At most sqrt(2) |q_student| / tau per token (docs/objectives.md), nearly reached far from the target."""
    z = {key: 40 * values for key, values in logits(10).items()}
    z["student"] = z["student"].requires_grad_()
    loss = objective({"target": {"name": "parallelogram", "variant": name, "alpha": 0.25}, "temperature": 2.0})
    (grad,) = torch.autograd.grad(loss.per_token(z).sum(), z["student"])
    bound = math.sqrt(2) * (4 if name in ("v5", "v7") else 1) / 2
    norms = grad.norm(dim=-1)
    assert (norms <= bound + 1e-9).all() and norms.max() > 0.9 * bound


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", ["teacher", "delta", "v3", "v5"])
def test_a_token_that_frozen_models_rule_out_leaves_the_loss_finite(name, divergence):
    block = {"name": name} if name in ("teacher", "delta") else {"name": "parallelogram", "vertex": "teacher"}
    if name == "v5":
        block["vertex"] = "student_raw"
    loss = objective({"target": block, "divergence": divergence})
    for ruled_out in itertools.chain.from_iterable(itertools.combinations(FROZEN, n) for n in (1, 2, 3)):
        z = logits(11)
        for model in ruled_out:
            z[model][:, 4] = -torch.inf
        z["student"] = z["student"].requires_grad_()
        value = loss.per_token(z)
        (grad,) = torch.autograd.grad(value.sum(), z["student"])
        assert torch.isfinite(value).all() and (value >= 0).all() and torch.isfinite(grad).all(), ruled_out


def test_the_student_pays_for_mass_on_a_token_that_the_teacher_rules_out_wherever_that_is_finite():
    """Forward KL is the plain sum over the teacher's tokens; reverse KL would be infinite and leaves the token out."""
    z = logits(12)
    z["teacher"][:, 4] = -torch.inf
    log_p, log_q = z["teacher"].log_softmax(-1), z["student"].log_softmax(-1)
    others = [token for token in range(VOCAB) if token != 4]
    plain = (log_p.exp()[:, others] * (log_p - log_q)[:, others]).sum(-1)
    torch.testing.assert_close(objective({}).per_token(z), plain)
    without = {name: values[:, others] for name, values in z.items()}
    reverse = objective({"divergence": "reverse_kl"})
    torch.testing.assert_close(reverse.per_token(z), reverse.per_token(without))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_support_is_the_divergence_on_the_target_s_nucleus_alone(divergence):
    z = {name: values[:1] for name, values in logits(13).items()}
    p = z["teacher"].softmax(-1)[0]
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.7).sum()) + 1]
    assert 1 < len(kept) < VOCAB
    z["student"] = z["student"].requires_grad_()
    inside = {name: values[:, kept] for name, values in z.items()}
    restricted = objective({"divergence": divergence, "support": {"top_p": 0.7}}).per_token(z)
    torch.testing.assert_close(restricted, objective({"divergence": divergence}).per_token(inside))
    ours = torch.autograd.grad(restricted.sum(), z["student"])[0]
    plain = torch.autograd.grad(objective({"divergence": divergence}).per_token(inside).sum(), z["student"])[0]
    torch.testing.assert_close(ours, plain)


def test_a_token_that_q_rules_out_leaves_both_points():
    z = logits(17)
    z["student_raw"][:, 4] = -torch.inf
    others = [token for token in range(VOCAB) if token != 4]
    for divergence in DIVERGENCES:
        loss = objective({"target": {"name": "parallelogram", "vertex": "teacher"}, "divergence": divergence})
        without = loss.per_token({name: values[:, others] for name, values in z.items()})
        torch.testing.assert_close(loss.per_token(z), without)


def test_rounding_never_makes_a_divergence_negative():
    z = {name: values.float() for name, values in logits(18).items()}
    z["student"] = z["teacher"] * (1 + 1e-7)
    for divergence in DIVERGENCES:
        assert (objective({"divergence": divergence}).per_token(z) >= 0).all()


def test_no_token_is_no_loss():
    z = {name: values[:0].requires_grad_() for name, values in logits(19).items()}
    assert objective({}).per_token(z).shape == (0,)


def test_support_of_all_mass_is_no_restriction():
    z = {name: 4 * values.repeat(1, 2000).float() for name, values in logits(20).items()}
    whole = objective({"support": {"top_p": 1.0}})
    assert torch.equal(whole.per_token(z), objective({}).per_token(z))


def test_a_clipped_log_ratio_bounds_the_gradient_of_reverse_kl_and_leaves_its_value():
    z = {"teacher": torch.tensor([[0.0, -200.0]], dtype=torch.float64), "student": torch.zeros(1, 2).double()}
    z["student"] = z["student"].requires_grad_()
    plain, clipped = (objective({"divergence": "reverse_kl", "log_ratio_clip": clip}) for clip in (None, 2.0))
    assert torch.equal(plain.per_token(z), clipped.per_token(z))
    grads = [torch.autograd.grad(loss.per_token(z).sum(), z["student"])[0].abs().max() for loss in (plain, clipped)]
    assert grads[0] > 40 and grads[1] <= 1
    # Both ends: the student puts much less on a token than the target does; and in symmetric_kl's share too.
    low = {"teacher": torch.tensor([[0.0, 0.0]]).double(), "student": torch.tensor([[0.0, -7.0]]).double()}
    q = low["student"].softmax(-1)[0, 1].item()
    for name, share in (("reverse_kl", 1.0), ("symmetric_kl", 0.5)):
        ratio = torch.tensor(
            [math.log(2 * (1 - q)), -2.0], dtype=torch.float64
        )  # log q/p, the second clipped from -6.3
        own = low["student"].clone().requires_grad_()
        loss = objective({"divergence": name, "log_ratio_clip": 2.0})
        (grad,) = torch.autograd.grad(loss.per_token(low | {"student": own}).sum(), own)
        reverse = q * (ratio[1] - ((1 - q) * ratio[0] + q * ratio[1]))
        assert grad[0, 1].item() == pytest.approx(share * reverse.item() + (1 - share) * (q - 0.5), rel=1e-9)
    near = logits(14, scale=0.01)  # nothing to clip: the same gradient
    near["student"] = near["student"].requires_grad_()
    same = [torch.autograd.grad(loss.per_token(near).sum(), near["student"])[0] for loss in (plain, clipped)]
    assert torch.equal(*same)


def test_alpha_moves_from_its_start_to_its_end_and_stays_there():
    block = {"name": "delta", "alpha": 1.0, "schedule": {"end": 0.0, "steps": 5}}
    line = alpha_over_steps(ObjectiveSettings(target=block).target, num_steps=100)
    assert [line.at(step) for step in (1, 2, 3, 4, 5, 6, 100)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    block["schedule"] |= {"shape": "cosine"}
    curve = alpha_over_steps(ObjectiveSettings(target=block).target, num_steps=100)
    assert curve.at(1) == 1.0 and curve.at(2) > 0.75 and curve.at(3) == pytest.approx(0.5) and curve.at(5) == 0.0
    whole = alpha_over_steps(ObjectiveSettings(target=block | {"schedule": {"end": 3.0}}).target, num_steps=11)
    assert whole.at(6) == 2.0 and whole.at(11) == 3.0


def test_an_objective_at_another_alpha_is_the_objective_of_that_alpha():
    moved = objective({"target": {"name": "delta", "alpha": 0.1, "schedule": {"end": 0.9}}}).at(0.6)
    there = objective({"target": {"name": "delta", "alpha": 0.6}})
    assert torch.equal(moved.per_token(logits(15)), there.per_token(logits(15)))
    assert objective({"target": {"name": "delta", "alpha": 0.0}}).at(0.5).needs == set(FROZEN)
    with pytest.raises(LossError, match="alpha: 0, by which vertex student_raw divides"):
        _ = objective({"target": {"name": "parallelogram", "vertex": "student_raw"}}).at(0.0).weights
    assert objective({"target": {"name": "delta", "alpha": 0.0, "schedule": {"end": 1.0}}}).needs == set(FROZEN)


def test_taid_rises_with_the_steps_and_faster_while_the_loss_falls():
    """Two steps worked by hand from the paper's update: change 0.5, momentum 0.005, rate 0.05 * sigmoid * (1 - t)."""
    alpha = TaidAlpha(TaidTarget(name="taid", rate=0.05), num_steps=10**9)
    assert alpha.at(1) == 0.4
    alpha.observe(2.0)
    alpha.observe(1.0)
    second = 0.4 + 0.05 / (1 + math.exp(-0.005)) * 0.6
    assert alpha.at(2) == pytest.approx(second, abs=1e-8)
    alpha.observe(0.75)
    third = second + 0.05 / (1 + math.exp(-(0.99 * 0.005 + 0.01 * 0.25))) * (1 - second)
    assert alpha.at(3) == pytest.approx(third, abs=1e-8)
    assert TaidTarget(name="taid").rate == 5e-4 and objective({"target": {"name": "taid", "start": 0.0}}).needs
    line = TaidAlpha(TaidTarget(name="taid", rate=0.0), num_steps=7)
    assert [round(line.at(step), 9) for step in range(1, 8)] == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


REFUSED = {
    "unknown target": ({"target": "detla"}, ["teacher", "delta", "mixture", "parallelogram", "taid"]),
    "unknown divergence": ({"divergence": "forward"}, sorted(DIVERGENCES)),
    "unknown variant": ({"target": {"name": "parallelogram", "variant": "v9"}}, sorted(VARIANTS)),
    "alpha 0 divides": (
        {"target": {"name": "parallelogram", "vertex": "teacher_raw", "alpha": 0.0}},
        ["divides by alpha"],
    ),
    "alpha through 0": (
        {"target": {"name": "parallelogram", "variant": "v5", "alpha": 0.5, "schedule": {"end": -0.5}}},
        ["divides by alpha"],
    ),
    "beta": ({"divergence": {"name": "jsd", "beta": 1.0}}, ["beta", "less than 1", "not 1.0"]),
    "lam": ({"divergence": {"name": "skew_kl", "lam": -0.1}}, ["lam", "greater than 0"]),
    "two directions": (
        {"target": {"name": "parallelogram", "variant": "v2"}, "divergence": "forward_kl"},
        ["direction is reverse", "reverse_kl"],
    ),
    "two vertices": ({"target": {"name": "parallelogram", "variant": "v2", "vertex": "teacher"}}, ["vertex student"]),
    "clip of nothing": ({"log_ratio_clip": 5.0}, ["log_ratio_clip", "forward_kl"]),
    "unknown key": ({"divergence": {"name": "skew_kl", "lambda": 0.1}}, ["objective.divergence.lambda", "lam."]),
    "a list for a name": ({"target": {"name": "parallelogram", "variant": ["v1"]}}, ["variant"]),
    "no mapping": ("delta", ["no mapping"]),
    "student in a mixture": ({"target": {"name": "mixture", "weights": {"student": 1.0}}}, ["student_raw"]),
    "mixture of nothing": ({"target": {"name": "mixture", "weights": {"teacher": 0.0}}}, ["every weight is 0"]),
    "taid downwards": ({"target": {"name": "taid", "end": 0.1}}, ["end is 0.1"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_block_that_cannot_hold_is_refused_with_what_is_known(case):
    block, words = REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        objective(block)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_logits_that_do_not_fit_are_refused():
    z = logits(16)
    with pytest.raises(LossError, match=r"labels: missing, but sft_weight is 0\.5"):
        objective({"sft_weight": 0.5}).per_token(z)
    with pytest.raises(LossError, match=r"student_raw: missing. The objective needs student_raw, teacher, teacher_raw"):
        objective({"target": "delta"}).per_token({name: z[name] for name in ("student", "teacher", "teacher_raw")})
    with pytest.raises(LossError, match=r"teacher: logits \[9, 20\], student \[9, 23\]"):
        objective({}).per_token({"student": z["student"], "teacher": z["teacher"][:, :20]})
    with pytest.raises(LossError, match=r"student: logits \[n, V\] are missing"):
        objective({}).per_token({"teacher": z["teacher"]})
    with pytest.raises(LossError, match=r"labels: -1 to"):
        objective({"sft_weight": 0.5}).per_token(z, torch.full((9,), -1))
    z["teacher"][3, 3] = torch.nan
    with pytest.raises(LossError, match=r"teacher: 1 of 207 logits are NaN or \+inf"):
        objective({}).per_token(z)
