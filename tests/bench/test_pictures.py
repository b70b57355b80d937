"""The pictures of docs/concepts.md are what the code makes now, and what they show holds."""

import json
import re
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from deltakd.__main__ import main
from deltakd.bench import pictures
from deltakd.bench.pictures import PICTURES, delta_target

COMMITTED = Path(__file__).parents[2] / "docs" / "pictures"


def numbers_in(svg: str) -> dict:
    return json.loads(unescape(re.search(r"<dc:description>(.*?)</dc:description>", svg, re.DOTALL)[1]))


def drawn_by(svg: str) -> str:
    return re.search(r"<dc:title>(Matplotlib v[\d.]+)", svg)[1]


def nearly_equal(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(nearly_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(nearly_equal, a, b))
    return a == pytest.approx(b, rel=0, abs=2e-6) if isinstance(a, float) else a == b  # rounded to six digits


def test_the_committed_pictures_are_what_the_code_makes(tmp_path):
    """If this fails: python -m deltakd bench pictures --out docs/pictures. Another matplotlib lays out otherwise."""
    assert main(["bench", "pictures", "--out", str(tmp_path)]) == 0
    assert {path.stem for path in COMMITTED.iterdir()} == {path.stem for path in tmp_path.iterdir()} == set(PICTURES)
    for path in sorted(tmp_path.iterdir()):
        new, kept = path.read_text(), (COMMITTED / path.name).read_text()
        assert nearly_equal(numbers_in(new), numbers_in(kept)), path.name
        assert new == kept or drawn_by(new) != drawn_by(kept), path.name


def test_the_target_is_the_teacher_at_alpha_0_and_either_anchor_s_at_alpha_1():
    numbers = pictures.targets()
    assert numbers["target"]["0"] == numbers["models"]["teacher"]
    logits = {name: torch.tensor(values).log()[None] for name, values in numbers["models"].items()}
    swapped = {"teacher": logits["student_raw"], "student_raw": logits["teacher"], "teacher_raw": logits["teacher_raw"]}
    torch.testing.assert_close(delta_target(logits, 1.0), delta_target(swapped, 1.0))  # float32: a rounding of logs


def test_the_student_nearest_by_forward_kl_has_the_target_s_mean_and_variance():
    """Students with one peak are an exponential family of these two moments, which forward KL matches."""
    numbers = pictures.divergences()
    place = torch.arange(pictures.PLACES, dtype=torch.float64)

    def moments(p: list[float]) -> tuple[float, float]:
        weights = torch.tensor(p, dtype=torch.float64)
        mean = weights @ place
        return float(mean), float(weights @ (place - mean) ** 2)

    # Centre and width are rounded to a thousandth of a token; the variance moves by twice the width with it.
    assert moments(numbers["students"]["forward_kl"]["q"]) == pytest.approx(moments(numbers["target"]), abs=0.03)
    widths = numbers["widths"]
    assert all(a < b for a, b in pairwise(widths["forward_kl"])) and widths["reverse_kl"][-1] < pictures.PEAKS[1][2]


def test_hidden_states_take_the_same_bytes_at_any_vocabulary_and_are_chosen_where_they_are_fewest():
    numbers = pictures.payload_bytes()
    sizes, sent = numbers["vocabulary"], numbers["bytes"]
    at_qwen = sizes.index(pictures.QWEN.vocab_size)
    assert (sent["hidden"][at_qwen], sent["logits"][at_qwen]) == (17_408, 911_616)  # 52 times: the README says so
    assert pictures.sent("hidden", 8_704) == pictures.sent("target", 8_704)  # where they change places: concepts.md
    for index, chosen in enumerate(numbers["auto"]):
        assert chosen == min(("hidden", "target", "logits"), key=lambda kind: sent[kind][index])


def test_nobody_works_on_two_things_at_once_or_before_the_answers_are_there():
    spans = pictures.steps()["spans"]
    for rank in sorted({span["rank"] for span in spans}):
        busy = [span for span in spans if span["rank"] == rank and span["work"] != "ask"]
        assert all(a["ends"] <= b["begins"] + 1e-9 for a, b in pairwise(busy)), rank
    for work in (span for span in spans if span["work"] == "work"):
        answers = [span for span in spans if span["index"] == work["index"] and span["work"].startswith("answer")]
        assert len(answers) == 3 and max(span["ends"] for span in answers) <= work["begins"] + 1e-9
        asked = next(span for span in spans if span["index"] == work["index"] + 2 and span["work"] == "ask")
        assert asked["begins"] <= work["begins"], "two micro-batches are asked ahead"


def test_the_page_says_what_its_pictures_show():
    page = (COMMITTED.parent / "concepts.md").read_text()
    target = pictures.targets()["target"]
    for token, moves in (("Bern", "falls"), ("Zurich", "rises")):
        at_0, at_half, at_1 = (
            f"{probabilities[pictures.TOKENS.index(token)]:.0%}" for probabilities in target.values()
        )
        assert f"{token} {moves} from {at_0} to {at_half} and {at_1}" in " ".join(page.split())
    numbers = pictures.divergences()
    for name, widths in numbers["widths"].items():
        drops = [apart for apart, (a, b) in zip(numbers["apart"][1:], pairwise(widths), strict=True) if b < 0.7 * a]
        said = {0: "cover", 1: f"takes one from {drops[0]} on" if drops else ""}[len(drops)]
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert said in row and ("takes one" in row) == bool(drops), name
    for path in COMMITTED.iterdir():
        assert f"(pictures/{path.name})" in page


@pytest.mark.parametrize("kind", ["variants quickstart", "growth", "pictures"])
def test_what_draws_says_before_measuring_that_nothing_can_draw(kind, monkeypatch, capsys):
    monkeypatch.setattr("deltakd.bench.command.find_spec", lambda name: None)
    assert main(["bench", *kind.split(), "--out=nowhere/x"]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err and not Path("nowhere").exists()
