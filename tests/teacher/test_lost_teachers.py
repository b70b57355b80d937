"""Teachers that leave, fall silent, or do not answer: others do what they owed, or the run says who is missing."""

import threading
from contextlib import ExitStack
from dataclasses import replace

import pytest

from deltakd.base.errors import RunError, TeacherError
from deltakd.losses import objective
from deltakd.teacher.client import ServiceReferences
from deltakd.teacher.messages import (
    Alive,
    Bye,
    Leave,
    Score,
    Scored,
    Welcome,
    decode,
    encode,
)
from deltakd.teacher.payloads import FrozenModels
from deltakd.teacher.server import Offer, TeacherServer
from tests.teacher.contract import (
    DELTA,
    SETTINGS,
    SPEC,
    batches,
    fall_silent,
    join,
    listening,
    serving,
    teacher_by_hand,
    terms,
)


def test_a_teacher_that_leaves_in_good_order_is_missed_at_once(tmp_path, models):
    """Without waiting for its silence: the next one does what it owed."""
    served = {"teacher": models["teacher"]}
    with listening(tmp_path) as (members, arena, facts):
        with serving(tmp_path, served):
            service = ServiceReferences(members, arena, facts, {}, SPEC, SETTINGS)
        while members.everyone():
            service._look(0.1)
        with serving(tmp_path, served, name="1"):
            assert len(list(service.ahead(batches(2)))) == 2
        assert not members.counts["silent"]


def test_a_silent_teacher_s_requests_go_to_another_and_its_slots_wait_for_its_last_word(tmp_path, models):
    """By hand and slow, then woken: its late answer is refused by number, and only then is its slot used again."""
    quick = {"teacher": models["teacher"]}
    with listening(tmp_path) as (members, arena, facts), teacher_by_hand(tmp_path) as slow:
        slow.send(encode(join()))
        service = ServiceReferences(members, arena, facts, {}, SPEC, SETTINGS)
        assert isinstance(decode(slow.recv()), Welcome)
        service._ask(*batches(1)[0])  # goes to the slow one: it is alone
        late = decode(slow.recv())
        fall_silent(members)
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


def test_few_slots_make_requests_wait_and_those_asked_again_come_first(tmp_path, models):
    """Two slots for two models: were a lost request asked last, later batches would hold both, and nothing end."""
    settings, both = replace(SETTINGS, slots=2), ("teacher", "teacher_raw")
    served = {name: models[name] for name in both}
    with listening(tmp_path, both, settings=settings) as (members, arena, facts), teacher_by_hand(tmp_path) as gone:
        assert arena.num_slots == 2
        gone.send(encode(join(models=dict.fromkeys(both, "w1"))))
        service = ServiceReferences(members, arena, facts, {}, SPEC, settings)
        first, *_ = [service._ask(*pair) for pair in batches(3)]
        assert [type(decode(gone.recv())) for _ in range(3)] == [Welcome, Score, Score]
        gone.send(encode(Leave()))
        with serving(tmp_path, served, name="1"):
            while service.counts["scored"] != 2:
                service._look(0.1)
            assert all(request.answered for request in first)
    with pytest.raises(RunError, match=r"teachers\.slots: 1 hold no micro-batch, which has 2 payloads"):
        with listening(tmp_path, both, settings=replace(SETTINGS, slots=1)):
            pass


def test_when_nobody_is_left_the_run_stops_and_says_who_it_was_and_where_its_log_is(tmp_path):
    settings = replace(SETTINGS, give_up_s=0.3)
    with listening(tmp_path) as (members, arena, facts), teacher_by_hand(tmp_path) as silent:
        silent.send(encode(join()))
        service = ServiceReferences(members, arena, facts, {}, SPEC, settings)
        fall_silent(members)
        said = r"teacher \(.* tokens\): no teacher could be asked for 0\.3 s\. .*teacher 0 on h .*log a log.*not heard"
        with pytest.raises(TeacherError, match=said):
            list(service.ahead(batches(1)))


def test_a_teacher_whose_heart_beats_but_that_does_not_answer_is_asked_no_more(tmp_path, models):
    with listening(tmp_path) as (members, arena, facts), teacher_by_hand(tmp_path) as stuck:
        stuck.send(encode(join()))
        service = ServiceReferences(members, arena, facts, {}, SPEC, SETTINGS)
        (request,) = service._ask(*batches(1)[0])  # goes to the stuck one: it is alone
        assert [type(decode(stuck.recv())) for _ in range(2)] == [Welcome, Score]
        request.since -= 60  # longer than answer_s
        service._look(0)
        stuck.send(encode(Alive(b"by hand")))
        with serving(tmp_path, {"teacher": models["teacher"]}, name="quick"):
            assert len(list(service.ahead(batches(2)))) == 2 and request.answered
        assert members.counts["stuck"] == 1 and not stuck.poll(0)


def test_a_teacher_to_which_no_student_comes_does_not_wait_for_ever(tmp_path, models):
    frozen = FrozenModels({"teacher": models["teacher"]}, SPEC, objective(DELTA))
    with TeacherServer(Offer(frozen, {"teacher": "w1"}, terms(), "0"), lambda: [], tmp_path) as server:
        with pytest.raises(TeacherError, match=r"no student has come for 0\.1 s"):
            server.serve(0.1, lambda: None)


def test_a_student_ends_whatever_its_teachers_do_at_that_moment(tmp_path):
    """Many leave without a word while it says goodbye: no connection may keep what nobody will ever read."""

    def end_with(count):
        with ExitStack() as teachers, listening(tmp_path) as (members, _, _):
            for index in range(count):
                teachers.enter_context(teacher_by_hand(tmp_path, b"teacher %d" % index)).send(encode(join()))
            while len(members.everyone()) < count:
                list(members.receive(0.1))
            gone = threading.Thread(target=teachers.close)
            gone.start()
            while all(members.send(member, Bye(0)) for member in members.everyone()):
                pass
        gone.join()

    def end_often():
        for _ in range(60):
            end_with(20)

    ending = threading.Thread(target=end_often, daemon=True)
    ending.start()
    ending.join(60)
    assert not ending.is_alive()
