"""Models that are loaded in 8 bit: smaller where it counts, whole where the student reads, and known as others."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from deltakd.base.errors import ModelError
from deltakd.models.forward import TokenBatch, supervised_hidden
from deltakd.models.load import facts, load_head, load_model
from deltakd.models.settings import ModelsSettings, WeightsSettings


def settings(dtype):
    return ModelsSettings(student=WeightsSettings(weights="x"), dtype=dtype)


def held_bytes(tensor):
    """Bytes that a weight really holds: one in 8 bit is several tensors behind the face of a large one."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    return sum(held_bytes(getattr(tensor, name)) for name in inner()[0]) if inner else tensor.nbytes


def linear_bytes(model):
    head = model.get_output_embeddings()
    return sum(held_bytes(part.weight) for part in model.modules() if isinstance(part, nn.Linear) and part is not head)


@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize("dtype,most", [("float32", 0.35), ("bfloat16", 0.7)])
def test_in_8_bit_linear_weights_take_a_byte_a_number_and_the_head_and_embedding_stay_whole(lab, name, dtype, most):
    """Tied (student) and untied (teacher). Beside the bytes there is a scale for each row: of 32 to 96 numbers here."""
    whole, small = (load_model(name, lab.folder / name, settings(dtype), in_8bit) for in_8bit in (False, True))
    assert linear_bytes(small) < most * linear_bytes(whole)
    head = small.get_output_embeddings().weight
    assert head.equal(load_head(name, lab.folder / name, getattr(torch, dtype), 300 + 20 * (name == "teacher")))
    assert small.get_input_embeddings().weight.equal(whole.get_input_embeddings().weight)


def test_in_8_bit_documents_do_not_see_their_neighbours(lab):
    """Rounding what flows through the model would: its steps are taken from all tokens of a batch."""
    model = load_model("teacher", lab.folder / "teacher", settings("float32"), True)
    draw = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 300, (30,), generator=draw)

    def hidden(first, last, starts):
        positions = torch.cat([torch.arange(b - a) for a, b in pairwise(starts)])
        batch = TokenBatch(tokens[first:last], positions, torch.tensor(starts), torch.arange(last - first))
        with torch.inference_mode():
            return supervised_hidden(model, batch, "packed")

    together, alone = hidden(0, 30, [0, 12, 30]), hidden(0, 12, [0, 12])
    # Sums of another width, in float32: some units in the last place of numbers up to 4.
    torch.testing.assert_close(together[:12], alone, rtol=0, atol=1e-5)


def test_a_model_in_8_bit_has_an_identity_of_its_own(lab):
    whole, small = (facts("teacher", lab.folder / "teacher", in_8bit) for in_8bit in (False, True))
    assert whole.identity != small.identity and whole.hidden_size == small.hidden_size


@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        ("gemma2", "final_logit_softcapping: 30.0"),
        ("cohere", "logit_scale: 0.0625"),
        ("recurrent_gemma", "logits_soft_cap: 30.0"),
        ("phi", "a bias of the head: yes"),
    ],
)
def test_logits_that_are_more_than_the_head_s_product_are_refused(tmp_path, architecture, what):
    """The loss and every payload would leave the rest out in silence."""
    config = AutoConfig.for_model(
        architecture, vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, intermediate_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    eager = settings("float32").model_copy(update={"attention": "eager"})
    with pytest.raises(ModelError, match=f"is a {architecture} whose logits are not its head's product alone .{what}"):
        load_model("models.teacher.weights", tmp_path, eager)


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_oss"])
def test_attention_that_sdpa_does_not_compute_is_refused(tmp_path, architecture):
    """It would be left out in silence, or end in a trace at the first forward."""
    config = AutoConfig.for_model(
        architecture, vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, intermediate_size=16, num_local_experts=2, num_experts_per_tok=1, final_logit_softcapping=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{architecture}, which sdpa does not compute .*attention: eager"):
        load_model("models.teacher.weights", tmp_path, settings("float32"))
    eager = settings("float32").model_copy(update={"attention": "eager"})
    assert load_model("models.teacher.weights", tmp_path, eager) is not None
