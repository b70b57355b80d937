"""What many trainings beside each other leave of each."""

import json

from deltakd.base.errors import EXIT_STOPPED, Stopped
from deltakd.base.rundir import RunDirectory
from deltakd.recipe import pipeline
from deltakd.recipe.trainings import WALL, keep_wall


def test_how_long_a_run_took_is_not_known_once_it_has_gone_on(tmp_path):
    """A run that was finished and goes on for more steps has the seconds of the first ones in its folder."""
    directory, wall = RunDirectory(tmp_path), tmp_path / WALL
    keep_wall(directory, 7.5)
    assert json.loads(wall.read_text()) == {"wall_s": 7.5}
    (tmp_path / "resumed.jsonl").write_text("{}\n")
    keep_wall(directory, 9.0)
    assert not wall.exists()


def test_a_stage_that_is_interrupted_before_it_can_say_so_is_stopped_and_not_broken(tmp_path):
    """A study goes on with its next question after a fault, and must not after Ctrl-C."""
    (tmp_path / "log.txt").write_text("importing\n")
    assert isinstance(pipeline.failure("sft", tmp_path / "log.txt", EXIT_STOPPED), Stopped)
    assert "ended with exit code 9" in str(pipeline.failure("sft", tmp_path / "log.txt", 9))
