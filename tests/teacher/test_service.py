"""The service over real sockets and shared memory: answers are right, and whatever is wrong never reaches a loss."""

import threading
from contextlib import ExitStack, contextmanager

import msgspec
import pytest
import torch
import zmq

from deltakd.base.errors import RunError, TeacherError
from deltakd.data.examples import Example
from deltakd.data.packing import blank_batch, pack
from deltakd.models.frozen import PayloadSpec, payload
from deltakd.models.load import load_model
from deltakd.models.settings import ModelsSettings, WeightsSettings
from deltakd.teacher.arena import Arena
from deltakd.teacher.client import FrozenFacts, ServiceReferences, ServiceSettings, TeacherRank, make_arena
from deltakd.teacher.messages import Hello, Score, Scored, Welcome, decode, encode
from deltakd.teacher.server import Served, TeacherServer, socket_path

FLOAT32 = ModelsSettings(student=WeightsSettings(weights="x"), dtype="float32")
SPEC = PayloadSpec("hidden", "float32", "packed", 300)
LAUNCH, TOKENIZER = "test", "fingerprint"


@pytest.fixture(scope="module")
def teacher(lab):
    return load_model(
        "teacher", lab.folder / "teacher", ModelsSettings(student=WeightsSettings(weights="x"), dtype="float32")
    )


