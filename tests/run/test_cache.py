"""The cache: written once, resumed after a kill, checked byte by byte, and the same losses as asking."""

import json
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace

import pytest

from deltakd.__main__ import main
from tests.run.running import curve


def verb(lab, *words):
    """Live the verb's life in this process."""
    with redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as faults:
        code = main(["cache", str(lab.recipe), *words])
    return SimpleNamespace(returncode=code, stdout=said.getvalue(), stderr=faults.getvalue())


def deltakd(*words):
    return [sys.executable, "-m", "deltakd", *words]


@pytest.fixture(scope="module")
def asked(lab):
    """What in-process references give; the service's are the same (test_same_numbers)."""
    return curve(lab.train("cache_asked", "references.from=in_process"))


@pytest.fixture(scope="module")
def written(lab):
    done = lab.run(*deltakd("cache"), str(lab.recipe), "run=cache_written")
    assert done.returncode == 0, done.stderr
    folder = next((lab.folder / "runs" / "cache").iterdir())
    return folder, done.stdout


def test_a_cache_gives_the_losses_of_asking_bit_for_bit_and_no_teacher_runs(lab, asked, written):
    folder, said = written
    assert "bytes to write" in said and "MiB are free" in said and "0 are there" in said
    assert curve(lab.train("cache_read", "references.from=cache")) == asked
    processes = lab.lines("cache_read", "processes.jsonl")
    assert [line["role"] for line in processes] == ["student"] and processes[0]["models"] == ["student"]
    # Hidden states keep the models apart: another alpha reads the same payloads.
    again = verb(lab, "run=cache_again", "objective.target.alpha=0.75")
    assert ", 0 bytes to write" in again.stdout and [*(lab.folder / "runs" / "cache").iterdir()] == [folder]


def test_the_whole_target_in_a_cache_is_that_of_its_alpha_alone(lab, asked):
    target = "references.payload=target"
    assert verb(lab, target).returncode == 0
    expected = curve(lab.train("target_asked", target, "references.from=in_process"))
    assert curve(lab.train("target_read", target, "references.from=cache")) == expected
    refused = lab.refuses("target_other", target, "references.from=cache", "objective.target.alpha=0.25")
    assert "nothing of target about a micro-batch" in refused


def test_micro_batches_that_are_not_in_it_are_refused_before_the_first_step(lab, written):
    refused = lab.refuses("cache_other", "references.from=cache", "train.tokens_per_micro_batch=200")
    assert "Run `deltakd cache`" in refused
    assert not (lab.folder / "runs" / "cache_other" / "steps.jsonl").exists()


def test_a_flipped_byte_is_found_and_named_and_made_anew(lab, written):
    folder, _ = written
    good = checksums(folder)
    shard = folder / "00000.bin"
    before = shard.read_bytes()
    shard.write_bytes(before[:1000] + bytes([before[1000] ^ 1]) + before[1001:])
    refused = lab.refuses("cache_flipped", "references.from=cache")
    assert f"{shard}: " in refused
    mended = verb(lab)
    assert mended.returncode == 0 and f"{shard}: " in mended.stderr and ", 0 bytes to write" not in mended.stdout
    assert checksums(folder) == good


def checksums(folder):
    """Return what a cache holds: the last line about each payload counts."""
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    return {tuple(line[:3]): line[-1] for line in lines}


def test_a_killed_writer_goes_on_where_it_was(lab, tmp_path, written):
    """Killed with half of it written; then a line of its index is cut as well, as a kill within a write would."""
    overrides = [f"root={tmp_path}/runs"]
    writer = subprocess.Popen(
        [*deltakd("cache"), str(lab.recipe), *overrides], cwd=lab.folder, env=lab.environment(), stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (found := [*tmp_path.glob("runs/cache/*/index.jsonl")]) or found[0].stat().st_size < 200:
        assert time.monotonic() < deadline and writer.poll() is None
    writer.kill()
    writer.communicate()
    lines = found[0].read_text().splitlines(keepends=True)
    found[0].write_text("".join(lines[:-1]) + lines[-1][:20])
    done = verb(lab, *overrides)
    assert done.returncode == 0 and f"{len(lines) - 1} are there" in done.stdout, done.stdout + done.stderr
    assert checksums(found[0].parent) == checksums(written[0])


def test_a_cache_that_does_not_fit_is_refused_before_its_first_byte(lab, tmp_path):
    """A disk of 64 KiB, where this machine lets us mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small disk: mounting one needs root")
    try:
        (small / "tokens").symlink_to(lab.folder / "runs" / "tokens")
        refused = verb(lab, f"root={small}")
        assert refused.returncode == 2 and "do not fit into the" in refused.stderr, refused.stderr
        assert not [*small.glob("cache/*/*.bin")]
    finally:
        subprocess.run(["umount", str(small)], check=True)
        shutil.rmtree(small)


def test_a_cache_of_three_models_serves_a_run_that_asks_one_of_them(lab, tmp_path):
    """At alpha 0 nobody asks the raw models; the teacher's payloads are there already, and nobody is asked again."""
    root, alone = f"root={tmp_path}/runs", "objective.target.alpha=0.0"
    assert verb(lab, root).returncode == 0
    (folder,) = (tmp_path / "runs" / "cache").iterdir()
    about = (folder / "about.json").read_text()
    again = verb(lab, root, alone)
    assert again.returncode == 0 and ", 0 bytes to write" in again.stdout, again.stdout + again.stderr
    assert [*(tmp_path / "runs" / "cache").iterdir()] == [folder] and (folder / "about.json").read_text() == about
    expected = curve(lab.train("alone_asked", alone, "references.from=in_process"))
    lab.train_here("alone_read", alone, root, "references.from=cache")
    steps = (tmp_path / "runs" / "alone_read" / "steps.jsonl").read_text().splitlines()
    assert curve([json.loads(line) for line in steps]) == expected
