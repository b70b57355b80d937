"""However a run ends, nothing of it stays: no process, no file in shared memory, no half-written export."""

import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.run.running import ZERO_3, Running, cmdline, wait_until

DEADLINE_S = 60  # far beyond the 10 s that users are told, since the machine of a test may be busy
REPOSITORY = Path(__file__).parents[2]
SHARED = Path("/dev/shm")


def shared_folders(pids: list[int]) -> set[Path]:
    """Return the folders and files in /dev/shm that these processes have mapped."""
    maps = {Path(line.path) for pid in pids for line in psutil.Process(pid).memory_maps()}
    named = {path for path in maps if SHARED in path.parents and not path.name.endswith("(deleted)")}
    return {path if path.parent == SHARED else path.parent for path in named}


class LongRun(Running):
    """A run without end, past its first step, with everything that belongs to it."""

    def __init__(self, lab, name: str, ranks: int | None, *overrides: str) -> None:
        super().__init__(
            lab, name, "train.steps=100000", *overrides, ranks=ranks, launcher="local.sh" if ranks == 3 else "deepspeed"
        )
        self.reaches(1)
        self.processes = self.family()
        leading = [line for line in self.lines("processes.jsonl") if not line.get("shard")]
        self.by_role = {(line["role"], line["rank"]): line["pid"] for line in leading}
        self.shared = shared_folders(list(self.by_role.values()))
        assert any(path.is_dir() for path in self.shared)

    def ends_clean(self) -> None:
        _, alive = psutil.wait_procs(self.processes, timeout=DEADLINE_S)
        assert not alive, [cmdline(process) for process in alive]
        wait_until(lambda: not any(path.exists() for path in self.shared), "an empty /dev/shm")
        assert not (self.directory / "export").exists() and not (self.directory / "finished.json").exists()


@pytest.mark.parametrize(
    "ranks,victim",
    [
        (1, "launcher"),
        (3, "student"),
        (3, "supervisor"),
        (None, "student"),
        *(
            pytest.param(*which, marks=pytest.mark.soak)
            for which in [(1, "launch.py"), (1, "student"), (1, "teacher"), (3, "teacher"), (3, "worker")]
        ),
        pytest.param(None, "split student", marks=pytest.mark.soak),
    ],
)
def test_killing_any_process_ends_all(lab, ranks, victim):
    """Worker, split: with a teacher in two processes, beside the student or where they were launched."""
    final = ["teachers.restarts=0", "teachers.give_up_s=2"] if victim in ("teacher", "worker") else []
    split = ["teachers.per_node=2", "teachers.tensor_parallel=2"] if victim in ("worker", "split student") else []
    name = f"killed_{ranks or 0}_{victim.replace('.', '_').replace(' ', '_')}"
    running = LongRun(lab, name, ranks, *final, *split, *([ZERO_3] if ranks == 3 else []))
    try:
        pid = {
            "launcher": running.launcher.pid,
            "launch.py": next((p.pid for p in running.processes if "deepspeed.launcher.launch" in p.cmdline()), None),
            "student": running.by_role["student", 0],
            "teacher": running.by_role["teacher", 0],
            "split student": running.by_role["student", 0],
            "worker": next(iter(running.workers()), None),
            "supervisor": psutil.Process(running.by_role["teacher", 0]).ppid(),
        }[victim]
        psutil.Process(pid).kill()
        running.ends_clean()
        if final:
            assert running.processes[0].returncode == 2  # psutil has waited for it already
            (said,) = running.said()
            assert "teacher 0" in said and "Look at its log" in said, said
    finally:
        for process in running.processes:
            if process.is_running():
                process.kill()