def batches(count: int):
    generator = torch.Generator().manual_seed(2)

    def example(length: int) -> Example:
        tokens = torch.randint(0, 300, (length,), generator=generator).int().numpy()
        return Example(tokens, (torch.arange(length) > length // 2).numpy())

    return [pack([example(5 + i), example(9)]) for i in range(count)]


@contextmanager
def serving(folder, model, spec=SPEC, index=0, others=None):
    """A teacher rank in a thread of this process: its sockets and its arena are the real ones."""
    models = {name: Served(one, "w1") for name, one in {"teacher": model, **(others or {})}.items()}
    with TeacherServer(index, folder, LAUNCH, models, TOKENIZER, spec) as server:
        thread = threading.Thread(target=server.serve, args=(1, 60.0, lambda: None), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def references(
    folder,
    *,
    spec=SPEC,
    identity="w1",
    tokenizer=TOKENIZER,
    launch=LAUNCH,
    teachers=1,
    answer_s=20.0,
    look_ahead=2,
    models=("teacher",),
):
    models = {name: FrozenFacts(identity, 48) for name in models}
    settings = ServiceSettings(look_ahead, start_s=20, answer_s=answer_s, max_tokens=64)
    ranks = [TeacherRank(index, "a log", lambda pid: None) for index in range(teachers)]
    with make_arena(folder, 0, models, spec, settings) as arena:
        with ServiceReferences(arena, launch, 0, ranks, models, {}, tokenizer, spec, settings) as service:
            yield service


@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_answers_arrive_in_order_and_are_the_model_s_own_bit_for_bit(tmp_path, teacher, kind, teachers):
    """More batches than slots; a blank one in the middle asks nothing and waits for nothing."""
    spec = PayloadSpec(kind, "float32", "packed", 300)
    asked = [*batches(4), blank_batch(), *batches(4)]
    with ExitStack() as stack:
        for index in range(teachers):
            stack.enter_context(serving(tmp_path, teacher, spec, index))
        service = stack.enter_context(references(tmp_path, spec=spec, teachers=teachers))
        seen = 0
        for batch, payloads in service.ahead(asked):
            assert batch is asked[seen]
            seen += 1
            if batch.num_supervised:
                assert torch.equal(payloads["teacher"], payload(teacher, batch, spec))
            else:
                assert payloads == {}
        assert seen == len(asked)
    assert not list(tmp_path.iterdir())


def test_requests_run_ahead_of_the_batch_in_training_and_stop_at_the_slots(tmp_path, teacher):
    taken = []

    def counted():
        for batch in batches(9):
            taken.append(batch)
            yield batch

    with serving(tmp_path, teacher), references(tmp_path, look_ahead=2) as service:
        for number, _ in enumerate(service.ahead(counted()), start=1):
            assert len(taken) == min(9, number + 2)


@pytest.mark.parametrize(
    "difference,said",
    [
        ({"identity": "w2"}, "weights of teacher: w2 asked, w1 here"),
        ({"tokenizer": "other"}, "tokenizer: other asked, fingerprint here"),
        ({"launch": "another"}, "launch: another asked, test here"),
        ({"spec": PayloadSpec("logits", "float32", "packed", 300)}, "kind: logits asked, hidden here"),
        ({"spec": PayloadSpec("hidden", "float16", "packed", 300)}, "dtype: float16 asked, float32 here"),
        ({"spec": PayloadSpec("hidden", "float32", "padded", 300)}, "layout: padded asked, packed here"),
        ({"spec": PayloadSpec("hidden", "float32", "packed", 299)}, "vocab_size: 299 asked, 300 here"),
    ],
)
def test_a_student_that_differs_is_refused_with_both_values(tmp_path, teacher, difference, said):
    with serving(tmp_path, teacher):
        with pytest.raises(TeacherError, match=said), references(tmp_path, **difference):
            pass


def test_a_number_that_the_payload_cannot_hold_stops_the_run_with_its_count(tmp_path, lab):
    """Final norm scaled by 1e6: hidden states of 1e6 are beyond float16's 65,504."""
    loud = load_model(
        "teacher", lab.folder / "teacher", ModelsSettings(student=WeightsSettings(weights="x"), dtype="float32")
    )
    loud.get_decoder().norm.weight.data *= 1e6
    spec = PayloadSpec("hidden", "float16", "packed", 300)
    with serving(tmp_path, loud, spec), references(tmp_path, spec=spec) as service:
        with pytest.raises(
            TeacherError, match=r"teacher \(request 0\): [\d,]+ of [\d,]+ numbers are not finite in float16"
        ):
            next(service.ahead(batches(1)))


@contextmanager
def stranger(folder, answer):
    """A socket in a teacher's place that greets, and then does what `answer(router)` does."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{socket_path(folder, 0)}")

    def live():
        peer, _ = router.recv_multipart()
        router.send_multipart([peer, encode(Welcome(0, 1))])
        answer(router)

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    yield
    thread.join()
    router.close()
    context.term()


def test_a_teacher_that_does_not_answer_in_time_stops_the_run(tmp_path):
    with stranger(tmp_path, lambda router: None), references(tmp_path, answer_s=0.3) as service:
        with pytest.raises(TeacherError, match=r"no answer about teacher \(request 0\) for 0\.3 s"):
            next(service.ahead(batches(1)))


def test_the_server_outlives_what_is_malformed_foreign_or_early(tmp_path, teacher):
    with serving(tmp_path, teacher) as server:
        context = zmq.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.connect(f"ipc://{socket_path(tmp_path, 0)}")
        good = encode(Score(1, "teacher", 0, b"", b"", b"", b""))
        for data in (b"", b"\x00", b"garbage", good[:-1], good + b"x", msgspec.msgpack.encode({"type": "Nothing"})):
            stranger.send(data)
        stranger.send_multipart([b"two", b"frames"])
        stranger.send(good)  # well formed, before any Hello
        with references(tmp_path) as service:
            assert len(list(service.ahead(batches(2)))) == 2
        stranger.close(linger=0)
        context.term()
    assert server.counts["refused_malformed"] == 7
    assert server.counts["refused_unexpected"] == 1
    assert server.counts["scored"] == 2


def test_an_answer_about_other_tokens_never_reaches_a_loss(tmp_path):
    def answer(router):
        peer, data = router.recv_multipart()
        score = decode(data)
        num_bytes = len(score.supervised) // 8 * 48 * 4
        router.send_multipart([peer, encode(Scored(score.request, score.slot, num_bytes, b"x" * 16, 0.0, 0.0))])

    with stranger(tmp_path, answer), references(tmp_path, look_ahead=0) as service:
        with pytest.raises(TeacherError, match="or about other tokens"):
            next(service.ahead(batches(1)))


def test_the_digest_of_an_answer_is_of_the_tokens_that_the_teacher_saw(tmp_path, teacher):
    """A request damaged on its way carries the digest of what was sent."""
    with serving(tmp_path, teacher) as server, references(tmp_path) as service:
        batch = batches(1)[0]
        (request,) = service._ask(batch)
        damaged = msgspec.structs.replace(request.score, tokens=bytes(len(request.score.tokens)))
        peer = next(iter(server._arenas))
        assert server._score(server._arenas[peer], request.score, 0.0).digest == request.score.digest
        assert server._score(server._arenas[peer], damaged, 0.0).digest != request.score.digest


def test_a_teacher_of_several_models_answers_with_the_one_that_was_asked(tmp_path, lab, teacher):
    raw = load_model("teacher_raw", lab.folder / "teacher_raw", FLOAT32)
    batch = batches(1)[0]
    with (
        serving(tmp_path, teacher, others={"teacher_raw": raw}),
        references(tmp_path, models=("teacher", "teacher_raw")) as service,
    ):
        _, payloads = next(service.ahead([batch]))
    assert torch.equal(payloads["teacher"], payload(teacher, batch, SPEC))
    assert torch.equal(payloads["teacher_raw"], payload(raw, batch, SPEC))
    assert not torch.equal(payloads["teacher"], payloads["teacher_raw"])


def test_a_teacher_to_which_no_student_comes_does_not_wait_for_ever(tmp_path, teacher):
    with TeacherServer(0, tmp_path, LAUNCH, {"teacher": Served(teacher, "w1")}, TOKENIZER, SPEC) as server:
        with pytest.raises(TeacherError, match=r"no student has come for 0\.1 s"):
            server.serve(1, 0.1, lambda: None)


def test_messages_come_back_as_they_were_sent():
    hello = Hello(1, "l", 0, {"teacher": "w"}, "t", "hidden", "float16", "packed", 9, "arena-0", 4096, 3)
    assert decode(encode(hello)) == hello
    with pytest.raises(TeacherError, match="Refused"):
        decode(encode(hello) + b"\x00")


def test_an_arena_that_does_not_fit_says_how_much_it_needs_before_any_memory_is_taken(tmp_path):
    with pytest.raises(RunError, match=r"the slots need [\d,.]+ MiB, [\d,.]+ MiB are free\. Lower"):
        Arena(tmp_path / "arena", 2**50, 2, owner=True)
    assert not list(tmp_path.iterdir())


def test_slots_do_not_overlap_and_a_payload_that_is_too_large_is_refused(tmp_path):
    with Arena(tmp_path / "arena", 4096, 3, owner=True) as arena:
        other = Arena(tmp_path / "arena", 4096, 3, owner=False)
        for index in range(3):
            other.slot(index, (1024,), torch.float32).fill_(index + 1.0)
        assert all((arena.slot(index, (32, 32), torch.float32) == index + 1.0).all() for index in range(3))
        with pytest.raises(RunError, match="do not fit"):
            arena.slot(0, (1025,), torch.float32)
        with pytest.raises(RunError, match="do not fit"):
            arena.slot(3, (1,), torch.float32)
