"""The service over real sockets and shared memory: answers are right, and whatever is wrong never reaches a loss."""

from contextlib import ExitStack
from dataclasses import replace

import msgspec
import pytest
import torch
import zmq

from deltakd.base.errors import RunError, TeacherError
from deltakd.data.packing import blank_batch
from deltakd.losses import linear_loss, objective
from deltakd.models.load import load_model
from deltakd.teacher.addresses import connect, remote_addresses
from deltakd.teacher.arena import Arena
from deltakd.teacher.client import ServiceReferences
from deltakd.teacher.messages import (
    PROTOCOL,
    Alive,
    Failed,
    Join,
    Leave,
    Refused,
    Score,
    Scored,
    Welcome,
    decode,
    encode,
)
from deltakd.teacher.payloads import FrozenModels, PayloadSpec
from deltakd.teacher.references import InProcessReferences
from deltakd.teacher.server import Offer, TeacherServer, read_batch
from tests.teacher.contract import (
    DELTA,
    FLOAT32,
    SETTINGS,
    SPEC,
    batches,
    join,
    listening,
    references,
    serving,
    teacher_by_hand,
    terms,
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


def test_requests_run_ahead_of_the_batch_in_training_and_stop_at_the_slots(tmp_path, models):
    taken = []

    def counted():
        for pair in batches(9):
            taken.append(pair)
            yield pair

    with serving(tmp_path, {"teacher": models["teacher"]}), references(tmp_path) as service:
        for number, _ in enumerate(service.ahead(counted()), start=1):
            assert len(taken) == min(9, number + 2)


@pytest.mark.parametrize(
    "theirs,said",
    [
        (terms(launch="another"), "launch: another there, test here"),
        (terms(tokenizer="other"), "tokenizer: other there, fingerprint here"),
        (
            terms(PayloadSpec("hidden", "float16", "packed", 300)),
            "payload: hidden, float16 there, hidden, float32 here",
        ),
        (terms(PayloadSpec("hidden", "float32", "padded", 300)), "layout: padded there, packed here"),
        (terms(PayloadSpec("hidden", "float32", "packed", 299)), "vocab_size: 299 there, 300 here"),
        (msgspec.structs.replace(terms(), protocol=1), f"protocol: 1 there, {PROTOCOL} here"),
        (terms(wanted="alpha 1"), "objective: alpha 1 there,  here"),
    ],
)
def test_a_teacher_that_differs_is_refused_with_both_values_and_the_others_serve_on(tmp_path, models, theirs, said):
    served = {"teacher": models["teacher"]}
    with listening(tmp_path) as (members, arena, facts):
        with serving(tmp_path, served, terms=theirs) as stranger, serving(tmp_path, served, name="1"):
            service = ServiceReferences(members, arena, facts, {}, SPEC, SETTINGS)
            assert len(list(service.ahead(batches(3)))) == 3
            while not members.counts["refused_join"]:
                list(members.receive(0.1))
            stranger.thread.join(20)
    assert said in str(stranger.error)


def test_other_weights_are_refused_and_named(tmp_path):
    with listening(tmp_path) as (members, *_), teacher_by_hand(tmp_path) as dealer:
        dealer.send(encode(join(models={"teacher": "w2"})))
        list(members.receive(5.0))
        assert decode(dealer.recv()) == Refused("weights of teacher: w2 there, w1 here")
        assert not members.everyone()


def test_a_number_that_the_payload_cannot_hold_stops_the_run_with_its_count(tmp_path, lab):
    """Final norm scaled by 1e6: hidden states of 1e6 are beyond float16's 65,504."""
    loud = load_model("teacher", lab.folder / "teacher", FLOAT32)
    loud.get_decoder().norm.weight.data *= 1e6
    spec = PayloadSpec("hidden", "float16", "packed", 300)
    with serving(tmp_path, {"teacher": loud}, spec), references(tmp_path, spec=spec) as service:
        said = r"teacher 0 on .* log .*: teacher \(request 0\): [\d,]+ of [\d,]+ numbers are not finite in float16"
        with pytest.raises(TeacherError, match=said):
            next(service.ahead(batches(1)))


def answering(dealer, members, arena, facts, answer, settings=SETTINGS):
    """Let a teacher by hand join and answer one request; return what the student makes of it."""
    dealer.send(encode(join()))
    service = ServiceReferences(members, arena, facts, {}, SPEC, settings)
    assert isinstance(decode(dealer.recv()), Welcome)
    service._ask(*batches(1)[0])
    score = decode(dealer.recv())
    good = Scored(score.request, score.slot, SPEC.num_bytes(len(score.supervised) // 8, 48), score.digest, 0.0, 0.0)
    for message in answer(good):
        dealer.send_multipart(message)
    dealer.send(encode(Leave()))  # the last that is read
    while members.everyone():
        service._look(0.1)
    return service


@pytest.mark.parametrize(
    "changes", [{"digest": b"x" * 16}, {"slot": 1}, {"num_bytes": 8}], ids=["other tokens", "other slot", "other size"]
)
def test_an_answer_that_is_not_about_the_request_stops_the_run(tmp_path, changes):
    with listening(tmp_path) as (members, arena, facts), teacher_by_hand(tmp_path) as dealer:
        with pytest.raises(TeacherError, match="Start both from one recipe"):
            answering(dealer, members, arena, facts, lambda good: [[encode(msgspec.structs.replace(good, **changes))]])


def test_what_nobody_asked_for_is_refused_and_counted_and_reaches_no_loss(tmp_path):
    """Malformed, foreign, early, repeated, of another request, with a payload where there is a slot."""

    def answer(good):
        return [
            [b""],
            [b"\xc1"],
            [encode(good)[:-1]],
            [encode(good) + b"x"],
            [msgspec.msgpack.encode({"type": "Nothing"})],
            [b"four", b"frames", b"are", b"many"],
            [encode(good), b"bytes that belong into the slot"],
            [encode(msgspec.structs.replace(good, request=999))],
            [encode(Failed(998, 0, "of another"))],
            [encode(Alive(b"nobody"))],
            [encode(Score(1, "teacher", 0, 0.5, b"", b"", b"", b""))],
            [encode(good)],
            [encode(good)],
        ]

    with listening(tmp_path) as (members, arena, facts), teacher_by_hand(tmp_path) as dealer:
        with teacher_by_hand(tmp_path, b"stranger") as other:
            other.send(encode(Scored(0, 0, 0, b"", 0.0, 0.0)))  # well formed, before any Join
            other.send(encode(Leave()))
            service = answering(dealer, members, arena, facts, answer)
    assert service.counts["scored"] == 1
    assert members.counts["refused_malformed"] == 6
    assert members.counts["refused_unexpected"] == 5 and service.counts["refused_unexpected"] == 3


def test_the_server_outlives_what_is_malformed_or_asks_for_what_is_not_there(tmp_path, models):
    """A student by hand: bytes that are no batch, tokens outside the vocabulary, slots that are not there."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.rcvtimeo = 20_000
    router.bind(f"ipc://{tmp_path}/student-0.sock")
    words = [part.to_bytes(8, "little") for part in (1, 2, 3)]
    tokens, starts, last = b"".join(words), (0).to_bytes(8, "little") + words[2], words[1]
    good = Score(1, "teacher", 0, 0.5, tokens, starts, last, b"")
    wrong = [
        {"model": "nobody"},
        {"slot": 99},
        {"slot": -1},
        {"tokens": tokens[:-1]},
        {"tokens": (10**6).to_bytes(8, "little") * 3},
        {"tokens": b"\xff" * 24},
        {"starts": b""},
        {"starts": words[0] + words[2]},
        {"supervised": words[2]},
        {"supervised": b""},
    ]
    with Arena(tmp_path / "arena-0", 4096, 2, owner=True), serving(tmp_path, {"teacher": models["teacher"]}) as server:
        peer, data = take(router)
        assert isinstance(data, Join)
        for junk in ([encode(good)], [b"\xc1"], [b""], [b"two", b"frames"]):  # the first is good, but early
            router.send_multipart([peer, *junk])
        router.send_multipart([peer, encode(Welcome(0, "../elsewhere", 4096, 2))])
        router.send_multipart([peer, encode(Welcome(0, "arena-0", 4096, 2))])
        for changes in wrong:
            router.send_multipart([peer, encode(msgspec.structs.replace(good, **changes))])
            peer, data = take(router)
            assert isinstance(data, Failed), changes
        router.send_multipart([peer, encode(good)])
        peer, data = take(router)
        assert isinstance(data, Scored) and data.num_bytes == 48 * 4
    router.close(linger=0)
    context.term()
    assert server.counts["refused_malformed"] == 3 and server.counts["refused_unexpected"] == 2
    assert server.counts["failed"] == len(wrong) and server.counts["scored"] == 1


def take(router):
    """Return the next message of a teacher that is not its heart's."""
    while True:
        peer, data = router.recv_multipart()
        if not isinstance(message := decode(data), Alive):
            return peer, message


def test_the_digest_of_an_answer_is_of_the_tokens_that_the_teacher_saw(models):
    """A request damaged on its way carries the digest of what was sent, and is answered with that of what came."""
    from deltakd.teacher.messages import batch_digest

    assert batch_digest(b"a", b"bc", b"") != batch_digest(b"ab", b"c", b"")
    with pytest.raises(TeacherError, match="not those of a packed batch"):
        read_batch(Score(0, "m", 0, 0.5, b"\0" * 8, b"\0" * 8, b"", b""), 300, "cpu")


def test_a_silent_teacher_s_requests_go_to_another_and_its_slots_wait_for_its_last_word(tmp_path, models):
    """By hand and slow, then woken: its late answer is refused by number, and only then is its slot used again."""
    quick = {"teacher": models["teacher"]}
    with listening(tmp_path, silent_s=0.5) as (members, arena, facts), teacher_by_hand(tmp_path) as slow:
        slow.send(encode(join(log="the slow one's")))
        service = ServiceReferences(members, arena, facts, {}, SPEC, SETTINGS)
        assert isinstance(decode(slow.recv()), Welcome)
        service._ask(*batches(1)[0])  # goes to the slow one: it is alone
        late = decode(slow.recv())
        with serving(tmp_path, quick, name="quick"):
            while not service.counts["asked_again"]:
                service._look(0.1)
            for _ in service.ahead(batches(4)):
                assert late.slot not in [request.score.slot for request in service._open.values()]
                assert late.slot not in service._free
            slow.send(encode(Scored(late.request, late.slot, 1, b"", 0.0, 0.0)))
            while late.slot not in service._free:
                service._look(0.1)
            assert service.counts["refused_late"] == 1


def test_when_nobody_is_left_the_run_stops_and_says_who_it_was_and_where_its_log_is(tmp_path):
    settings = replace(SETTINGS, give_up_s=0.3)
    with listening(tmp_path, silent_s=0.2) as (members, arena, facts), teacher_by_hand(tmp_path) as silent:
        silent.send(encode(join()))
        service = ServiceReferences(members, arena, facts, {}, SPEC, settings)
        said = r"teacher \(.* tokens\): no teacher could be asked for 0\.3 s\. .*teacher 0 on h .*log a log.*not heard"
        with pytest.raises(TeacherError, match=said):
            list(service.ahead(batches(1)))


def test_a_teacher_whose_heart_beats_but_that_does_not_answer_is_asked_no_more(tmp_path, models):
    settings = replace(SETTINGS, answer_s=0.3)
    with listening(tmp_path) as (members, arena, facts), teacher_by_hand(tmp_path) as stuck:
        stuck.send(encode(join()))
        service = ServiceReferences(members, arena, facts, {}, SPEC, settings)
        stuck.send(encode(Alive(b"by hand")))
        with serving(tmp_path, {"teacher": models["teacher"]}, name="quick"):
            assert len(list(service.ahead(batches(2)))) == 2
        assert members.counts["stuck"] == 1


def test_without_keys_nobody_gets_a_word_and_nothing_of_what_he_sends_arrives(tmp_path, models):
    service = tmp_path / "service"
    with listening(tmp_path, network=service) as (members, arena, facts):
        (address,) = remote_addresses(service)
        assert (service / "student-0.json").stat().st_mode & 0o777 == 0o600
        assert service.stat().st_mode & 0o777 == 0o700
        other = zmq.curve_keypair()
        pair = {"public_key": other[0].decode(), "secret_key": other[1].decode()}
        context = zmq.Context()
        plain = connect(context, msgspec.structs.replace(address, server_key=""), b"plain")
        foreign = connect(context, msgspec.structs.replace(address, **pair), b"foreign")
        for dealer in (plain, foreign):
            dealer.send(encode(join()))
        with serving(tmp_path, {"teacher": models["teacher"]}, network=service):
            there = ServiceReferences(members, arena, facts, {}, SPEC, SETTINGS)
            assert len(list(there.ahead(batches(3)))) == 3
            assert [member.join.name for member in members.everyone()] == ["0"]
            assert not plain.poll(300) and not foreign.poll(300)
        context.destroy(linger=0)
        assert members.counts["joined"] == 1 and not members.counts["refused_malformed"]


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


def test_a_teacher_to_which_no_student_comes_does_not_wait_for_ever(tmp_path, models):
    frozen = FrozenModels({"teacher": models["teacher"]}, SPEC, objective(DELTA))
    with TeacherServer(Offer(frozen, {"teacher": "w1"}, terms(), "0"), lambda: [], tmp_path) as server:
        with pytest.raises(TeacherError, match=r"no student has come for 0\.1 s"):
            server.serve(0.1, lambda: None)


def test_messages_come_back_as_they_were_sent():
    assert decode(encode(join())) == join()
    with pytest.raises(TeacherError, match="Refused"):
        decode(encode(join()) + b"\x00")


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
