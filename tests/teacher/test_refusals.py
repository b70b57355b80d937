"""Whatever is wrong is refused and counted, never reaches a loss, and whoever has no key learns nothing."""

import msgspec
import pytest
import zmq

from deltakd.base.errors import TeacherError
from deltakd.teacher.addresses import connect, new_context, remote_addresses
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
    batch_digest,
    decode,
    encode,
)
from deltakd.teacher.payloads import PayloadSpec
from deltakd.teacher.server import read_batch
from tests.teacher.contract import (
    SETTINGS,
    SPEC,
    batches,
    join,
    listening,
    serving,
    teacher_by_hand,
    terms,
)


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
        (msgspec.structs.replace(terms(), tensor_parallel=2), "tensor_parallel: 2 there, 1 here"),
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
            while members.counts["refused_unexpected"] < 5:  # the stranger's come on a line of their own
                service._look(0.1)
    assert service.counts["scored"] == 1
    assert members.counts["refused_malformed"] == 6
    assert members.counts["refused_unexpected"] == 5 and service.counts["refused_unexpected"] == 3


def test_the_server_outlives_what_is_malformed_or_asks_for_what_is_not_there(tmp_path, models):
    """A student by hand: bytes that are no batch, tokens outside the vocabulary, slots that are not there."""
    context = new_context()
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
        # Of what came, whatever the request said: so a request damaged on its way is found out.
        assert data.digest == batch_digest(tokens, starts, last) != good.digest
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


def test_a_digest_tells_apart_what_lies_on_either_side_of_a_cut():
    assert batch_digest(b"a", b"bc", b"") != batch_digest(b"ab", b"c", b"")
    with pytest.raises(TeacherError, match="not those of a packed batch"):
        read_batch(Score(0, "m", 0, 0.5, b"\0" * 8, b"\0" * 8, b"", b""), 300, "cpu")


def test_without_keys_nobody_gets_a_word_and_nothing_of_what_he_sends_arrives(tmp_path, models):
    service = tmp_path / "service"
    with listening(tmp_path, network=service) as (members, arena, facts):
        (address,) = remote_addresses(service)
        assert (service / "student-0.json").stat().st_mode & 0o777 == 0o600
        assert service.stat().st_mode & 0o777 == 0o700
        other = zmq.curve_keypair()
        pair = {"public_key": other[0].decode(), "secret_key": other[1].decode()}
        context = new_context()
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


def test_messages_come_back_as_they_were_sent():
    assert decode(encode(join())) == join()
    with pytest.raises(TeacherError, match="Refused"):
        decode(encode(join()) + b"\x00")
