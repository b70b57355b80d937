"""A batch says the same as its examples, and labels are shifted exactly once and never across documents."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltakd.data.examples import Example
from deltakd.data.packing import blank_batch, pack


def example(tokens: list[int], learnt: list[int]) -> Example:
    supervised = np.zeros(len(tokens), dtype=np.bool_)
    supervised[learnt] = True
    return Example(np.array(tokens, dtype=np.int32), supervised)


@st.composite
def any_example(draw) -> Example:
    tokens = draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    return example(tokens, sorted(draw(st.sets(st.integers(1, len(tokens) - 1)))) if len(tokens) > 1 else [])


@given(st.lists(any_example(), min_size=1, max_size=6))
def test_examples_can_be_read_back_from_their_batch(examples):
    batch = pack(examples)
    learnt = torch.zeros(batch.num_tokens, dtype=torch.bool)
    learnt[batch.supervised + 1] = True  # the label's own place is one after the position that predicts it
    for index, (begin, end) in enumerate(zip(batch.starts[:-1], batch.starts[1:], strict=True)):
        assert batch.tokens[begin:end].tolist() == examples[index].tokens.tolist()
        assert batch.positions[begin:end].tolist() == list(range(len(examples[index].tokens)))
        assert learnt[begin:end].tolist() == examples[index].supervised.tolist()
    assert len(batch.starts) == len(examples) + 1 and batch.starts[-1] == batch.num_tokens


@given(st.lists(any_example(), min_size=1, max_size=6))
def test_every_label_is_the_token_after_its_position_in_the_same_document(examples):
    batch = pack(examples)
    assert batch.labels.tolist() == batch.tokens[batch.supervised + 1].tolist()
    assert (batch.positions[batch.supervised + 1] == batch.positions[batch.supervised] + 1).all()
    assert batch.num_supervised == len(batch.labels) == sum(int(one.supervised.sum()) for one in examples)
    fields = (batch.tokens, batch.positions, batch.starts, batch.supervised, batch.labels)
    assert all(field.dtype == torch.int64 for field in fields)


def test_a_first_token_that_claims_to_be_a_label_is_refused():
    good, bad = example([1, 2], [1]), example([3, 4], [0, 1])
    for examples in ([bad], [good, bad]):
        with pytest.raises(ValueError, match="first token"):
            pack(examples)


def test_a_blank_batch_is_one_token_that_teaches_nothing():
    batch = blank_batch(7)
    assert batch.tokens.tolist() == [7] and batch.starts.tolist() == [0, 1]
    assert batch.num_supervised == 0 and batch.supervised.dtype == batch.labels.dtype == torch.int64
