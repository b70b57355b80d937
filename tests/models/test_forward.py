"""Documents of one batch never see each other, on whichever side of the service and in whichever layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from deltakd.models.forward import TokenBatch, head_weight, lay_out, supervised_hidden

VOCAB = 50


def make(architecture: str, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, attn_implementation=attention,
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
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@torch.no_grad()
def test_changing_a_document_leaves_the_logits_of_all_others_alone(architecture, attention, layout):
    """Lengths 9, 4, 5, 2, 7: 4 and 5 share a row, as 2 and 7 do, and the first fills one alone."""
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
    model = make("qwen2", "sdpa")
    documents = [torch.arange(n) % VOCAB for n in (3, 8, 1, 6)]
    together = supervised_hidden(model, batch_of(documents), layout)
    alone = torch.cat([model.get_decoder()(input_ids=d[None], use_cache=False).last_hidden_state[0] for d in documents])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)  # fp32, other shapes of the same products


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_packed_rows_hold_every_document_whole_and_apart(lengths):
    width = max(lengths)
    rows, columns = lay_out(lengths, width, "packed")
    cells = {(int(r), int(c) + i) for r, c, n in zip(rows, columns, lengths, strict=True) for i in range(n)}
    assert len(cells) == sum(lengths)
    assert max(column for _, column in cells) < width
    assert len({row for row, _ in cells}) <= 2 * sum(lengths) / width + 1  # first fit leaves no two rows half empty
