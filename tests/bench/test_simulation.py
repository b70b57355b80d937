"""The simulation where the answer is known by hand."""

from dataclasses import replace

import pytest

from deltakd.bench.simulation import Plant, simulate

ONE = Plant(1, 1, 1, micro_batches=4, look_ahead=2, work_s=1.0, update_s=0.5, answer_s=(0.25, 0.25))


def test_teachers_that_are_fast_enough_cost_the_first_answer_alone():
    course = simulate(ONE, steps=100)
    assert course.step_s == pytest.approx(4.5 + 0.5 / 100)
    assert course.waiting == pytest.approx(0.5 / 100 / 4.505, rel=1e-3)
    # What is answered: as much as is worked on, and the two that are asked for beyond.
    assert course.busy == pytest.approx((400 + 3) * 0.5 / (100 * 4.505), rel=1e-2)
    assert course.messages_per_s == pytest.approx(2 * 2 * 4 / 4.505)


def test_without_looking_ahead_work_and_answers_take_turns():
    assert simulate(replace(ONE, look_ahead=0)).step_s == pytest.approx(4 * (1.0 + 0.5) + 0.5)


@pytest.mark.parametrize("teachers,step_s", [(1, 16.0), (2, 8.0), (4, 4.5)])
def test_teachers_that_are_short_set_the_pace_by_their_number(teachers, step_s):
    """Four students of four micro-batches ask for 16 s of answers a step; two teachers give them in 8."""
    plant = replace(ONE, students_per_node=4, teachers_per_node=teachers, answer_s=(0.5, 0.5), look_ahead=4)
    assert simulate(plant, steps=200).step_s == pytest.approx(step_s, rel=0.03)


def test_nodes_do_not_slow_each_other_down_unless_their_times_differ():
    assert simulate(replace(ONE, num_nodes=16)).step_s == pytest.approx(simulate(ONE).step_s)
    few, many = (simulate(replace(ONE, num_nodes=nodes, spread=0.1), steps=50) for nodes in (2, 64))
    assert many.step_s > few.step_s > simulate(ONE, steps=50).step_s
    assert many.straggling > few.straggling > 0
