"""The chunked loss against plain float64 autograd over whole [N, V] logits: value and both gradients."""

import pytest
import torch
from torch import Tensor

from deltakd.base.errors import LossError
from deltakd.losses import TopK, linear_loss, objective
from deltakd.losses.divergences import DIVERGENCES
from deltakd.losses.settings import VARIANTS

NUM_TOKENS, HIDDEN, VOCAB = 50, 16, 97
FROZEN = ("teacher", "teacher_raw", "student_raw", "teacher.math")
TARGETS = {
    "teacher": {"name": "teacher"},
    "delta": {"name": "delta", "alpha": 0.5},
    "delta at the student": {"name": "delta", "alpha": -0.7, "anchor": "student"},
    "mixture": {"name": "mixture", "weights": {"teacher": 0.6, "teacher.math": 1.3, "teacher_raw": -0.9}},
    "taid": {"name": "taid", "start": 0.3},
} | {name: {"name": "parallelogram", "variant": name, "alpha": 0.7} for name in VARIANTS}
# Written out from docs/objectives.md, by hand: the weights of both points, the student's own in P held fixed.
DELTA = {"teacher": 1, "student_raw": 0.7, "teacher_raw": -0.7}
POINTS = {
    "teacher": ({"teacher": 1}, {"student": 1}),
    "delta": ({"teacher": 1, "student_raw": 0.5, "teacher_raw": -0.5}, {"student": 1}),
    "delta at the student": ({"student_raw": 1, "teacher": -0.7, "teacher_raw": 0.7}, {"student": 1}),
    "mixture": ({"teacher": 0.6, "teacher.math": 1.3, "teacher_raw": -0.9}, {"student": 1}),
    "taid": ({"student": 0.7, "teacher": 0.3}, {"student": 1}),
    "v1": (DELTA, {"student": 1}),
    "v2": (DELTA, {"student": 1}),
    "v3": ({"teacher": 1}, {"student": 1, "student_raw": -0.7, "teacher_raw": 0.7}),
    "v4": ({"teacher": 1}, {"student": 1, "student_raw": -0.7, "teacher_raw": 0.7}),
    "v5": ({"student_raw": 1}, {"teacher_raw": 1, "student": 1 / 0.7, "teacher": -1 / 0.7}),
    "v6": ({"student_raw": 1}, {"teacher_raw": 1, "student": 1 / 0.7, "teacher": -1 / 0.7}),
    "v7": ({"teacher_raw": 1}, {"student_raw": 1, "teacher": 1 / 0.7, "student": -1 / 0.7}),
    "v8": ({"teacher_raw": 1}, {"student_raw": 1, "teacher": 1 / 0.7, "student": -1 / 0.7}),
}


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


# No default, and nothing that stays itself under 1 - x: a parameter on the wrong side would show.
PARAMETERS = {
    "jsd": {"beta": 0.3},
    "skew_kl": {"lam": 0.2},
    "skew_reverse_kl": {"lam": 0.2},
    "symmetric_kl": {"weight": 0.3},
    "adaptive_kl": {"mu": 0.3},
}


