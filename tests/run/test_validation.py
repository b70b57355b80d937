"""Validation while a run trains: what it measures, which weights it calls the best, and when it ends the training."""

import gzip
import json
import shutil
from dataclasses import replace
from itertools import count

import pytest
import torch
from safetensors.torch import load_file

from deltakd.base.errors import Stopped
from deltakd.base.ranks import Placement, SoloWorld, assign_role
from deltakd.base.rundir import RunDirectory
from deltakd.data.conversation import Conversation
from deltakd.data.formats import read_row
from deltakd.data.packing import pack
from deltakd.data.sources import load_rows
from deltakd.data.template import ChatTemplate
from deltakd.data.tokenizer import load_tokenizer
from deltakd.evaluate.cross_entropy import cross_entropy_rows
from deltakd.recipe.build import build_parts
from deltakd.recipe.inputs import read_examples, read_inputs
from deltakd.recipe.load import load
from deltakd.train.checkpoints import newest
from deltakd.train.loop import train
from tests.run.test_resume import PLAIN

MEASURED = ("loss", "cross_entropy", "kl_to_target", "rouge1", "rouge2", "rougeL")


def cross_entropy(lab, export):
    """Per token, over the held-out rows, by the code of the evaluate stage."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(str(export), False)
    template = ChatTemplate(tokenizer)
    rows = [read_row(row, "messages", where) for where, row in load_rows(load(str(lab.recipe)).recipe.data.validation)]
    examples = [template.encode([row])[0] for row in rows if isinstance(row, Conversation)]
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    means = cross_entropy_rows(model, [pack([example]) for example in examples], len(tokenizer))
    counts = [int(example.supervised.sum()) for example in examples]
    return sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)


def test_it_measures_held_out_rows_keeps_the_best_and_ends_when_nothing_gets_better(lab, capfd):
    """A rate that is too high: the training learns its rows by heart, and what is held out gets worse again."""
    settings = ["train.steps=60", "train.learning_rate=3.0e-2", "objective.sft_weight=1.0", *PLAIN]
    settings += ["validation={every_steps: 3, stop_after: 2, export: best, answers_every: 1, num_prompts: 4}"]
    settings += ["records={profile: {first_step: 2, last_step: 3}, tensorboard: true}"]
    lab.train("early", *settings)
    directory, lines = lab.folder / "runs" / "early", lab.lines("early", "validation.jsonl")
    finished = json.loads((directory / "finished.json").read_text())
    losses = [line["loss"] for line in lines]
    best = min(range(len(lines)), key=losses.__getitem__)
    assert len(losses) == best + 3 and [line["is_best"] for line in lines[best:]] == [True, False, False], losses
    assert finished["steps"] == lines[-1]["step"] == 3 * len(lines) < 60
    assert finished["best_step"] == finished["exported_step"] == lines[best]["step"]
    assert cross_entropy(lab, directory / "export") == pytest.approx(lines[best]["cross_entropy"], rel=1e-5)
    first, second = (load_file(directory / name / "model.safetensors") for name in ("best", "export"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    samples = lab.lines("early", "samples.jsonl")
    assert len(samples) == 3 * len(lines) and all(0 <= line["rougeL"] <= 1 for line in lines)
    out, err = capfd.readouterr()
    said = out + err
    assert f"finished after {lines[-1]['step']} steps of 60" in said and json.dumps(samples[-3]["answer"])[:60] in said
    assert "attention: sdpa (flash_attention_2 needs a GPU)" in said
    with gzip.open(directory / "trace" / "steps-2-3.json.gz") as trace:
        assert any("deltakd" in str(event) or "aten::mm" in str(event) for event in json.load(trace)["traceEvents"])
    lab.train("early", *settings)
    assert "nothing to do" in capfd.readouterr().out


def test_two_ranks_measure_what_one_does(lab):
    """FSDP2: every rank takes its share of rows and prompts, and generates with weights that it shares."""
    settings = ["train.steps=4", "validation={every_steps: 2, answers_every: 1, num_prompts: 5}", *PLAIN]
    lab.train("validated_by_one", *settings)
    lab.train("validated_by_two", *settings, "engine={name: fsdp2}", ranks=2)
    one, two = (lab.lines(f"validated_by_{name}", "validation.jsonl") for name in ("one", "two"))
    for mine, theirs in zip(one, two, strict=True):
        for name in MEASURED:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
        assert mine["num_supervised"] == theirs["num_supervised"]


def test_a_run_that_ended_early_ends_there_again(lab):
    """Killed while it exported: its last checkpoint holds the last step and the last validation."""
    settings = ["train.steps=60", "train.learning_rate=3.0e-2", "objective.sft_weight=1.0", *PLAIN]
    settings += ["validation={every_steps: 3, stop_after: 1}"]
    before = lab.train("early_twice", *settings)
    run = lab.folder / "runs" / "early_twice"
    (run / "finished.json").unlink()
    shutil.rmtree(run / "export")
    assert len(before) < 60 and lab.train("early_twice", *settings) == before and (run / "export").is_dir()
    assert "teachers.look_ahead" in lab.refuses("early_twice", *settings, "teachers.look_ahead=0")
    more = lab.train("early_twice", *settings, "validation.stop_after=2")
    assert more[: len(before)] == before and len(before) < len(more) <= 60


class Kept:
    """A recorder that keeps everything."""

    def __init__(self) -> None:
        self.steps, self.validations, self.samples = [], [], []

    def begins(self, step) -> None:
        pass

    def write(self, record) -> None:
        self.steps.append((record.step, record.loss, record.grad_norm))

    def validated(self, record, samples) -> None:
        self.validations.append(replace(record, validation_s=0.0))
        self.samples += samples


@pytest.mark.parametrize("asked_at,step", [(4, 1), (5, 2), (6, 2), (9, 2), (10, 2), (14, 4), (18, 4)])
def test_stopped_anywhere_in_a_validation_it_goes_on_as_if_it_had_not(lab, asked_at, step):
    """It is asked before each of a step's two micro-batches; in a validation before two and after three more."""
    settings = ["train.steps=4", "checkpoints.every_steps=null", "evaluation.batch_size=2", *PLAIN]
    settings += ["validation={every_steps: 2, answers_every: 1, num_prompts: 5, max_new_tokens: 4}"]

    def life(run, records, stop):
        loaded = load(str(lab.recipe), [f"run={run}", *settings])
        inputs = read_inputs(loaded.recipe, loaded.where)
        examples, role = read_examples(loaded.recipe, inputs.tokenizer, False), assign_role(Placement(0, 1, 0, 1), 0)
        directory = RunDirectory(lab.folder / "runs" / run)
        saved, _ = newest(directory.path)
        parts = build_parts(inputs, examples, role, SoloWorld(), None, directory, saved, stop)
        train(parts, records)
        return saved

    whole, name = Kept(), f"asked_{asked_at}"
    life(f"{name}_whole", whole, lambda: None)
    parts, calls = Kept(), count(1)
    with pytest.raises(Stopped):
        life(name, parts, lambda: "a test" if next(calls) == asked_at else None)
    before = len(parts.validations)
    saved = life(name, parts, lambda: None)
    assert parts.steps == whole.steps and parts.validations == whole.validations and parts.samples == whole.samples
    assert saved.step == step and before == saved.validation["num_done"] == (asked_at > 9)
