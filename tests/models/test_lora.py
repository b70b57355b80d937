"""Adapters: what is trained, where they begin, and that a merged export is the model that was trained."""

import copy

import pytest
import torch
from torch import nn

from deltakd.base.errors import ModelError
from deltakd.engine.protocol import trained
from deltakd.models.load import load_model
from deltakd.models.lora import add_lora, merge_lora
from deltakd.models.settings import LoraSettings, ModelsSettings, WeightsSettings

SETTINGS = ModelsSettings(student=WeightsSettings(weights="x"), dtype="float32")


@pytest.fixture(params=["student", "teacher"])
def model(lab, request):
    """Tied embeddings and untied ones."""
    return load_model("student", lab.folder / request.param, SETTINGS)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


def test_adapters_begin_at_nothing_and_are_all_that_is_trained(model):
    before = logits(model)
    linear = sum(isinstance(part, nn.Linear) for part in model.modules())
    add_lora("models.lora", model, LoraSettings(rank=3), seed=5)
    assert torch.equal(logits(model), before)
    names = list(trained(model))
    assert len(names) == 2 * (linear - 1) and all(".lora_" in name for name in names)  # all but the head


def test_the_merged_weights_speak_as_the_adapters_do(lab, model):
    plain = copy.deepcopy(model)
    add_lora("models.lora", model, LoraSettings(rank=3, alpha=7.0), seed=5)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    merged = merge_lora(model, {name: parameter.detach() for name, parameter in model.named_parameters()})
    assert merged.keys() == dict(plain.named_parameters()).keys()
    before = logits(plain)
    plain.load_state_dict(merged, strict=False)
    assert (logits(plain) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_adapters_whatever_was_drawn_before(lab):
    made = []
    for drawn in (0, 3):
        torch.rand(drawn)
        model = load_model("student", lab.folder / "student", SETTINGS)
        add_lora("models.lora", model, LoraSettings(rank=3), seed=5)
        made.append(trained(model))
    assert all(torch.equal(parameter, made[1][name]) for name, parameter in made[0].items())


def test_layers_that_are_not_there_are_refused(model):
    with pytest.raises(ModelError, match=r"models\.lora: \['nowhere'\] names no linear layer"):
        add_lora("models.lora", model, LoraSettings(layers=["nowhere"]), seed=5)


def test_an_adapter_of_the_head_or_of_embeddings_is_refused(model):
    """The loss reads the head's weight, and a tied one is the embedding's."""
    with pytest.raises(ModelError, match=r"lm_head can have no adapter"):
        add_lora("models.lora", model, LoraSettings(layers=["q_proj", "lm_head"]), seed=5)
