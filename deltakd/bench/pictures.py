"""`deltakd bench pictures`: the pictures of docs/concepts.md, computed by the code that trains.

Each picture is a function from nothing to its numbers, and one that draws them. Numbers are rounded before they are
drawn and stand in the SVG's description, so the same code gives the same file; matplotlib lays it out.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltakd.bench.cluster import H100, plant_of
from deltakd.bench.drawings import draw_divergences, draw_payloads, draw_step, draw_targets
from deltakd.bench.shapes import QWEN
from deltakd.bench.simulation import timeline
from deltakd.losses.objectives import objective
from deltakd.losses.points import log_probabilities, mix
from deltakd.losses.settings import DeltaTarget, point_weights
from deltakd.teacher.payloads import PayloadSpec, choose_payload

# (a) Out of a hundred answers to "What is the capital of Switzerland?", how many begin with which token. Invented: the
# raw teacher knows the place and likes to begin a sentence, its fine-tuning has taught it to answer with the place
# alone, and the raw student is less sure of the place.
TOKENS = ("Bern", "Zurich", "Geneva", "Basel", "The", "It", "Its", "Switzerland", "I", "A", "newline", "end")
ANSWERS = {
    "teacher": (66, 7, 4, 1.5, 8, 5, 2, 3, 1, 1, 1, 0.5),
    "teacher_raw": (22, 3, 2, 1, 26, 14, 6, 9, 5, 3, 7, 2),
    "student_raw": (8, 9, 6, 2, 28, 13, 5, 10, 6, 4, 7, 2),
}
ALPHAS = (0.0, 0.5, 1.0)
# (b) A target with two peaks, and a student that can only have one: its logits are a parabola.
PLACES = 60
PEAKS = ((0.65, 20.0, 4.0), (0.35, 42.0, 5.0))  # mass, centre, width
APART = range(10, 31, 2)  # how far from the first the second stands instead
SHOWN, FITTED = 3, ("forward_kl", "jsd", "reverse_kl", "skew_kl", "skew_reverse_kl", "tvd")
ROUNDS, SIDE = 11, 25  # of the search: each looks at SIDE x SIDE students, around the best of the round before
# (c) Whose hidden states are sent, and vocabularies between those of toys and of today's models.
FROZEN = (QWEN.teacher, QWEN.teacher, QWEN.student)
VOCABULARIES = (500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 151_936, 300_000)
SIZES = {"top_k": 64, "sampled": 64}  # as a recipe has them that does not say
MANY = 4096  # tokens over which a payload's bytes are averaged
# (d) One student and two teachers; the update's seconds are assumed.
MICRO_BATCHES, STEPS, UPDATE_S = 2, 3, 0.03
MODELS = ("teacher", "teacher_raw", "student_raw")

Numbers = dict[str, Any]


def bench(out: Path) -> None:
    """Draw every picture into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (numbers, draw) in PICTURES.items():
        save(name, draw, rounded(numbers()), out / f"{name}.svg")
        print(f"{out / f'{name}.svg'}: written")


def save(name: str, draw: Callable[[Any, Numbers], None], numbers: Numbers, file: Path) -> None:
    """Draw numbers into a file; a suffix .png gives an image for looking at."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what the reader's own matplotlibrc says
        matplotlib.rcParams.update({"svg.hashsalt": name, "font.size": 9, "axes.spines.top": False})
        matplotlib.rcParams.update({"axes.spines.right": False, "legend.frameon": False, "hatch.linewidth": 0.6})
        figure = Figure(layout="constrained", facecolor="white")
        draw(figure, numbers)
        about = {"Date": None, "Title": name, "Description": json.dumps(numbers)} if file.suffix == ".svg" else None
        figure.savefig(file, metadata=about, dpi=110)


def rounded(numbers: Any) -> Any:
    """Return numbers as they are drawn and kept: processors differ behind the sixth digit."""
    if isinstance(numbers, Mapping):
        return {key: rounded(value) for key, value in numbers.items()}
    if isinstance(numbers, Sequence) and not isinstance(numbers, str):
        return [rounded(value) for value in numbers]
    return round(numbers, 6) if isinstance(numbers, float) else numbers


def targets() -> Numbers:
    """Return three models' next-token distributions, the ratio that alpha weighs, and the delta target's."""
    logits = {name: torch.tensor(answers, dtype=torch.float64).log()[None] for name, answers in ANSWERS.items()}
    log_p = {name: log_probabilities(values, values, 0.0, 1.0) for name, values in logits.items()}
    delta = {f"{alpha:g}": delta_target(logits, alpha) for alpha in ALPHAS}
    return {
        "tokens": TOKENS,
        "models": {name: values.exp()[0].tolist() for name, values in log_p.items()},
        "log ratio": (log_p["student_raw"] - log_p["teacher_raw"])[0].tolist(),
        "target": {alpha: values.exp()[0].tolist() for alpha, values in delta.items()},
    }


def delta_target(logits: Mapping[str, Tensor], alpha: float) -> Tensor:
    """Return log P [n, V] of the delta target."""
    summed = mix(point_weights(DeltaTarget(name="delta"), alpha)[0], logits)
    assert summed is not None  # the teacher is always in it
    return log_probabilities(summed, summed, 0.0, 1.0)


def divergences() -> Numbers:
    """Return a target, the students nearest to it, and how wide these are as the target's peaks move apart."""
    target = two_peaks(PEAKS[1][1])
    found = {}
    for name in FITTED[:SHOWN]:
        centre, width, value = nearest(name, target)
        q = student(torch.tensor([[centre, width]], dtype=torch.float64)).softmax(-1)[0].tolist()
        found[name] = {"centre": centre, "width": width, "value": value, "q": q}
    moved = [two_peaks(PEAKS[0][1] + apart) for apart in APART]
    widths = {name: [nearest(name, one)[1] for one in moved] for name in FITTED}
    apart = {"shown": round(PEAKS[1][1] - PEAKS[0][1]), "apart": list(APART)}
    return {"target": target.exp().tolist(), "students": found, "widths": widths} | apart


