"""The frozen models of the lab, loaded once."""

import pytest

from deltakd.models.load import load_model
from tests.teacher.contract import FLOAT32


@pytest.fixture(scope="module")
def models(lab):
    return {
        role: load_model(role, lab.folder / folder, FLOAT32)
        for role, folder in {"teacher": "teacher", "teacher_raw": "teacher_raw", "student_raw": "student"}.items()
    }
