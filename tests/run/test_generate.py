"""Responses that a model writes: the same whoever writes them, through kills, and rows that a student can learn."""

import json
import os
import signal
import subprocess

import pytest

from deltakd.base.errors import RunError
from deltakd.recipe import generating
from tests.conftest import chat_rows, write_rows
from tests.run.running import wait_until

SAMPLED = "generation={per_prompt: 2, temperature: 1.0, max_new_tokens: 12, unended: keep, batch_size: 32}"


class Writing:
    """The verb over three chunks of prompts, the last of them not full."""

    def __init__(self, lab):
        self.lab = lab
        self.prompts = write_rows(lab.folder / "prompts.jsonl", chat_rows(0, 150))

    def command(self, root, *words):
        settings = [f"root={root}", f"data.train.path={self.prompts}", SAMPLED]
        return ["python", "-m", "deltakd", "generate", str(self.lab.recipe), *settings, *words]

    def here(self, root, *overrides, shard=None):
        """Do the same in this process, which has imported already what takes a new one ten seconds."""
        settings = [f"root={root}", f"data.train.path={self.prompts}", SAMPLED, *overrides]
        generating.run(str(self.lab.recipe), settings, None, None, 1, shard)


@pytest.fixture(scope="module")
def writing(lab):
    return Writing(lab)


def rows(root):
    return [json.loads(line) for line in (root / "responses_teacher" / "responses.jsonl").read_text().splitlines()]


def test_whoever_writes_them_and_whenever_it_is_killed_the_responses_are_the_same(lab, writing, tmp_path, capsys):
    writing.here(tmp_path)
    whole = rows(tmp_path)
    # Models of random weights may say nothing at all, which is no row.
    assert 270 < len(whole) <= 300 and len({row["messages"][-1]["content"] for row in whole}) > 100
    numbers = [int(row["prompt_from"].rpartition(":")[2]) for row in whole]
    assert numbers == sorted(numbers) and len(set(numbers)) > 140 and max(numbers) == 150
    assert f" {len(whole)} rows" in capsys.readouterr().out
    two = lab.run(*writing.command(tmp_path / "two", "--processes", "2"))
    assert two.returncode == 0 and rows(tmp_path / "two") == whole, two.stderr
    root = tmp_path / "killed"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(writing.command(root), cwd=lab.folder, env=lab.environment(), **quiet)
    wait_until(lambda: list(root.glob("responses_teacher/chunks/*.jsonl")), "the first chunk")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = {path: path.stat().st_mtime_ns for path in root.glob("responses_teacher/chunks/*.jsonl")}
    assert left and not (root / "responses_teacher" / "finished.json").exists()
    writing.here(root, shard="1/2")
    assert all(path.stat().st_mtime_ns == when for path, when in left.items())
    writing.here(root)
    assert rows(root) == whole
    writing.here(root)
    assert "written before" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"another question \(sampling.seed: 0, now 1"):
        writing.here(root, "generation.seed=1")


def test_what_cannot_be_learnt_is_left_out_and_counted(writing, tmp_path, capsys):
    """A prompt that fills max_tokens, answers that were cut off; and where nothing is left, one sentence."""
    with pytest.raises(RunError, match=r"no response is left \(0 rows, "):
        writing.here(tmp_path, "generation.max_new_tokens=1", "generation.unended=drop")
    writing.here(tmp_path / "short", "data.max_tokens=24")
    assert "prompts are too long" in capsys.readouterr().out and 0 < len(rows(tmp_path / "short")) < 300
