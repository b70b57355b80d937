"""Documents of one batch never see each other, on whichever side of the service and in whichever layout."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deltakd.models.attention import DOCUMENTS, register_documents
from deltakd.models.forward import TokenBatch, head_weight, supervised_hidden

VOCAB = 50


def make(architecture: str, attention: str, window: int | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
    config = AutoConfig.for_model(
        architecture, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, attn_implementation=attention, **sliding,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim > 1 else 1  # attention that looks around
    return model


def batch_of(documents: list[torch.Tensor]) -> TokenBatch:
    lengths = torch.tensor([len(document) for document in documents])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return TokenBatch(torch.cat(documents), positions, starts, torch.arange(int(starts[-1])))


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("attention", [register_documents(), "sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@torch.no_grad()
def test_changing_a_document_leaves_the_logits_of_all_others_alone(architecture, attention, layout):
    model = make(architecture, attention)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, VOCAB, (n,), generator=generator) for n in (9, 4, 5, 2, 7)]
    before = batch_of(documents)
    logits = supervised_hidden(model, before, layout) @ head_weight(model).T
    for changed in range(len(documents)):
        others = [(document + 1) % VOCAB if i == changed else document for i, document in enumerate(documents)]
        moved = supervised_hidden(model, batch_of(others), layout) @ head_weight(model).T
        for i in range(len(documents)):
            rows = slice(int(before.starts[i]), int(before.starts[i + 1]))
            same = torch.equal(moved[rows], logits[rows])
            assert same == (i != changed), f"document {i} after a change of {changed}"


@pytest.mark.parametrize("layout", ["packed", "padded"])
@torch.no_grad()
def test_a_document_in_a_batch_is_the_document_alone(layout):
    model = make("qwen2", DOCUMENTS)
    documents = [torch.arange(n) % VOCAB for n in (3, 8, 1, 6)]
    together = supervised_hidden(model, batch_of(documents), layout)
    alone = torch.cat([model.get_decoder()(input_ids=d[None], use_cache=False).last_hidden_state[0] for d in documents])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)  # fp32, other shapes of the same products


@pytest.mark.parametrize("window", [None, 3])
@torch.no_grad()
def test_documents_attend_as_transformers_own_mask_lets_them(window):
    """The same weights with a mask of [tokens, tokens]; a window of three tokens makes all but one document longer."""
    models = [make("qwen2", attention, window) for attention in (register_documents(), "eager")]
    batch = batch_of([torch.arange(n) % VOCAB for n in (3, 8, 1, 6)])
    ours, theirs = (supervised_hidden(model, batch, "packed") for model in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if window:
        assert not torch.allclose(ours, supervised_hidden(make("qwen2", DOCUMENTS), batch, "packed"), atol=1e-2)
