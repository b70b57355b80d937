"""A process is kept running while it is silent for no longer than it may be; one that has left is let go."""

import sys

import pytest

from deltakd.base.supervisor import Supervisor

CHILD = """
import time
from deltakd.base.supervisor import pulse_from_environment
pulse = pulse_from_environment()
pulse()
{}
time.sleep(4)
"""


@pytest.mark.parametrize("last,restarted", [("pulse.leave()", False), ("", True)])
def test_who_has_left_may_take_longer_to_end_than_who_works_may_be_silent(tmp_path, last, restarted):
    said = []
    command = [sys.executable, "-c", CHILD.format(last)]
    supervisor = Supervisor(command, tmp_path / "log", restarts=1, silent_s=1, say=said.append)
    supervisor.run()
    assert bool(said) == restarted and (supervisor.failed is not None) == restarted, (tmp_path / "log").read_text()
