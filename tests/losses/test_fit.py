"""What linear_loss refuses: one sentence each, which names the reference, what is wrong with its values, what to do."""

import pytest
import torch

from deltakd.base.errors import LossError
from deltakd.losses import Sampled, TopK, linear_loss, objective

VOCAB = 97
FROZEN = ("teacher", "teacher_raw", "student_raw")


class Case:
    """50 tokens, a student 16 wide, frozen models 8 wide with three more rows of head."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(13)
        sizes = {"hidden": (50, 16), "head": (VOCAB, 16), "states": (50, 8), "rows": (VOCAB + 3, 8)}
        drawn = {name: torch.randn(*size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
        self.hidden, self.head = drawn["hidden"].requires_grad_(), drawn["head"].requires_grad_()
        self.pairs = dict.fromkeys(FROZEN, (drawn["states"], drawn["rows"]))
        self.labels = torch.randint(0, VOCAB, (50,), generator=generator)


def misfit(**changes) -> str:
    case = Case()
    parts = {
        "hidden_NH": case.hidden,
        "head_VH": case.head,
        "references": {"teacher": case.pairs["teacher"]},
        "labels_N": case.labels,
        "objective": objective({}),
    }
    with pytest.raises(LossError) as caught:
        linear_loss(**(parts | changes))
    return str(caught.value)


def test_what_does_not_fit_is_named_in_one_sentence():
    case = Case()
    hidden, head = case.pairs["teacher"]
    logits = hidden @ head[:VOCAB].T
    assert misfit(references={}).startswith("teacher: missing. The objective needs teacher; given: ")
    assert misfit(references={"teacher": (hidden, head[:90])}).startswith("teacher: a vocabulary of 90, smaller than")
    assert misfit(references={"teacher": logits[:, :90]}).startswith("teacher: a vocabulary of 90, smaller than")
    assert misfit(references={"teacher": logits[:9]}).startswith("teacher: speaks of 9 tokens, the student of 50.")
    assert misfit(references={"teacher": (hidden[:, :5], head)}).startswith("teacher: hidden states 5 wide, head 8.")
    assert misfit(labels_N=case.labels[:9]).startswith("labels: torch.int64 of shape [9] for 50 tokens.")
    assert misfit(labels_N=case.labels.double()).startswith("labels: torch.float64 of shape [50] for 50 tokens.")
    assert misfit(labels_N=case.labels - 100).startswith("labels: -100 to ")
    assert misfit(labels_N=case.labels + VOCAB).startswith("labels: ")
    assert misfit(chunk_tokens=0).startswith("chunk_tokens: 0. Write a whole number above 0.")
    assert misfit(hidden_NH=case.hidden[None]).startswith("student: hidden [1, 50, 16], head [97, 16].")
    assert misfit(head_VH=case.head.float()).startswith("student: hidden is torch.float64, head torch.float32.")
    assert misfit(references={"teacher": [1]}).startswith("teacher: list. Pass logits [N, V] or (hidden states")
    assert misfit(labels_N=None, objective=objective({"sft_weight": 0.5})).startswith("labels: missing, but sft_weight")
    broken = logits.clone()
    broken[7, 3] = torch.inf
    assert misfit(references={"teacher": broken}).startswith("teacher: 1 of ")
    states = hidden.clone()
    states[7, 3] = -torch.inf
    assert misfit(references={"teacher": (states, head)}).startswith("teacher: 1 of 400 hidden numbers are not finite.")
    rows = head.clone()
    rows[2, 2] = torch.nan
    message = misfit(references={"teacher": (hidden, rows)})
    assert message.startswith("teacher: 1 of 800 numbers of its head are not finite.")
    walls = {name: torch.where(torch.arange(VOCAB) < 40, 0.0, -torch.inf).expand(50, VOCAB) for name in FROZEN[:2]}
    walls["student_raw"] = walls["teacher"].flip(-1)
    parts = {"references": walls, "objective": objective({"target": "delta"})}
    assert "rule out everything between them" in misfit(**parts)
    draws = Sampled(torch.zeros(50, 4, dtype=torch.int64))
    reverse = objective({"divergence": "reverse_kl"})
    assert misfit(references={"target": draws}, objective=reverse).startswith("target: draws estimate forward_kl")
    taid = objective({"target": "taid"})
    assert misfit(references={"target": logits}, objective=taid).startswith("target: that of taid moves")
    far = TopK(torch.full((50, 1), 97), torch.zeros(50, 1), torch.zeros(50))
    assert misfit(references={"target": far}).startswith("target: token 97 of a vocabulary of 97.")
    twice = TopK(torch.zeros(50, 2, dtype=torch.int64), torch.zeros(50, 2), torch.zeros(50))
    assert misfit(references={"target": twice}).startswith("target: a token stands twice")
    negative = Sampled(torch.zeros(50, 1, dtype=torch.int64), torch.full((50, 1), -1.0))
    assert misfit(references={"target": negative}).startswith("target: a weight of -1.")
    broken_k = TopK(torch.zeros(50, 1, dtype=torch.int64), torch.full((50, 1), torch.nan), torch.zeros(50))
    assert misfit(references={"target": broken_k}).startswith("target: [50, 1] numbers for [50, 1] ids, or NaN.")
    with pytest.raises(LossError, match="statistics: kl is not known"):
        linear_loss(case.hidden, case.head, case.pairs, case.labels, objective({})).token("kl")
