"""A hundred thousand messages that are wrong in every way that we could think of: refused, counted, and forgotten."""

import random
import threading

import msgspec
import psutil
import torch
import zmq

from deltakd.base.errors import TeacherError
from deltakd.teacher.addresses import connect, local_addresses, new_context
from deltakd.teacher.arena import Arena
from deltakd.teacher.client import ServiceReferences
from deltakd.teacher.messages import (
    MAX_MESSAGE_BYTES,
    Alive,
    Bye,
    Failed,
    Join,
    Leave,
    Refused,
    Score,
    Scored,
    Terms,
    Welcome,
    decode,
    encode,
)
from tests.teacher.contract import SETTINGS, SPEC, batches, listening, serving

MESSAGES = 100_000
GROWTH_BYTES = 48 * 2**20  # queues and allocator slack; a leak of one message each would be several times that


def seeds():
    """One good message of every kind, none of which anybody waits for."""
    terms = Terms(2, "another launch", "t", "hidden, float32", "", "packed", 300)
    words = b"\1\0\0\0\0\0\0\0"
    return [
        Join(terms, {"teacher": "w1"}, "0", "h", 1, "log"),
        Welcome(0, "arena-0", 4096, 3),
        Refused("because"),
        Score(7, "teacher", 0, 0.5, words, words, words, b"d" * 16),
        Scored(10**9, 0, 4096, b"d" * 16, 0.0, 0.0),
        Failed(10**9, 0, "because"),
        Alive(b"nobody"),
        Leave(),
        Bye(0),
    ]


def wrong(draw, good):
    """Return frames that are truncated, flipped, stretched, repeated, foreign or of another shape."""
    data = bytearray(encode(draw.choice(good)))
    kind = draw.randrange(7)
    if kind == 0:
        data = data[: draw.randrange(len(data))]
    elif kind == 1:
        for _ in range(draw.randrange(1, 9)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        data += draw.randbytes(draw.randrange(1, 65))
    elif kind == 3:
        data = bytearray(draw.randbytes(draw.randrange(200)))
    elif kind == 4:
        data = bytearray(b"\x91" * draw.randrange(1, 5000))  # lists in lists
    elif kind == 5:
        data = bytearray(msgspec.msgpack.encode({"type": draw.choice(["Score", "Pickle", 3, None]), "x": [{}] * 9}))
    return [bytes(data)] * (1 if draw.random() < 0.9 else draw.randrange(2, 6))


def test_a_student_outlives_a_hundred_thousand_wrong_messages_and_trains_on(tmp_path, models):
    """Sent by two strangers while a teacher answers; what the teacher says is what arrives."""
    draw, good = random.Random(0), seeds()
    with listening(tmp_path) as (members, arena, facts):
        context = new_context()
        (address,) = local_addresses(tmp_path, "test", 1)
        strangers = [connect(context, address, name) for name in (b"one", b"two")]
        large = connect(context, address, b"large")

        def flood():
            for number in range(MESSAGES):
                strangers[number % 2].send_multipart(wrong(draw, good))
            large.send(bytes(MAX_MESSAGE_BYTES + 1))  # its connection is closed, and nothing of it is kept
            done.set()

        done = threading.Event()
        with serving(tmp_path, {"teacher": models["teacher"]}):
            there = ServiceReferences(members, arena, facts, {}, SPEC, SETTINGS)
            expected = [payloads["teacher"].clone() for _, payloads in there.ahead(batches(4))]
            sender = threading.Thread(target=flood, daemon=True)
            sender.start()
            before = None
            while not done.is_set():
                for (_, payloads), same in zip(there.ahead(batches(4)), expected, strict=True):
                    assert torch.equal(payloads["teacher"], same)
                if before is None and sum(refused(members, there).values()) > MESSAGES // 5:
                    before = psutil.Process().memory_info().rss
            sender.join()
        assert psutil.Process().memory_info().rss - before < GROWTH_BYTES
        counts = refused(members, there)
        assert sum(counts.values()) > 0.95 * MESSAGES and set(counts) <= {
            "refused_malformed",
            "refused_unexpected",
            "refused_join",
        }, counts
        context.destroy(linger=0)


def test_a_teacher_outlives_a_hundred_thousand_wrong_messages_and_answers_on(tmp_path, models):
    """From a student by hand that has welcomed it, between good requests."""
    draw, good = random.Random(1), [message for message in seeds() if not isinstance(message, Bye | Refused)]
    context = new_context()
    router = context.socket(zmq.ROUTER)
    router.rcvtimeo, router.router_mandatory = 60_000, True
    router.bind(f"ipc://{tmp_path}/student-0.sock")
    words = [number.to_bytes(8, "little") for number in range(4)]
    asked = Score(1, "teacher", 0, 0.5, b"".join(words[1:]), words[0] + words[3], words[1], b"")
    with Arena(tmp_path / "arena-0", 4096, 3, owner=True), serving(tmp_path, {"teacher": models["teacher"]}) as server:
        peer = router.recv_multipart()[0]
        router.send_multipart([peer, encode(Welcome(0, "arena-0", 4096, 3))])
        for round_ in range(MESSAGES // 1000):
            for _ in range(1000):
                frames = wrong(draw, good)
                if not ends_it(frames):
                    router.send_multipart([peer, *frames])
            router.send_multipart([peer, encode(msgspec.structs.replace(asked, request=10**6 + round_))])
            while not is_answer(router.recv_multipart(), 10**6 + round_):
                pass
            if round_ == MESSAGES // 5000:
                before = psutil.Process().memory_info().rss
        assert psutil.Process().memory_info().rss - before < GROWTH_BYTES
    context.destroy(linger=0)
    assert server.counts["refused_malformed"] > 0.5 * MESSAGES and server.error is None


def ends_it(frames):
    """A student may say Bye, or refuse a teacher; a flipped bit that does so is no fault."""
    try:
        return isinstance(decode(frames[0]), Bye | Refused)
    except TeacherError:
        return False


def is_answer(frames, request):
    message = decode(frames[1])
    return isinstance(message, Scored) and message.request == request


def refused(members, service):
    return {k: v for k, v in (members.counts + service.counts).items() if k.startswith("refused")}
