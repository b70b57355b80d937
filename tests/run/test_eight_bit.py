"""A frozen model in 8 bit: a run of its own kind, which all ways to its numbers agree on."""

from contextlib import redirect_stdout
from io import StringIO

import pytest

from deltakd.__main__ import main
from tests.run.running import curve

EIGHT = "models.teacher={{weights: {}/teacher, load_in_8bit: true}}"


@pytest.fixture(scope="module")
def eight(lab):
    return (EIGHT.format(lab.folder),)


@pytest.fixture(scope="module")
def in_process(lab, eight):
    return curve(lab.train("eight_in_process", *eight, "references.from=in_process"))


def test_a_run_with_a_teacher_in_8_bit_differs_from_the_whole_ones_and_lies_near(lab, in_process):
    """Rounded are the weights of one of three models, by up to 0.4% of the largest of their row."""
    whole = curve(lab.train("eight_whole", "references.from=in_process"))
    for mine, theirs in zip(in_process, whole, strict=True):
        assert mine != theirs
        assert mine[:3] == pytest.approx(theirs[:3], rel=0.05)


def test_the_service_and_the_cache_say_the_same_of_it_bit_for_bit(lab, eight, in_process):
    assert curve(lab.train("eight_asked", *eight)) == in_process
    assert caching(lab) != caching(lab, *eight)
    assert curve(lab.train("eight_cached", *eight, "references.from=cache")) == in_process


def caching(lab, *overrides):
    with redirect_stdout(StringIO()) as said:
        assert main(["cache", str(lab.recipe), "run=eight_cache", *overrides]) == 0
    return said.getvalue().splitlines()[-1].partition(": complete")[0]


def test_a_finished_run_with_a_teacher_in_8_bit_is_known_again(lab, eight, in_process):
    again = lab.run(*lab.command("run=eight_in_process", *eight, "references.from=in_process"))
    assert again.returncode == 0 and "finished; nothing to do" in again.stdout, again.stderr
    other = lab.run(*lab.command("run=eight_in_process", "references.from=in_process"))
    assert other.returncode == 2 and "models.teacher.load_in_8bit: True, now False" in other.stderr, other.stderr
