"""One way of computing the distillation loss, timed in a process of its own, so that its peak memory is its own.

    python -m deltakd.bench.candidates '{"name": "deltakd", "tokens": 256, ...}'

Every candidate computes the same thing: the sum over tokens of KL(teacher, student) from hidden states and two heads,
and its gradients for the student's hidden states and head. `products` computes nothing but the matrix products that any
of them must take, and is what they are divided by.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from deltakd.bench.case import Case
from deltakd.losses import linear_loss, objective


@dataclass(frozen=True)
class Inputs:
    """Hidden states [N, H], heads [V, H] of both models."""

    student: Tensor
    head: Tensor
    teacher: Tensor
    teacher_head: Tensor


def draw(case: Case) -> Inputs:
    """Draw inputs whose logits have the spread of a trained model's, about 3."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        values = torch.randn(rows, columns, generator=generator).mul_(scale)
        return values.to(case.device, getattr(torch, case.dtype))

    return Inputs(
        normal(case.tokens, case.hidden, 1.0).requires_grad_(),
        normal(case.vocab, case.hidden, 3 / case.hidden**0.5).requires_grad_(),
        normal(case.tokens, case.teacher_hidden, 1.0),
        normal(case.vocab, case.teacher_hidden, 3 / case.teacher_hidden**0.5),
    )


def products(inputs: Inputs, case: Case) -> None:
    """Take the products alone, chunk by chunk: both models' logits and the student's two gradients."""
    with torch.no_grad():
        size = (case.chunk_tokens, case.vocab)
        logits, frozen = (inputs.head.new_empty(size) for _ in range(2))
        grad_hidden, grad_head = torch.empty_like(inputs.student), torch.zeros_like(inputs.head)
        for start in range(0, case.tokens, case.chunk_tokens):
            rows = slice(start, start + case.chunk_tokens)
            num = len(inputs.student[rows])
            torch.mm(inputs.student[rows], inputs.head.T, out=logits[:num])
            torch.mm(inputs.teacher[rows], inputs.teacher_head.T, out=frozen[:num])
            torch.mm(logits[:num], inputs.head, out=grad_hidden[rows])
            grad_head.addmm_(logits[:num].T, inputs.student[rows])


def ours(inputs: Inputs, case: Case) -> None:
    """linear_loss with the teacher's hidden states."""
    references = {"teacher": (inputs.teacher, inputs.teacher_head)}
    linear_loss(inputs.student, inputs.head, references, None, objective({}), case.chunk_tokens).total.backward()


def whole(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs, Case], None]:
    """Return a candidate that holds both models' logits [N, V]."""

    def run(inputs: Inputs, case: Case) -> None:
        with torch.no_grad():
            teacher = inputs.teacher @ inputs.teacher_head.T
        loss(inputs.student @ inputs.head.T, teacher).backward()

    return run


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """KL as one writes it down."""
    log_p, log_q = torch.log_softmax(teacher.float(), -1), torch.log_softmax(student.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum()


def trl() -> Callable[[Inputs, Case], None]:
    """TRL's GKD loss at beta 0, which is KL(teacher, student)."""
    from trl.experimental.gkd import GKDTrainer

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        result: Tensor = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=0.0, reduction="sum")
        return result

    return whole(loss)


def liger() -> Callable[[Inputs, Case], None]:
    """Liger's fused linear JSD at beta 0, whose Triton kernels need a GPU."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    kernel = LigerFusedLinearJSD(jsd_beta=0.0)

    def run(inputs: Inputs, case: Case) -> None:
        kernel(inputs.student, inputs.head, inputs.teacher, inputs.teacher_head).backward()

    return run


def candidate(case: Case) -> Callable[[Inputs, Case], None]:
    """Return what runs under a name; raises ImportError where its library is missing."""
    makers: dict[str, Callable[[], Callable[[Inputs, Case], None]]] = {
        "deltakd": lambda: ours,
        "plain": lambda: whole(plain),
        "compiled": lambda: whole(torch.compile(plain)),
        "trl": trl,
        "liger": liger,
    }
    return makers[case.name]()


def peak_bytes(device: str, reset: bool = False) -> int:
    """Return the most memory held since the last reset: resident in this process, or allocated on its device."""
    if device != "cpu":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:  # proc(5): 5 resets the high-water mark
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024  # "  123 kB"


def measure(case: Case) -> dict[str, Any]:
    """Time the candidate and the bare products in turns, after a warm-up of each, and the candidate's peak of memory.

    In turns, since the speed of a shared machine drifts by more than what is measured: the ratio is the median of those
    of neighbours.
    """
    run = candidate(case)
    inputs = draw(case)
    warm = Inputs(inputs.student[:8], inputs.head, inputs.teacher[:8], inputs.teacher_head)
    run(warm, case)
    products(warm, case)
    bare, own, peaks = [], [], []
    for _ in range(case.repeats):
        inputs.student.grad = inputs.head.grad = None
        bare.append(_seconds(products, inputs, case))
        before = peak_bytes(case.device, reset=True)
        own.append(_seconds(run, inputs, case))
        peaks.append(peak_bytes(case.device) - before)
    ratios = [mine / theirs for mine, theirs in zip(own, bare, strict=True)]
    return {"seconds": own, "products_seconds": bare, "ratio": median(ratios), "peak_bytes": max(peaks)}


def _seconds(run: Callable[[Inputs, Case], None], inputs: Inputs, case: Case) -> float:
    started = time.perf_counter()
    run(inputs, case)
    if case.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    torch.set_num_threads(1)
    case = Case(**json.loads(sys.argv[1]))
    try:
        print(json.dumps(asdict(case) | measure(case)))
    except ImportError as error:
        print(json.dumps(asdict(case) | {"missing": str(error).splitlines()[0]}))
