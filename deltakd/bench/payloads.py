"""`deltakd bench payloads`: how far each way of sending the frozen models' words moves the delta target.

Mean over supervised tokens of KL(exact target, target as it arrives), the exact one from float32 hidden states and
heads in float64. A renormalised top k rules the other tokens out, so there it is KL(target as it arrives, exact
target); a tail bucket says how much mass the others have, not whose it is, so there it is spread evenly.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deltakd.base.machine import machine_facts
from deltakd.bench.words import first_words
from deltakd.losses.divergences import LOG_ZERO
from deltakd.losses.points import mix
from deltakd.losses.settings import DeltaTarget, point_weights

ALPHA = 0.5
KS = (8, 32, 64, 128)


def bench(name: str, overrides: Sequence[str], out: Path) -> None:
    """Measure every payload on the recipe's first examples, print the table and write JSON."""
    pairs = first_words(name, overrides)
    exact = _target({role: hidden.double() @ head.double().T for role, (hidden, head) in pairs.items()})
    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        sent = {role: hidden.to(dtype).float() @ head.T for role, (hidden, head) in pairs.items()}
        rows.append((f"hidden, {short}", _kl(exact, _target(sent))))
        whole = {role: (hidden @ head.T).to(dtype) for role, (hidden, head) in pairs.items()}
        rows.append((f"logits, {short}", _kl(exact, _target(whole))))
        summed = mix(_weights(), {role: hidden @ head.T for role, (hidden, head) in pairs.items()})
        assert summed is not None
        rows.append((f"target, {short}", _kl(exact, torch.log_softmax(summed.to(dtype).double(), -1))))
    for k in KS:
        if k < exact.shape[-1]:
            values, ids = exact.topk(k)
            missing = 1 - values.exp().sum(-1).mean()
            rows.append((f"top_k {k}, renormalised: KL(sent, exact)", _renormalised(values)))
            rows.append((f"top_k {k}, mass that is left out", float(missing)))
            rows.append((f"top_k {k}, tail bucket: KL(exact, uniform tail)", _spread(exact, values, ids)))
    facts = {"machine": machine_facts(), "recipe": name, "overrides": list(overrides), "alpha": ALPHA}
    facts |= {"num_tokens": len(exact), "vocab_size": exact.shape[-1], "results": dict(rows)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    table = Table(
        "payload", "mean KL, nats; or mass", title=f"{name}: {len(exact):,} tokens, vocabulary {exact.shape[-1]:,}"
    )
    for label, value in rows:
        table.add_row(label, f"{value:.2e}")
    Console().print(table)
    print(f"{out}: written")


def _weights() -> dict[str, float]:
    return point_weights(DeltaTarget(name="delta"), ALPHA)[0]


def _target(logits: dict[str, Tensor]) -> Tensor:
    """Return log P [n, V] in float64; 16-bit logits are summed in float32, as the loss does."""
    summed = mix(_weights(), logits)
    assert summed is not None
    return torch.log_softmax(summed.double(), -1)


def _kl(log_p: Tensor, log_q: Tensor) -> float:
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def _renormalised(values: Tensor) -> float:
    """KL from the renormalised top k to the exact target: minus the log of the mass that it holds."""
    return float(-values.exp().sum(-1).log().mean())


def _spread(exact: Tensor, values: Tensor, ids: Tensor) -> float:
    """KL from the exact target to one whose tail mass is spread evenly: what the bucket does not tell."""
    rest = exact.scatter(-1, ids, LOG_ZERO).logsumexp(-1, keepdim=True)
    even = rest - torch.tensor(float(exact.shape[-1] - ids.shape[-1]), dtype=torch.float64).log()
    return _kl(exact, even.expand_as(exact).scatter(-1, ids, values))
