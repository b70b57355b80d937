"""What is said of a delta target before training: the numbers of plain torch in float64, and one pass of the models."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltakd.__main__ import main
from deltakd.recipe import caching
from deltakd.study import outlook
from deltakd.study.advice import advise
from deltakd.study.outlook import MODELS, Outlook, Tally, TargetFigures, look

ALPHAS, TEMPERATURES = [0.0, 0.5, 1.5], [1.0, 2.0]


def plain(logits: dict[str, torch.Tensor], labels: torch.Tensor, alpha: float, tau: float) -> list[float]:
    """The figures of one target by their definitions, from probabilities, in float64."""
    p = {name: torch.softmax(values, -1) for name, values in logits.items()}
    whole = p["teacher"] * (p["student_raw"] / p["teacher_raw"]) ** alpha
    target = whole ** (1 / tau) / (whole ** (1 / tau)).sum(-1, keepdim=True)
    own = {name: one ** (1 / tau) / (one ** (1 / tau)).sum(-1, keepdim=True) for name, one in p.items()}
    at_label = target.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    kls = [(target * (target / own[name]).log()).sum(-1).mean() for name in ("teacher", "student_raw")]
    hits = (target.argmax(-1) == labels).double().mean()
    return [float(one) for one in (-at_label.log().mean(), hits, -(target * target.log()).sum(-1).mean(), *kls)]


def figures(one: TargetFigures) -> list[float]:
    return [one.cross_entropy, one.accuracy, one.entropy, one.kl_to_teacher, one.kl_to_student_raw]


def test_every_figure_is_that_of_its_definition_however_the_tokens_are_cut(monkeypatch):
    """Heads have more rows than the vocabulary; 50 tokens in batches of 31 and 19, in chunks of 7."""
    torch.manual_seed(0)
    vocab, sizes = 37, {"teacher": 12, "teacher_raw": 12, "student_raw": 8}
    heads = {name: torch.randn(vocab + 5, size, dtype=torch.float64) for name, size in sizes.items()}
    hidden = {name: torch.randn(50, size, dtype=torch.float64) for name, size in sizes.items()}
    labels = torch.randint(0, vocab, (50,))
    monkeypatch.setattr(outlook, "CHUNK_TOKENS", 7)
    cuts = [slice(0, 31), slice(31, 50)]
    batches = [({name: (hidden[name][cut], heads[name]) for name in MODELS}, labels[cut]) for cut in cuts]
    found = look(batches, Tally(ALPHAS, TEMPERATURES), vocab)
    logits = {name: hidden[name] @ heads[name][:vocab].T for name in MODELS}
    assert [(one.alpha, one.temperature) for one in found.targets] == [(a, t) for a in ALPHAS for t in TEMPERATURES]
    for one in found.targets:  # float64 sums in another order
        assert figures(one) == pytest.approx(plain(logits, labels, one.alpha, one.temperature), rel=1e-10, abs=1e-12)
    at_label = {name: torch.log_softmax(one, -1)[torch.arange(50), labels] for name, one in logits.items()}
    ratio = at_label["student_raw"] - at_label["teacher_raw"]
    assert found.ratio_mean == pytest.approx(float(ratio.mean()), rel=1e-10)
    assert found.ratio_spread == pytest.approx(float(ratio.std(correction=0)), rel=1e-10) and found.num_tokens == 50
    assert found.cross_entropy == pytest.approx({name: -float(one.mean()) for name, one in at_label.items()}, rel=1e-10)

    student = look(batches, Tally([0.0, 1.0], [1.0], anchor="student"), vocab).targets
    assert student[0].kl_to_student_raw == pytest.approx(0, abs=1e-12)  # alpha 0 is the raw student there
    assert figures(student[1]) == pytest.approx(plain(logits, labels, 1.0, 1.0), rel=1e-10)  # both anchors meet at 1


@pytest.fixture(scope="module")
def asked(lab, tmp_path_factory):
    root = tmp_path_factory.mktemp("target")
    words = ["target", str(lab.recipe), f"root={root}", "--alphas=0,0.5,1.5", "--temperatures=1,2"]
    words += ["references.dtype=float32", "--rows=6"]
    assert main(words) == 0
    return SimpleNamespace(root=root, words=words, found=json.loads((root / "target" / "target.json").read_text()))


def test_the_numbers_are_those_of_whole_models_in_float64(lab, asked):
    """Through transformers, a row at a time, on the reference tokens that the tokenizer's template marks."""
    from deltakd.data.conversation import Conversation
    from deltakd.data.formats import read_row
    from deltakd.data.template import ChatTemplate
    from deltakd.data.tokenizer import load_tokenizer

    models = {
        name: AutoModelForCausalLM.from_pretrained(lab.folder / name.replace("student_raw", "student")).double().eval()
        for name in MODELS
    }
    tokenizer = load_tokenizer(str(lab.folder / "student"), False)
    template, logits, labels = ChatTemplate(tokenizer), {name: [] for name in MODELS}, []
    for number, line in enumerate((lab.folder / "validation.jsonl").read_text().splitlines()[:6]):
        conversation = read_row(json.loads(line), "messages", f"row {number}")
        assert isinstance(conversation, Conversation)
        (example,) = template.encode([conversation])
        learnt = torch.tensor(example.supervised).nonzero()[:, 0]
        tokens = torch.tensor(example.tokens.astype("int64"))
        labels.append(tokens[learnt])
        for name, model in models.items():
            with torch.no_grad():
                logits[name].append(model(tokens.unsqueeze(0)).logits[0, learnt - 1, : len(tokenizer)])
    whole, expected = {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(labels)
    assert asked.found["num_tokens"] == len(expected)
    for one in asked.found["targets"]:  # the models ran in float32
        said = figures(TargetFigures(**one))
        assert said == pytest.approx(plain(whole, expected, one["alpha"], one["temperature"]), rel=1e-3, abs=1e-4)


def test_asked_again_for_other_alphas_no_model_is_loaded(asked, monkeypatch, capsys):
    def never(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(caching, "open_frozen", never)
    assert main([*asked.words[:3], "--alphas=0.5,1", "references.dtype=float32", "--rows=6"]) == 0
    said = capsys.readouterr().out
    assert ", 0 bytes to write" in said and "| 0.5 | 1 | " in said
    again = json.loads((asked.root / "target" / "target.json").read_text())["targets"][0]
    assert again == next(one for one in asked.found["targets"] if (one["alpha"], one["temperature"]) == (0.5, 1))
    page = (asked.root / "target" / "curves.html").read_text()
    assert page.count('"mode":"lines+markers"') == 4  # a panel each, one temperature
    assert re.search(r"<script[^>]*src=", page) is None  # it brings plotly along
    assert asked.found["sentence"].startswith("Neither raw model knows this text (cross-entropy")  # they are new


def seen(spread: float, student: float, teacher: float, of_target: float = 0.1) -> Outlook:
    models = {"teacher": 0.05, "teacher_raw": teacher, "student_raw": student}
    targets = [TargetFigures(alpha, 1.0, of_target + alpha / 10, 1, 0, 0, 0) for alpha in (0.0, 0.25, 0.5, 1.0)]
    return Outlook(9, models, 0.0, spread, targets)


@pytest.mark.parametrize(
    "found, begins",
    [
        (seen(0.5, 0.33, 0.12), "Keep alpha = 0.5: the raw models know"),
        (seen(0.5, 0.14, 0.12), "Keep alpha = 0.25: "),
        (seen(0.5, 0.11, 0.12), "Keep alpha = 0 (cross-entropy on the references: student_raw 0.11"),
        (seen(3.71, 0.33, 0.12), "The raw models disagree at the references (log s - log t spreads by 3.71"),
        (seen(3.71, 3.2, 3.0), "Neither raw model knows this text (cross-entropy on the references: student_raw 3.20"),
        (seen(0.3, 3.2, 3.0), "Neither raw model knows this text"),  # ignorant alike: a small spread proves nothing
        (seen(0.3, 3.2, 1.0), "Keep alpha = 0.5"),
    ],
)
def test_the_sentence_looks_at_what_the_raw_models_know_before_their_spread(found, begins):
    assert advise(found).startswith(begins)


def test_a_grid_without_small_alphas_is_not_told_that_they_lose():
    found = seen(0.5, 0.33, 0.12)
    few = replace(found, targets=[one for one in found.targets if one.alpha in (0, 1)])
    assert "no alpha of this grid lies above 0 and up to 0.5" in advise(few) and "Keep" not in advise(few)


def test_targets_that_are_no_numbers_are_refused_and_nothing_is_written(asked, capsys):
    folder = asked.root / "target"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main([*asked.words[:3], "--alphas=0.5,1e38", "references.dtype=float32", "--rows=6"]) == 2
    said = "deltakd: target: of alpha 1e+38 at temperature 1 the numbers are not finite. Write --alphas nearer to 0"
    assert said in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_targets_are_held_against_the_raw_student_at_its_temperature():
    """Another temperature's cross-entropy is higher or lower whatever the target knows."""
    found, others = seen(0.5, 0.33, 0.12), (0.5, 2.0)
    blunt = [TargetFigures(one.alpha, tau, 9.0, 1, 0, 0, 0) for one in found.targets for tau in others]
    assert advise(replace(found, targets=[*blunt, *found.targets])) == advise(found)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--alphas=0,x"], "--alphas: 0,x are no numbers"),
        (["--alphas=0,0.0"], "--alphas: 0,0.0 has one of them twice"),
        (["--alphas=0,nan"], "--alphas: 0,nan has one of them twice, or one that is not finite"),
        (["--temperatures=0"], "--temperatures: 0 is none"),
        (["--rows=0"], "--rows: 0 rows say nothing"),
        (["models.teacher_raw=null", "objective.target=teacher"], "models.teacher_raw: missing, and a delta target"),
        (["data.validation=null"], "data.validation: missing, and the target is asked there"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(lab, words, said, capsys):
    assert main(["target", str(lab.recipe), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
