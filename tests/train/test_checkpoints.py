"""A checkpoint is whole or not there, holds everything that the numbers depend on, and never costs another one."""

import json

import pytest
import torch
from torch import nn

from deltakd.base.errors import PeerLost, RunError, Stopped, TeacherError
from deltakd.base.ranks import SoloWorld
from deltakd.engine.protocol import Optimizer
from deltakd.engine.single import SingleEngine
from deltakd.losses.schedules import TaidAlpha
from deltakd.losses.settings import TaidTarget
from deltakd.train.checkpoints import Checkpoints, newest
from deltakd.train.loop import Halt, together
from deltakd.train.settings import CheckpointsSettings


class Failing(SingleEngine):
    """An engine whose disk fails when its weights are half-way down."""

    fault: BaseException | None = None

    def save_state(self, folder) -> None:
        super().save_state(folder)
        if self.fault:
            raise self.fault


def engine(start: float = 0.0) -> Failing:
    """One layer, and a step taken on it, so that the optimizer has a state of its own."""
    module = nn.Linear(3, 2)
    nn.init.constant_(module.weight, start)
    made = Failing(module, Optimizer(0.1, (0.9, 0.95), 0.0, 1.0), "cpu")
    made.backward(module(torch.ones(3)).square().sum() + start, weight=1.0, last=True)
    made.update(0.1, made.grad_norm())
    return made


def keeper(tmp_path, keep_last=2, **changes):
    settings = CheckpointsSettings(every_steps=1, keep_last=keep_last)
    parts = {"engine": engine(), "alpha": TaidAlpha(TaidTarget(name="taid", rate=0.2), 10), "facts": {}} | changes
    return Checkpoints(tmp_path, settings, SoloWorld(), **parts)


def continued(made: Failing) -> list[torch.Tensor]:
    """The weights after one more step: what lies in the engine and what its optimizer remembers."""
    (module := made._module)(torch.tensor([1.0, -2.0, 3.0])).square().sum().backward()
    made.update(0.1, made.grad_norm())
    return [parameter.detach().clone() for parameter in module.parameters()]


def names(tmp_path):
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


def test_everything_that_the_numbers_depend_on_comes_back(tmp_path):
    first = keeper(tmp_path, engine=engine(3.0))
    for loss in (2.0, 1.0):
        first.alpha.observe(loss)
    first.count(100, 40)
    first.save(7)
    drawn = torch.rand(4)
    second = keeper(tmp_path)
    saved, passed = newest(tmp_path)
    second.restore(saved)
    assert passed == [] and saved.step == 7
    assert torch.equal(torch.rand(4), drawn)
    both = zip(continued(first.engine), continued(second.engine), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in both)
    assert second.alpha.state() == first.alpha.state() != keeper(tmp_path).alpha.state()
    assert (second.num_tokens, second.num_supervised) == (100, 40)


def test_a_fault_while_it_is_written_leaves_the_one_before_and_nothing_else(tmp_path):
    keep = keeper(tmp_path)
    keep.save(1)
    keep.engine.fault = OSError(28, "No space left on device")
    with pytest.raises(RunError, match=r"step-00000002: the checkpoint cannot be written .*No space.*step 1 is kept"):
        keep.save(2)
    assert names(tmp_path) == ["step-00000001"]
    keep.engine.fault = KeyboardInterrupt()  # as a kill: nothing is cleaned up
    with pytest.raises(KeyboardInterrupt):
        keep.save(2)
    assert names(tmp_path) == ["step-00000001", "step-00000002.part"] and newest(tmp_path)[0].step == 1


@pytest.mark.parametrize("damage", ["bit", "missing", "strange", "no sums", "no progress"])
def test_a_damaged_one_is_named_passed_over_and_takes_no_one_s_place(tmp_path, damage):
    keep = keeper(tmp_path, keep_last=1)
    keep.save(4)
    keep = keeper(tmp_path, keep_last=2)
    keep.save(9)
    folder = tmp_path / "checkpoints" / "step-00000009"
    weights = folder / "engine" / "weights.safetensors"
    if damage == "bit":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "missing":
        weights.unlink()
    elif damage == "strange":
        (folder / "sums-0.json").write_text("{}")
    else:
        (folder / {"no sums": "sums-0.json", "no progress": "progress.json"}[damage]).unlink()
    saved, (passed,) = newest(tmp_path)
    assert saved.step == 4 and passed.startswith(f"{folder}: damaged")
    keep = keeper(tmp_path, keep_last=1)
    keep.restore(saved)
    keep.save(6)  # the damaged one is newer, and counts for nothing
    assert newest(tmp_path)[0].step == 6
    for path in (tmp_path / "checkpoints").iterdir():
        (path / "progress.json").unlink(missing_ok=True)
    with pytest.raises(RunError, match="No whole checkpoint is left"):
        newest(tmp_path)


def test_as_many_stay_as_the_settings_say(tmp_path):
    keep = keeper(tmp_path, keep_last=3)
    for step in range(1, 6):
        keep.save(step)
    assert names(tmp_path) == [f"step-{step:08}" for step in (3, 4, 5)]
    assert json.loads((tmp_path / "checkpoints" / "step-00000005" / "progress.json").read_text())["step"] == 5


class Others(SoloWorld):
    """A world in which another rank says something of its own."""

    def __init__(self, asked: float, failed: float) -> None:
        self.said = [asked, failed]

    def sum(self, values):
        return [mine + theirs for mine, theirs in zip(values, self.said, strict=True)]


def failing(error):
    raise error
    yield


@pytest.mark.parametrize(
    "asked,failed,mine,reason,expected",
    [
        (0, 0, None, None, None),
        (1, 0, None, None, (Stopped, "a signal to another rank")),
        (0, 1, None, None, (PeerLost, "another student rank")),
        (0, 0, None, "SIGTERM", (Stopped, "stopped by SIGTERM")),
        (1, 0, TeacherError("gone"), None, (TeacherError, "gone")),
        (0, 1, Stopped("waited"), "SIGTERM", (PeerLost, "another student rank")),
    ],
)
def test_all_ranks_leave_together_and_a_fault_is_never_taken_for_a_wish(asked, failed, mine, reason, expected):
    scored = failing(mine) if mine else iter([("batch", {})])
    step = together(Others(asked, failed), scored, lambda: reason)
    if expected is None:
        assert next(step) == ("batch", {})
        return
    with pytest.raises(Halt) as halt:
        next(step)
    assert type(halt.value.reason) is expected[0] and expected[1] in str(halt.value.reason)
