"""How the numbers of `bench pictures` are drawn: a figure and numbers in, nothing out. Knows no models and no losses.

All on white, in colours that differ in lightness as well, so that print and colour-blind eyes tell them apart.
"""

from collections.abc import Mapping
from typing import Any

Numbers = Mapping[str, Any]

BLUE, SKY, ORANGE = "#1f5f99", "#8fbbe0", "#d9822b"
GREEN, PINK, GREY, SAND = "#2f7d4f", "#c2479b", "#8a8a8a", "#e8b44c"
OF_MODEL = {"teacher": BLUE, "teacher_raw": SKY, "student_raw": ORANGE}
OF_ALPHA = {"0": BLUE, "0.5": "#7d6f9e", "1": PINK}
OF_PAYLOAD = {  # label, colour, points by which the label is lifted
    "logits": ("logits, three models", ORANGE, -3),
    "target": ("target, one point", PINK, -3),
    "hidden": ("hidden, three models", BLUE, -3),
    "top_k": ("top_k, 64 and a tail", GREEN, 0),
    "sampled": ("sampled, 64 draws", GREY, -7),
}
OF_DIVERGENCE: Mapping[str, dict[str, Any]] = {
    "forward_kl": {"color": BLUE, "linewidth": 1.8},
    "skew_kl": {"color": SKY, "linewidth": 1.8, "linestyle": "--"},
    "jsd": {"color": GREEN, "linewidth": 1.8, "linestyle": (0, (4, 2))},
    "skew_reverse_kl": {"color": PINK, "linewidth": 1.8, "linestyle": (0, (6, 2, 1, 2))},
    "reverse_kl": {"color": ORANGE, "linewidth": 1.8},
    "tvd": {"color": GREY, "linewidth": 1.8, "linestyle": ":"},
}
QWEN_VOCABULARY = 151_936
NEAR = {"textcoords": "offset points"}
IN_A_BOX = "t, r, s: teacher, teacher_raw, student_raw; black: update; hatched: waiting"
OF_BATCH = (BLUE, SAND, GREEN, PINK, SKY, ORANGE)


def draw_targets(figure: Any, numbers: Numbers) -> None:
    """Three panels over the tokens: models, the log-ratio that alpha weighs, the target by alpha."""
    figure.set_size_inches(8.5, 7)
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 3))
    _bars(above, numbers["models"], OF_MODEL, "{}")
    above.set_ylabel("probability")
    above.set_title("what the three frozen models say", loc="left")
    ratio = numbers["log ratio"]
    middle.bar(range(len(ratio)), ratio, 0.55, color=[ORANGE if value > 0 else SKY for value in ratio])
    middle.axhline(0, color="black", linewidth=0.8)
    middle.set_ylabel("nats")
    middle.set_title("log student_raw - log teacher_raw: alpha times this is added to the teacher's logits", loc="left")
    _bars(below, numbers["target"], OF_ALPHA, "alpha {}")
    below.set_ylabel("probability")
    below.set_title("the delta target, teacher * (student_raw / teacher_raw)^alpha", loc="left")
    below.set_xticks(range(len(ratio)), numbers["tokens"], rotation=30, ha="right")


def _bars(axis: Any, groups: Mapping[str, Any], colours: Mapping[str, str], label: str) -> None:
    width = 0.8 / len(groups)
    for number, (name, values) in enumerate(groups.items()):
        places = [place + (number - (len(groups) - 1) / 2) * width for place in range(len(values))]
        axis.bar(places, values, width, color=colours[name], label=label.format(name))
    axis.legend(loc="upper right")


def draw_divergences(figure: Any, numbers: Numbers) -> None:
    """The target as a hill with the nearest students; and how wide these are over the distance of its peaks."""
    figure.set_size_inches(9.5, 3.8)
    shapes, widths = figure.subplots(1, 2)
    shapes.fill_between(range(len(numbers["target"])), numbers["target"], color="#dddddd", label="target")
    for name, found in numbers["students"].items():
        shapes.plot(found["q"], label=name, **OF_DIVERGENCE[name])
    shapes.set_title(f"the nearest student with one peak, peaks {numbers['shown']} apart", loc="left")
    shapes.set_xlabel("token")
    shapes.set_ylabel("probability")
    shapes.set_ylim(bottom=0)
    for name, values in numbers["widths"].items():
        widths.plot(numbers["apart"], values, label=name, marker=".", **OF_DIVERGENCE[name])
    widths.set_title("its width, as the target's peaks move apart", loc="left")
    widths.set_xticks(numbers["apart"][::2])
    widths.set_xlabel("tokens between the peaks")
    widths.set_ylabel("tokens")
    widths.set_ylim(bottom=0)
    shapes.legend(loc="upper right")
    widths.legend(loc="upper left")


