"""Roles follow from places: every launched process comes to the same answer alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakd.base.errors import RunError
from deltakd.base.ranks import Placement, assign_role, forget_placement, read_placement


def roles(num_nodes: int, per_node: int, teachers: int):
    places = [
        Placement(node * per_node + local, num_nodes * per_node, local, per_node)
        for node in range(num_nodes)
        for local in range(per_node)
    ]
    return [assign_role(place, teachers) for place in places]


@given(st.integers(1, 4), st.integers(2, 8), st.data())
def test_students_are_numbered_without_gaps_and_every_node_has_its_teachers(num_nodes, per_node, data):
    teachers = data.draw(st.integers(0, per_node - 1))
    all_roles = roles(num_nodes, per_node, teachers)
    students = [role for role in all_roles if role.kind == "student"]
    assert [role.rank for role in students] == list(range(num_nodes * (per_node - teachers)))
    assert {role.num_students for role in all_roles} == {len(students)}
    serving = [role.rank for role in all_roles if role.kind == "teacher"]
    assert serving == list(range(teachers)) * num_nodes


def test_one_process_has_no_rank_to_spare_and_starts_one_teacher_beside_itself():
    (role,) = roles(1, 1, 2)
    assert role.kind == "student" and role.teachers_beside and role.num_local_teachers == 1


def test_teachers_that_leave_no_student_are_refused():
    with pytest.raises(RunError, match="2 teachers leave no student among 2 processes"):
        roles(1, 2, 2)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},  # torchrun
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"},  # deepspeed
        {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"},  # srun
    ],
)
def test_every_launcher_s_words_are_understood(environment):
    place = read_placement(environment)
    assert place == Placement(5, 8, 1, 4) and place.node == 1 and place.num_nodes == 2


def test_a_process_that_no_launcher_started_is_alone():
    assert read_placement({}) == Placement(0, 1, 0, 1)


def test_a_process_that_forgets_its_launcher_s_words_keeps_all_others():
    written = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"}
    environment = {**written, "CUDA_VISIBLE_DEVICES": "0,1", "PATH": "/bin"}
    forget_placement(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "0,1", "PATH": "/bin"}
