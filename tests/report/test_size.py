"""How long a report over many long runs takes, and how large it gets: recorded in docs/results/report.md."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.report.made import make_many

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.soak
def test_a_report_over_200_runs_of_10000_steps_takes_seconds_and_less_than_15_mb(tmp_path):
    make_many(tmp_path / "runs", 200, 10_000)
    started = time.perf_counter()
    command = [sys.executable, "-m", "deltakd", "report", str(tmp_path / "runs"), "-o", str(tmp_path / "report.html")]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    seconds, size = time.perf_counter() - started, (tmp_path / "report.html").stat().st_size
    print(f"200 runs of 10,000 steps: {seconds:.1f} s, {size / 1e6:.1f} MB")
    assert seconds < 10 and size < 15e6
