"""Work that processes share out: one that fails is said, whatever ended it."""

import sys

import pytest

from deltakd.base.errors import RunError
from deltakd.recipe.shares import follow_shares


@pytest.mark.parametrize("end, said", [("os.kill(os.getpid(), 9)", "exit code -9"), ("sys.exit(3)", "exit code 3")])
def test_a_share_that_was_killed_has_failed_as_one_that_ended_by_itself(end, said, tmp_path):
    """What the kernel ends for want of memory says nothing, and the one that waits must not do its work alone."""
    script = f"import os, sys, time; {end} if sys.argv[-1] == '1/2' else time.sleep(60)"
    with pytest.raises(RunError, match=said):
        follow_shares([sys.executable, "-c", script], tmp_path, 2, lambda: None)