@pytest.mark.parametrize("start,child", [("deepspeed", "train.py"), ("python", "serve"), ("local.sh", "train.py")])
def test_a_launcher_killed_while_its_ranks_still_start_leaves_none_of_them(lab, start, child):
    """Imports take seconds, in which a rank has not looked for its launchers yet."""
    command = {
        "deepspeed": lab.command("run=early_1", "train.steps=100000", ranks=1),
        "python": lab.command("run=early_2", "train.steps=100000"),
        "local.sh": ["bash", f"{REPOSITORY}/launchers/local.sh", str(lab.recipe), "1", "1", "run=early_3"],
    }[start]
    with (lab.folder / "early.log").open("wb") as output:
        launcher = subprocess.Popen(
            command, cwd=lab.folder, env=lab.environment(), stdout=output, stderr=subprocess.STDOUT
        )
    family = psutil.Process(launcher.pid)

    def started() -> bool:
        return any(child in Path(word).name for one in family.children(recursive=True) for word in cmdline(one))

    wait_until(started, f"{child} of {start}")
    descendants = family.children(recursive=True)
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(descendants, timeout=DEADLINE_S)
    assert not alive, [cmdline(process) for process in alive]


def test_a_teacher_that_is_asked_to_leave_before_a_student_came_is_no_success(lab):
    """Its launcher would take exit code 0 for that, and the students would wait for a teacher."""
    running = Running(lab, "asked_early", ranks=2)
    wait_until(lambda: list((running.directory / "logs").glob("teacher-*.yaml")), "a teacher's recipe")
    found = [one for one in running.family() if any(Path(word).name == "teacher.py" for word in cmdline(one))]
    teacher = min(found, key=lambda one: one.create_time()).pid  # a child that it starts bears its words at first
    assert running.is_sent(signal.SIGTERM, teacher) == 75
    assert "stopped by a signal before a student came" in running.log.read_text()


def test_a_run_directory_in_use_is_refused_and_the_live_run_goes_on(lab):
    running = LongRun(lab, "in_use", None)
    try:
        assert "in use by a live run (pid" in lab.refuses("in_use", "train.steps=100000")
        assert running.launcher.poll() is None
    finally:
        running.launcher.kill()
    running.ends_clean()


def test_a_finished_run_is_not_made_again(lab, capfd):
    steps = lab.train("twice", "train.steps=1")
    before = (lab.folder / "runs" / "twice" / "steps.jsonl").stat().st_mtime_ns
    lab.train("twice", "train.steps=1")
    assert "nothing to do" in capfd.readouterr().out
    assert (lab.folder / "runs" / "twice" / "steps.jsonl").stat().st_mtime_ns == before
    assert "train.learning_rate: 0.01, now 1.0" in lab.refuses("twice", "train.steps=1", "train.learning_rate=1.0")
    assert len(steps) == 1


def test_a_run_whose_models_were_made_anew_is_refused_rather_than_taken_for_finished(lab, tmp_path):
    weights = shutil.copytree(lab.folder / "teacher", tmp_path / "teacher")
    overrides = ["anew", "train.steps=1", f"models.teacher.weights={weights}", "references.from=in_process"]
    lab.train(*overrides)
    other = load_file(weights / "model.safetensors")
    save_file({name: 2 * weight for name, weight in other.items()}, weights / "model.safetensors", {"format": "pt"})
    refused = lab.refuses(*overrides)
    assert "models.teacher: " in refused and "has been made anew since" in refused


def test_a_full_shared_memory_is_told_before_the_first_step_and_nothing_stays(lab):
    """A real one, of 128 KiB, where this machine lets us mount it over /dev/shm for one run."""
    mount = "mount -t tmpfs -o size=128k tmpfs /dev/shm"
    empty = 'until [ -z "$(ls -A /dev/shm)" ]; do sleep 0.1; done'
    own = f'{mount} && {{ "$@"; code=$?; {empty}; exit $code; }}'
    namespace = ["unshare", "--mount", "sh", "-c", own, "sh"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no shared memory of its own: mounting one needs root")
    done = lab.run(*namespace, *lab.command("run=full_shm"))
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("deltakd: ")]
    assert done.returncode == 2 and "the slots need" in said and "MiB are free" in said, done.stderr
    assert not (lab.folder / "runs" / "full_shm" / "steps.jsonl").exists()