def two_peaks(second: float) -> Tensor:
    """Return log P [V] of a target whose second peak stands at a place."""
    place = torch.arange(PLACES, dtype=torch.float64)
    centres = (PEAKS[0][1], second)
    bells = [
        mass / width * torch.exp(-(((place - centre) / width) ** 2) / 2)
        for (mass, _, width), centre in zip(PEAKS, centres, strict=True)
    ]
    return torch.stack(bells).sum(0).log().log_softmax(-1)


def student(shapes: Tensor) -> Tensor:
    """Return the logits [n, V] of students by centre and width [n, 2]."""
    place = torch.arange(PLACES, dtype=torch.float64)
    return -(((place - shapes[:, :1]) / shapes[:, 1:]) ** 2) / 2


def nearest(divergence: str, target: Tensor) -> tuple[float, float, float]:
    """Return centre and width of the nearest student, and its distance, by looking closer and closer."""
    loss = objective({"target": "teacher", "divergence": divergence})
    steps = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    centre, log_width, reach = PLACES / 2, 2.0, 1.0
    value = float("inf")
    for _ in range(ROUNDS):
        grid = torch.cartesian_prod(centre + reach * PLACES / 2 * steps, log_width + 2 * reach * steps)
        logits = student(torch.stack([grid[:, 0], grid[:, 1].exp()], dim=1))
        values = loss.per_token({"student": logits, "teacher": target.expand(len(logits), -1)})
        best = int(values.argmin())
        centre, log_width, value = float(grid[best, 0]), float(grid[best, 1]), float(values[best])
        reach /= 4
    return round(centre, 3), round(float(torch.tensor(log_width).exp()), 3), value


def payload_bytes() -> Numbers:
    """Return bytes per supervised token of every payload by vocabulary, and which of them `auto` takes."""
    kinds = ("logits", "target", "hidden", "top_k", "sampled")
    lines = {kind: [sent(kind, size) for size in VOCABULARIES] for kind in kinds}
    widths = dict(zip(MODELS, (shape.hidden_size for shape in FROZEN), strict=True))
    chosen = [choose_payload(widths, size, 2)[0] for size in VOCABULARIES]
    return {"vocabulary": VOCABULARIES, "bytes": lines, "auto": chosen}


def sent(kind: Any, vocab_size: int) -> float:
    """Return the bytes that all frozen models send for one supervised token, in float16."""
    spec = PayloadSpec(kind, "float16", "packed", vocab_size, SIZES.get(kind, 0))
    widths = [shape.hidden_size for shape in FROZEN] if spec.keeps_models_apart else [0]
    return sum(spec.num_bytes(MANY, width) for width in widths) / MANY


def steps() -> Numbers:
    """Return who does what in the first steps of one student and two teachers."""
    plant = plant_of(1, 1, H100)
    plant = replace(plant, teachers_per_node=2, micro_batches=MICRO_BATCHES, update_s=UPDATE_S, spread=0.0)
    return {"micro-batches": MICRO_BATCHES, "spans": [vars(span) for span in timeline(plant, STEPS)]}


PICTURES: dict[str, tuple[Callable[[], Numbers], Callable[[Any, Numbers], None]]] = {
    "targets": (targets, draw_targets),
    "divergences": (divergences, draw_divergences),
    "payloads": (payload_bytes, draw_payloads),
    "step": (steps, draw_step),
}
