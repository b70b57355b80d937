"""Where payloads lie: arenas, slots, and arrays side by side in them; and what they say of one target."""

import pytest
import torch

from deltakd.base.errors import RunError
from deltakd.losses import linear_loss, objective
from deltakd.teacher.arena import Arena
from deltakd.teacher.payloads import FrozenModels, PayloadSpec
from deltakd.teacher.references import InProcessReferences
from tests.teacher.contract import (
    DELTA,
    batches,
)


def test_the_whole_target_gives_the_loss_that_its_models_give_apart(models):
    """Formed on the teacher's side at the request's alpha, or by the loss from hidden states: one number."""
    ((batch, _),) = batches(1)
    generator = torch.Generator().manual_seed(1)
    student, head = (
        torch.randn(batch.num_supervised, 16, generator=generator),
        torch.randn(300, 16, generator=generator),
    )
    heads = {name: model.get_output_embeddings().weight[:300].detach() for name, model in models.items()}
    totals = {}
    for kind in ("hidden", "target"):
        frozen = FrozenModels(models, PayloadSpec(kind, "float32", "packed", 300), objective(DELTA))
        source = InProcessReferences(frozen, heads if kind == "hidden" else {})
        for alpha in (0.5, 0.25):
            ((_, payloads),) = source.ahead([(batch, alpha)])
            result = linear_loss(student, head, payloads, batch.labels, objective(DELTA).at(alpha))
            totals[kind, alpha] = float(result.total)
    assert totals["hidden", 0.5] == pytest.approx(totals["target", 0.5], rel=1e-5)
    assert totals["hidden", 0.25] == pytest.approx(totals["target", 0.25], rel=1e-5)
    assert totals["hidden", 0.25] != pytest.approx(totals["hidden", 0.5], rel=1e-3)


def test_an_arena_that_does_not_fit_says_how_much_it_needs_before_any_memory_is_taken(tmp_path):
    with pytest.raises(RunError, match=r"the slots need [\d,.]+ MiB, [\d,.]+ MiB are free\. Lower"):
        Arena(tmp_path / "arena", 2**50, 2, owner=True)
    assert not list(tmp_path.iterdir())


def test_slots_do_not_overlap_and_a_payload_that_is_too_large_is_refused(tmp_path):
    with Arena(tmp_path / "arena", 4096, 3, owner=True) as arena:
        other = Arena(tmp_path / "arena", 4096, 3, owner=False)
        for index in range(3):
            other.slot(index, 4096).fill_(index + 1)
        assert all((arena.slot(index, 4096) == index + 1).all() for index in range(3))
        for index, num_bytes in ((0, 4097), (3, 1), (-1, 1)):
            with pytest.raises(RunError, match="do not fit"):
                arena.slot(index, num_bytes)


@pytest.mark.parametrize("kind", ["hidden", "logits", "target", "top_k", "sampled"])
def test_arrays_of_a_payload_lie_side_by_side_in_a_slot_and_none_reaches_into_another(kind):
    spec = PayloadSpec(kind, "float16", "packed", 301, 7)
    for num_tokens in (1, 3, 64):
        data = torch.zeros(spec.num_bytes(num_tokens, 5), dtype=torch.uint8)
        for index, array in enumerate(spec.split(data, num_tokens, 5)):
            array.fill_(index + 1)
        assert all((array == index + 1).all() for index, array in enumerate(spec.split(data, num_tokens, 5)))