def plain_divergence(name: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The definitions at PARAMETERS, written with autograd in mind and nothing else."""
    p, q = log_p.exp(), log_q.exp()

    def adaptive() -> Tensor:
        ascending, order = p.detach().sort(-1)
        tail = torch.zeros_like(p).scatter_(-1, order, (ascending.cumsum(-1) <= 1 - 0.3).double())
        gap = (p - q).abs().detach()
        head_gap, tail_gap = (gap * (1 - tail)).sum(-1), (gap * tail).sum(-1)
        share = head_gap / (head_gap + tail_gap)
        return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)

    return {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "jsd": lambda: 0.3 * kl(log_p, (0.3 * p + 0.7 * q).log()) + 0.7 * kl(log_q, (0.3 * p + 0.7 * q).log()),
        "skew_kl": lambda: kl(log_p, (0.2 * p + 0.8 * q).log()),
        "skew_reverse_kl": lambda: kl(log_q, (0.2 * q + 0.8 * p).log()),
        "symmetric_kl": lambda: 0.3 * kl(log_p, log_q) + 0.7 * kl(log_q, log_p),
        "reverse_cross_entropy": lambda: -(q * log_p).sum(-1),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
        "adaptive_kl": adaptive,
    }[name]()


class Case:
    """Random float64 hidden states, heads and labels; frozen heads have more rows than the student's."""

    def __init__(self, seed: int, num_tokens: int = NUM_TOKENS, vocab: int = VOCAB) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.vocab = vocab
        self.hidden = draw(num_tokens, HIDDEN).requires_grad_()
        self.head = draw(vocab, HIDDEN).requires_grad_()
        self.pairs = {name: (draw(num_tokens, 8), draw(vocab + 3, 8)) for name in FROZEN}
        self.labels = torch.randint(0, vocab, (num_tokens,), generator=generator)

    @property
    def student(self) -> Tensor:
        return self.hidden @ self.head.T

    def frozen_logits(self) -> dict[str, Tensor]:
        return {name: hidden @ head[: self.vocab].T for name, (hidden, head) in self.pairs.items()}

    def references(self, kind: str, names: frozenset[str], target: str) -> dict:
        """What `names` send, as a payload that is exact; `target` sums them on the sending side."""
        logits = self.frozen_logits()
        summed = sum(weight * logits[name] for name, weight in POINTS[target][0].items() if name != "student")
        heads = dict.fromkeys(FROZEN, self.pairs["teacher"][1])
        beside = {name: self.pairs[name] for name in names & set(POINTS[target][1])}
        return {
            "hidden": {name: self.pairs[name] for name in names},
            "one head": {name: (self.pairs[name][0], heads[name]) for name in names},
            "logits": {name: hidden @ head.T for name, (hidden, head) in self.pairs.items() if name in names},
            "mixed": {name: logits[name] if len(name) % 2 else self.pairs[name] for name in names},
            "target": beside | {"target": summed},
            "all tokens as top_k": beside | {"target": every_token(summed / 3)},
        }[kind]

    def plain(self, target: str, divergence: str, references: dict) -> tuple[Tensor, Tensor]:
        """Sum over tokens of D and of cross-entropy at temperature 3, by autograd over whole logits."""
        z = {name: hidden @ head[: self.vocab].T for name, (hidden, head) in self.pairs.items()}
        for name, part in references.items():
            if isinstance(part, tuple):
                z[name] = part[0] @ part[1][: self.vocab].T
        log_p, log_q = (
            torch.log_softmax(sum(w * (own if name == "student" else z[name]) for name, w in weights.items()) / 3, -1)
            for weights, own in zip(POINTS[target], (self.student.detach(), self.student), strict=True)
        )
        cross_entropy = torch.nn.functional.cross_entropy(self.student, self.labels, reduction="sum")
        return plain_divergence(divergence, log_p, log_q).sum(), cross_entropy


def every_token(logits: Tensor) -> TopK:
    """A top k of all tokens but one, the last being the tail: exact."""
    log_p, ids = torch.log_softmax(logits, -1).sort(descending=True)
    return TopK(ids[:, :-1], log_p[:, :-1], log_p[:, -1])


def assert_equal_to_plain(case: Case, target: str, divergence: str, references: dict, chunk_tokens: int) -> None:
    block = {
        "target": TARGETS[target],
        "divergence": {"name": divergence} | PARAMETERS.get(divergence, {}),
        "sft_weight": 0.3,
    }
    loss = objective({**block, "temperature": 3.0, "temperature_squared": True})
    plain, cross_entropy = case.plain(target, divergence, references)
    expected = 0.3 * cross_entropy + 0.7 * 9 * plain

    result = linear_loss(case.hidden, case.head, references, case.labels, loss, chunk_tokens)

    # float64 sums in another order: a few ulps per token, nothing that looks like a scale error.
    torch.testing.assert_close(result.total, expected, rtol=1e-11, atol=0)
    assert result.sum("cross_entropy") == pytest.approx(cross_entropy.item(), rel=1e-12)
    assert result.sum("divergence") == pytest.approx(plain.item(), rel=1e-10)
    ours = torch.autograd.grad(3 * result.total, (case.hidden, case.head))
    theirs = torch.autograd.grad(3 * expected, (case.hidden, case.head))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def fits(target: str, divergence: str) -> bool:
    """v1..v8 name their divergence themselves."""
    return target not in VARIANTS or divergence == ("forward_kl" if int(target[1]) % 2 else "reverse_kl")


@pytest.mark.parametrize("kind", ["hidden", "one head", "logits", "mixed", "target", "all tokens as top_k"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradients_equal_plain_autograd_for_every_payload(divergence, target, kind):
    if not fits(target, divergence) or (target == "taid" and kind in ("target", "all tokens as top_k")):
        return
    if divergence == "adaptive_kl" and kind == "all tokens as top_k":
        return  # its head and tail are sets of outcomes, and the last token of the order is one here too
    case = Case(seed=3)
    references = case.references(kind, objective({"target": TARGETS[target]}).needs, target)
    assert_equal_to_plain(case, target, divergence, references, chunk_tokens=7)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradients_equal_plain_autograd_at_any_chunk_size(divergence, target, chunk_tokens):
    """50 tokens: chunk 7 leaves a ragged last chunk, 64 is a single one."""
    if fits(target, divergence):
        assert_equal_to_plain(Case(seed=5), target, divergence, Case(seed=5).pairs, chunk_tokens)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("num_tokens, vocab", [(1, 97), (5, 2)])
def test_one_token_and_a_vocabulary_of_two_are_no_special_cases(divergence, num_tokens, vocab):
    case = Case(seed=6, num_tokens=num_tokens, vocab=vocab)
    assert_equal_to_plain(case, "delta", divergence, case.pairs, chunk_tokens=64)


def test_no_supervised_token_gives_zero_loss_and_zero_gradients():
    case = Case(seed=8, num_tokens=0)
    for kind in ("hidden", "logits", "none: nobody was asked"):
        references = case.references(kind, frozenset(FROZEN), "delta") if kind in ("hidden", "logits") else {}
        result = linear_loss(case.hidden, case.head, references, case.labels, objective({"target": TARGETS["delta"]}))
        grads = torch.autograd.grad(result.total, (case.hidden, case.head))
        assert result.total == 0 and grads[0].shape == (0, HIDDEN) and (grads[1] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_per_token_is_the_chunked_loss_token_by_token(divergence):
    case = Case(seed=4)
    loss = objective({"target": TARGETS["delta"], "divergence": {"name": divergence}, "sft_weight": 0.2})
    student = case.student.detach().requires_grad_()
    rows = loss.per_token({**case.frozen_logits(), "student": student}, case.labels)
    result = linear_loss(case.hidden, case.head, case.pairs, case.labels, loss)

    torch.testing.assert_close(rows.sum(), result.total, rtol=1e-12, atol=0)
    torch.testing.assert_close(rows, result.token("loss"), rtol=1e-11, atol=1e-12)
    (grad,) = torch.autograd.grad(rows.sum(), student, retain_graph=True)
    (grad_hidden,) = torch.autograd.grad(result.total, case.hidden)
    torch.testing.assert_close(grad @ case.head, grad_hidden, rtol=1e-10, atol=1e-12)
    weights = torch.arange(NUM_TOKENS, dtype=torch.float64)
    (weighted,) = torch.autograd.grad((weights * rows).sum(), student)
    torch.testing.assert_close(weighted, weights[:, None] * grad)


def test_statistics_are_what_their_names_say():
    case = Case(seed=10)
    loss = objective({"target": TARGETS["delta"], "divergence": {"name": "jsd", "beta": 0.3}, "sft_weight": 0.25})
    result = linear_loss(case.hidden, case.head, case.pairs, case.labels, loss, 7)
    z = case.frozen_logits()
    log_p = torch.log_softmax(z["teacher"] + 0.5 * (z["student_raw"] - z["teacher_raw"]), -1)
    log_q = torch.log_softmax(case.student, -1).detach()
    expected = {
        "kl_to_target": kl(log_p, log_q),
        "student_entropy": -(log_q.exp() * log_q).sum(-1),
        "target_entropy": -(log_p.exp() * log_p).sum(-1),
        "divergence": plain_divergence("jsd", log_p, log_q),
        "cross_entropy": torch.nn.functional.cross_entropy(log_q, case.labels, reduction="none"),
    }
    expected["loss"] = 0.25 * expected["cross_entropy"] + 0.75 * expected["divergence"]
    for name, values in expected.items():
        torch.testing.assert_close(result.token(name), values, rtol=1e-11, atol=1e-12)
    assert result.token("target_top_k").isnan().all()


def test_a_second_backward_pass_gives_the_same_gradients_if_it_was_announced_and_a_sentence_if_not():
    case = Case(seed=11)
    total = linear_loss(case.hidden, case.head, case.pairs, case.labels, objective({})).total
    first = [grad.clone() for grad in torch.autograd.grad(2 * total, (case.hidden, case.head), retain_graph=True)]
    second = torch.autograd.grad(2 * total, (case.hidden, case.head))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    with pytest.raises((LossError, RuntimeError), match="retain_graph=True"):
        torch.autograd.grad(2 * total, case.hidden)


def test_sixteen_bit_inputs_give_the_float32_loss_within_their_rounding():
    """bf16 keeps 8 bits: products of 16 terms are off by about 1%. The head is more than one slice of rows."""
    case = Case(seed=9, vocab=20_000)
    loss = objective({"target": TARGETS["delta"]})
    pairs = {name: case.pairs[name] for name in loss.needs}
    hidden, head = (part.detach().bfloat16().requires_grad_() for part in (case.hidden, case.head))
    short = {name: (states.half(), rows.bfloat16()) for name, (states, rows) in pairs.items()}
    exact = linear_loss(case.hidden, case.head, pairs, case.labels, loss).total
    rounded = linear_loss(hidden, head, short, case.labels, loss, 7).total
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    theirs = torch.autograd.grad(exact, (case.hidden, case.head))
    for mine, other in zip(torch.autograd.grad(rounded, (hidden, head)), theirs, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - other).norm() < 0.05 * other.norm()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("target", ["delta", "v3"])
def test_tokens_that_models_rule_out_reach_the_chunked_loss_as_they_reach_per_token(divergence, target):
    """-inf in one model of P and one of Q, as logits; chunks of 7."""
    case = Case(seed=14)
    block = TARGETS["delta"] if target == "delta" else {"name": "parallelogram", "vertex": "teacher", "alpha": 0.7}
    logits = case.frozen_logits()
    logits["teacher"][:, 3] = logits["student_raw"][20:, 5] = -torch.inf
    loss = objective({"target": block, "divergence": divergence})
    student = case.student.detach().requires_grad_()
    rows = loss.per_token({**logits, "student": student})
    result = linear_loss(case.hidden, case.head, logits, None, loss, 7)
    torch.testing.assert_close(result.token("loss"), rows)
    (grad,) = torch.autograd.grad(rows.sum(), student)
    torch.testing.assert_close(grad @ case.head, torch.autograd.grad(result.total, case.hidden)[0])


def test_heads_are_one_only_if_they_are_the_same_rows():
    """Two views that start at one address are two heads."""
    case = Case(seed=15)
    store = torch.randn(2 * VOCAB, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    views = {"teacher": store[:VOCAB], "student_raw": store[::2], "teacher_raw": store[:VOCAB]}
    loss = objective({"target": TARGETS["delta"]})
    totals = [
        linear_loss(
            case.hidden,
            case.head,
            {name: (case.pairs[name][0], head.clone() if copied else head) for name, head in views.items()},
            None,
            loss,
        ).total.item()
        for copied in (False, True)
    ]
    assert totals[0] == pytest.approx(totals[1], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_float64_student_takes_narrower_references(dtype):
    case = Case(seed=16)
    pair = tuple(part.to(dtype) for part in case.pairs["teacher"])
    as_logits = {"teacher": (pair[0].float() @ pair[1].float().T)[:, :VOCAB]}
    exact = linear_loss(case.hidden, case.head, as_logits, None, objective({})).total
    assert linear_loss(case.hidden, case.head, {"teacher": pair}, None, objective({})).total.item() == pytest.approx(
        exact.item(), rel=1e-2
    )
    rows = objective({}).per_token({"student": case.student, "teacher": as_logits["teacher"].to(dtype)})
    assert rows.dtype == torch.float64
    narrow = objective({}).per_token({"student": case.student.half(), "teacher": as_logits["teacher"].double()})
    assert narrow.dtype == torch.float32


def test_frozen_sides_get_no_gradient():
    case = Case(seed=12)
    pairs = {"teacher": tuple(part.clone().requires_grad_() for part in case.pairs["teacher"])}
    total = linear_loss(case.hidden, case.head, pairs, case.labels, objective({})).total
    total.backward()
    assert case.hidden.grad is not None and pairs["teacher"][0].grad is None
