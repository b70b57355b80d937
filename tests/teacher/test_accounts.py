"""Who is short: the sentence at a run's end, from seconds that are given."""

import pytest

from deltakd.teacher.accounts import Accounts


def accounts(work_s, wait_s, busy, steps=10, students=1):
    """A rank that works and waits so long for every batch, while teachers compute `busy` seconds by model."""
    now = [0.0]
    kept = Accounts(students, clock=lambda: now[0])
    for _ in range(steps + 1):
        kept.stop_work()
        now[0] += wait_s
        kept.start_work()
        now[0] += work_s
        for model, seconds in busy.items():
            kept.add(b"one", model, 7, seconds)
    kept.stop_work()
    return kept


def test_teachers_that_keep_up_are_not_mentioned():
    assert accounts(1.0, 0.02, {"teacher": 0.9}).shortage(1) is None
    assert accounts(1.0, 0.03, {"teacher": 0.9}).shortage(1) is not None


def test_the_first_wait_is_nobody_s_fault():
    assert accounts(1.0, 5.0, {"teacher": 0.9}, steps=0).shortage(1) is None


@pytest.mark.parametrize("students,factor,ranks", [(1, "1.50", 3), (4, "6.00", 12)])
def test_short_teachers_are_told_by_what_factor_and_how_many_would_do(students, factor, ranks):
    """3 s of forwards a second of work, on 2 ranks: half as many again; four students ask for four times as much."""
    said = accounts(1.0, 0.5, {"teacher": 2.0, "teacher_raw": 1.0}, students=students).shortage(2)
    assert f"short by a factor of {factor}, {ranks} would do" in said
    assert f"teacher {2 * students}.00, teacher_raw {students}.00" in said


def test_waiting_though_there_is_time_enough_asks_for_more_look_ahead():
    assert "raise teachers.look_ahead" in accounts(1.0, 0.5, {"teacher": 0.5}).shortage(1)
