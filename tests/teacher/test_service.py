"""The service over real sockets and shared memory: answers are right, in order, and as exact as models in process."""

from contextlib import ExitStack

import pytest
import torch

from deltakd.base.errors import TeacherError
from deltakd.data.packing import blank_batch
from deltakd.losses import objective
from deltakd.models.load import load_model
from deltakd.teacher.payloads import FrozenModels, PayloadSpec
from deltakd.teacher.references import InProcessReferences
from tests.teacher.contract import (
    DELTA,
    FLOAT32,
    SPEC,
    batches,
    references,
    serving,
)


@pytest.mark.parametrize("teachers,network", [(1, False), (3, False), (1, True), (2, True)])
@pytest.mark.parametrize("kind", ["hidden", "logits", "target", "top_k", "sampled"])
def test_answers_arrive_in_order_and_equal_those_in_process_bit_for_bit(tmp_path, models, kind, teachers, network):
    """More batches than slots; a blank one in the middle asks nothing and waits for nothing."""
    spec = PayloadSpec(kind, "float32", "packed", 300, {"top_k": 8, "sampled": 5}.get(kind, 0))
    served = {"teacher": models["teacher"]} if spec.keeps_models_apart else models
    asked = [*batches(3), (blank_batch(), 0.5), *batches(3, alpha=0.25)]
    here = InProcessReferences(FrozenModels(served, spec, objective(DELTA), seed=7), {}).ahead(asked)
    service = tmp_path / "service" if network else None
    with ExitStack() as stack:
        for index in range(teachers):
            stack.enter_context(serving(tmp_path, served, spec, str(index), service))
        there = stack.enter_context(references(tmp_path, tuple(served), spec, network=service))
        for (batch, _), (mine, payloads), (_, expected) in zip(asked, there.ahead(asked), here, strict=True):
            assert mine is batch and payloads.keys() == expected.keys()
            assert len(payloads) == (1 if batch.num_supervised else 0)
            for name, payload in payloads.items():
                for one, other in zip(parts(payload), parts(expected[name]), strict=True):
                    assert one.equal(other) and one.isfinite().all()
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


def parts(payload):
    if isinstance(payload, torch.Tensor):
        return [payload]
    return [value for value in vars(payload).values() if value is not None]


def test_requests_run_ahead_of_the_batch_in_training_and_stop_at_the_slots(tmp_path, models):
    taken = []

    def counted():
        for pair in batches(9):
            taken.append(pair)
            yield pair

    with serving(tmp_path, {"teacher": models["teacher"]}), references(tmp_path) as service:
        for number, _ in enumerate(service.ahead(counted()), start=1):
            assert len(taken) == min(9, number + 2)


def test_what_stands_behind_a_none_is_looked_at_when_all_before_it_has_been_taken(tmp_path, models):
    taken = []

    def asked():
        for number, pair in enumerate(batches(6), start=1):
            if number == 4:
                yield None
            taken.append(number)
            yield pair

    with serving(tmp_path, {"teacher": models["teacher"]}), references(tmp_path) as service:
        seen = [(number, max(taken)) for number, _ in enumerate(service.ahead(asked()), start=1)]
    assert seen == [(1, 3), (2, 3), (3, 3), (4, 6), (5, 6), (6, 6)]


def test_a_teacher_of_several_models_answers_with_the_one_that_was_asked(tmp_path, models):
    pair = {name: models[name] for name in ("teacher", "teacher_raw")}
    ((batch, alpha),) = batches(1)
    with serving(tmp_path, pair), references(tmp_path, tuple(pair)) as service:
        _, payloads = next(service.ahead([(batch, alpha)]))
        for name, model in pair.items():
            (own,) = FrozenModels({name: model}, SPEC, objective(DELTA)).payload(name, batch, alpha, b"")
            assert payloads[name].equal(own)
    assert not payloads["teacher"].equal(payloads["teacher_raw"])


def test_models_on_ranks_of_their_own_answer_together(tmp_path, models):
    names = ("teacher", "teacher_raw")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(serving(tmp_path, {name: models[name]}, name=name))
        service = stack.enter_context(references(tmp_path, names))
        assert all(payloads.keys() == set(names) for _, payloads in service.ahead(batches(3)))


def test_a_number_that_the_payload_cannot_hold_stops_the_run_with_its_count(tmp_path, lab):
    """Final norm scaled by 1e6: hidden states of 1e6 are beyond float16's 65,504."""
    loud = load_model("teacher", lab.folder / "teacher", FLOAT32)
    loud.get_decoder().norm.weight.data *= 1e6
    spec = PayloadSpec("hidden", "float16", "packed", 300)
    with serving(tmp_path, {"teacher": loud}, spec), references(tmp_path, spec=spec) as service:
        said = r"teacher 0 on .* log .*: teacher \(request 0\): [\d,]+ of [\d,]+ numbers are not finite in float16"
        with pytest.raises(TeacherError, match=said):
            next(service.ahead(batches(1)))