def draw_payloads(figure: Any, numbers: Numbers) -> None:
    """Bytes per supervised token over the vocabulary, both on log scales; estimates are dashed."""
    figure.set_size_inches(7.5, 4)
    axis = figure.subplots()
    sizes = numbers["vocabulary"]
    for kind, values in numbers["bytes"].items():
        label, colour, lift = OF_PAYLOAD[kind]
        axis.loglog(sizes, values, "--" if kind in ("top_k", "sampled") else "-", color=colour, linewidth=1.8)
        axis.annotate(label, (sizes[-1], values[-1]), (6, lift), textcoords="offset points", color=colour)
    axis.axvline(QWEN_VOCABULARY, color=GREY, linewidth=0.8, linestyle=":")
    axis.annotate("Qwen2.5", (QWEN_VOCABULARY, 120), (-4, 0), textcoords="offset points", color=GREY, ha="right")
    axis.set_xlim(sizes[0], sizes[-1])
    axis.set_ylim(bottom=100)
    axis.set_xlabel("shared vocabulary")
    axis.set_ylabel("bytes per supervised token")
    axis.grid(alpha=0.25)


def draw_step(figure: Any, numbers: Numbers) -> None:
    """A lane per rank, a box per work; its colour and number are the micro-batch's."""
    figure.set_size_inches(9.5, 3.1)
    axis = figure.subplots()
    spans = numbers["spans"]
    ranks = sorted({span["rank"] for span in spans})
    ends = max(span["ends"] for span in spans if span["work"] == "update")
    free = 0.0  # when the student was done with what it did last
    for span in spans:
        lane = -ranks.index(span["rank"])
        if span["work"] == "update":
            axis.barh(lane, span["ends"] - span["begins"], 0.7, left=span["begins"], color="black")
            axis.plot([span["ends"]] * 2, [-0.45, 1], ":", color="black", linewidth=0.8)
            axis.annotate(f"step {span['index'] + 1}", (span["ends"], 0.74), (-3, 0), **NEAR, ha="right")
        elif span["work"] != "ask" and span["begins"] < ends:
            _box(axis, span, lane, ends)
        if span["work"] in ("work", "update"):
            axis.barh(lane, span["begins"] - free, 0.7, left=free, color="white", edgecolor=GREY, hatch="/////")
            free = span["ends"]
    for when in sorted({span["begins"] for span in spans if span["work"] == "ask" and span["begins"] < ends}):
        asked = [str(span["index"] + 1) for span in spans if span["work"] == "ask" and span["begins"] == when]
        axis.annotate(f"asks {', '.join(asked)}", (when, 0.44), (3, 0), **NEAR, fontsize=7)
    axis.set_yticks([-lane for lane in range(len(ranks))], ranks)
    axis.set_ylim(-0.5 - len(ranks) + 1, 1)
    axis.set_xlim(0, ends)
    axis.set_xlabel("seconds")
    axis.set_title(f"numbers: micro-batches, {numbers['micro-batches']} a step; {IN_A_BOX}", loc="left", fontsize=9)


def _box(axis: Any, span: Mapping[str, Any], lane: int, ends: float) -> None:
    left, right = span["begins"], min(span["ends"], ends)
    colour = OF_BATCH[span["index"] % len(OF_BATCH)]
    axis.barh(lane, right - left, 0.7, left=left, color=colour, edgecolor="white", linewidth=1)
    letter = "" if span["work"] == "work" else "\n" + "trs"[int(span["work"].removeprefix("answer "))]
    ink = "black" if colour in (SKY, SAND) else "white"
    place = ((left + right) / 2, lane)
    axis.text(*place, f"{span['index'] + 1}{letter}", ha="center", va="center", fontsize=7, color=ink)
