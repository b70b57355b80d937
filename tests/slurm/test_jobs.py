"""The repository's own sbatch files, unchanged, on a real Slurm: where ranks are, and how jobs end."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import free_port
from tests.run.running import ZERO_3, curve, same_weights
from tests.slurm.cluster import NUM_NODES, SHARED_MEMORY_MIB, Cluster, missing, wait_until

REPOSITORY = Path(__file__).parents[2]
STEPS = 24
LONG_S = 300
SETTINGS = (f"train.steps={STEPS}", "checkpoints.every_steps=1", ZERO_3)
TWO = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"a cluster on this machine {missing()}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def alone(lab):
    """The same training without Slurm, on as many student ranks."""
    return curve(lab.train("alone_on_one_node", *SETTINGS, ranks=3))


class Job:
    """A training as a job of two nodes with a student and a teacher each, unless its options say otherwise."""

    def __init__(self, cluster, lab, name, *settings, options=(), variables=None):
        self.cluster, self.lab, self.name = cluster, lab, f"job_{name}"
        self.directory, self.log = lab.folder / "runs" / self.name, lab.folder / f"{self.name}.log"
        self.settings = settings or SETTINGS
        self.number = self.submit(*(options or TWO), variables=variables)

    def submit(self, *options, script="slurm/deltakd_qwen.sbatch", variables=None, settings=None):
        variables = {"RECIPE": str(self.lab.recipe), "SITE_VENV": sys.prefix, **(variables or {})}
        environment = {**self.lab.environment(), **self.cluster.environment, **variables, "OMP_NUM_THREADS": "1"}
        given = [f"run={self.name}", *self.settings] if settings is None else settings
        command = ["sbatch", "--parsable", f"--output={self.log}", "--time=30", *options, script, *given]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def steps(self):
        try:
            return self.lab.lines(self.name, "steps.jsonl")
        except FileNotFoundError:
            return []

    def state(self):
        return self.cluster.job(self.number)["JobState"]

    def reaches(self, step):
        wait_until(lambda: len(self.steps()) >= step or self.state() in ENDED, f"step {step}", LONG_S)
        assert self.state() not in ENDED, self.said()

    def ends(self):
        """Wait for its end; returns its state and exit code, when its nodes are clean."""
        wait_until(lambda: self.state() in ENDED, "the job's end", LONG_S)
        job = self.cluster.job(self.number)
        wait_until(lambda: all(not self.left_on(node) for node in range(1, NUM_NODES + 1)), "clean nodes")
        return job["JobState"], int(job["ExitCode"].partition(":")[0])

    def left_on(self, node):
        """Return what a node still has of any run: folders in shared memory, processes."""
        if node not in self.cluster._inits:
            return ""
        processes = self.cluster.on(node, "pgrep", "-f", "launchers/|deltakd serve").stdout
        return self.cluster.on(node, "sh", "-c", "ls -d /dev/shm/deltakd-* 2>/dev/null").stdout + processes

    def lives(self):
        """Return the run's lives as the job noted them."""
        path = self.directory / "attempts.jsonl"
        return self.lab.lines(self.name, path.name) if path.exists() else []

    def roles(self):
        lines = self.lab.lines(self.name, "processes.jsonl")
        return sorted((line["role"], line["host"]) for line in lines)

    def is_that_of(self, expected):
        """It has the numbers and weights of the training without Slurm, bit for bit."""
        assert curve(self.steps()) == expected, self.said()
        assert same_weights(self.lab, self.name, "alone_on_one_node")


def test_students_and_teachers_on_two_nodes_train_as_on_one(cluster, lab, alone):
    cluster.on(2, "sh", "-c", "mkdir /dev/shm/deltakd-dead && touch /dev/shm/deltakd-dead/lock")  # of a former job
    job = Job(cluster, lab, "both")
    assert job.ends() == ("COMPLETED", 0), job.said()
    job.is_that_of(alone)
    assert "/dev/shm/deltakd-dead: removed" in job.said()
    assert job.roles() == [(role, node) for role in ("student", "teacher") for node in ("node1", "node2")]


def test_teachers_on_their_own_node_answer_over_the_network(cluster, lab, alone):
    """A heterogeneous job; the students' sockets listen on the interface that the site names."""
    size = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    options = ["--nodes=2", *size, ":", "--nodes=1", *size]
    job = Job(cluster, lab, "apart", options=options, variables={"SITE_INTERFACE": "eth0"})
    assert job.ends() == ("COMPLETED", 0), job.said()
    job.is_that_of(alone)
    assert job.roles() == [("student", "node1"), ("student", "node2"), ("teacher", "node3")]
    assert "may not have been swept" not in job.said()


@pytest.mark.parametrize("options", [[], pytest.param(["--no-kill"], marks=pytest.mark.soak)], ids=["", "no kill"])
def test_when_a_node_dies_the_job_goes_on_elsewhere_to_the_weights_of_an_undisturbed_run(cluster, lab, alone, options):
    """With --no-kill Slurm lets the others live, and srun returns 0: what the run wrote decides."""
    job = Job(cluster, lab, f"node_lost_{len(options)}", options=[*TWO, *options])
    job.reaches(5)
    died = time.monotonic()
    cluster.kill(2)
    try:
        wait_until(lambda: len(job.lives()) == 2, "another life", LONG_S)
        steps = len(job.steps())
        wait_until(lambda: len(job.steps()) > steps or job.state() in ENDED, "its next step", LONG_S)
        print(f"a node's death to the next step: {time.monotonic() - died:.0f} s")
        assert job.ends() == ("COMPLETED", 0), job.said()
    finally:
        cluster.boot(2)
        wait_until(lambda: cluster.states() == ["idle"] * NUM_NODES, "idle nodes")
    job.is_that_of(alone)
    assert cluster.job(job.number)["NodeList"] == "node[1,3]"


@pytest.mark.soak
def test_when_ranks_die_and_their_node_does_not_the_job_queues_itself_again(cluster, lab, alone):
    job = Job(cluster, lab, "ranks_lost")
    job.reaches(5)
    cluster.on(2, "pkill", "-KILL", "-f", "launchers/train.py")
    assert job.ends() == ("COMPLETED", 0), job.said()
    job.is_that_of(alone)
    assert len(job.lives()) == 2 and "Killed" in job.said()


def test_before_the_time_limit_it_keeps_a_checkpoint_and_queues_itself_again(cluster, lab, alone):
    """The signal is sent by hand; that Slurm sends it before the limit: the next."""
    job = Job(cluster, lab, "asked", f"train.steps={STEPS}", "checkpoints.every_steps=null", ZERO_3)
    job.reaches(5)
    cluster.say("scancel", "--batch", "--signal=USR1", job.number)
    assert job.ends() == ("COMPLETED", 0), job.said()
    job.is_that_of(alone)
    assert [life["step"] > 0 for life in job.lives()] == [False, True] and "queued again" in job.said()


@pytest.mark.soak
def test_a_time_limit_is_an_interruption(cluster, lab):
    options = [*TWO, "--time=2", "--signal=B:USR1@30"]
    job = Job(cluster, lab, "limited", "train.steps=100000", "checkpoints.every_steps=null", ZERO_3, options=options)
    wait_until(lambda: len(job.lives()) == 2, "another life", LONG_S)
    assert job.lives()[1]["step"] > 0, job.said()
    cluster.say("scancel", job.number)
    assert job.ends()[0] == "CANCELLED"


@pytest.mark.soak
def test_a_job_that_is_cancelled_keeps_its_step_and_stays_cancelled(cluster, lab, alone):
    job = Job(cluster, lab, "cancelled", f"train.steps={STEPS}", "checkpoints.every_steps=null", ZERO_3)
    job.reaches(5)
    cluster.say("scancel", job.number)
    assert job.ends()[0] == "CANCELLED", job.said()
    assert list((job.directory / "checkpoints").glob("step-*")) and len(job.steps()) < STEPS
    job.number = job.submit(*TWO)
    assert job.ends() == ("COMPLETED", 0), job.said()
    job.is_that_of(alone)


@pytest.mark.soak
def test_a_job_of_higher_priority_only_interrupts(cluster, lab, alone):
    job = Job(cluster, lab, "preempted", f"train.steps={STEPS}", "checkpoints.every_steps=null", ZERO_3)
    job.reaches(5)
    size = ["--partition=urgent", f"--nodes={NUM_NODES}", "--exclusive", "--output=/dev/null"]
    cluster.say("sbatch", *size, "--wrap=true")
    assert job.ends() == ("COMPLETED", 0), job.said()
    job.is_that_of(alone)
    assert [life["step"] > 0 for life in job.lives()] == [False, True]


@pytest.mark.soak
def test_a_node_without_room_in_shared_memory_ends_the_job_with_one_sentence(cluster, lab):
    cluster.on(2, "sh", "-c", f"head -c {SHARED_MEMORY_MIB + 1}M /dev/zero > /dev/shm/full")
    try:
        job = Job(cluster, lab, "full")
        assert job.ends() == ("FAILED", 2), job.said()
    finally:
        cluster.on(2, "rm", "/dev/shm/full")
    (said,) = (line for line in job.said().splitlines() if line.startswith("deltakd") and "/dev/shm" in line)
    assert "0.0 MiB are free" in said
    assert len(job.lives()) == 1 and not job.steps()


@pytest.mark.soak
def test_nodes_that_cannot_reach_each_other_end_the_job_when_it_has_come_no_further(cluster, lab):
    """Slurm's own node reaches both: it starts the ranks, and they do not meet."""
    cluster.separate(2, 3)
    try:
        settings = ["train.steps=5", "engine={name: deepspeed, meet_s: 15}"]
        job = Job(cluster, lab, "unreachable", *settings, options=["--nodes=3", *TWO[1:]])
        assert job.ends() == ("FAILED", 2), job.said()
    finally:
        cluster.separate(2, 3, again=True)
    assert "have not met" in job.said() and "3 lives in a row" in job.said()


@pytest.mark.soak
def test_a_sweep_is_an_array_and_every_task_has_its_line(cluster, lab):
    lines = lab.folder / "alphas.txt"
    lines.write_text("run=alpha_0 objective.target.alpha=0.0\nrun=alpha_1 objective.target.alpha=1.0\n")
    one = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    job = Job(cluster, lab, "sweep", "train.steps=2", options=[*one, "--array=1-2"], variables={"SWEEP": str(lines)})
    runs = [lab.folder / "runs" / name / "finished.json" for name in ("alpha_0", "alpha_1")]
    wait_until(lambda: all(path.exists() for path in runs), "both runs", LONG_S)
    wait_until(lambda: not cluster.say("squeue", "--noheader"), "an empty queue", LONG_S)
    first, second = (lab.lines(name, "steps.jsonl") for name in ("alpha_0", "alpha_1"))
    assert first[0]["loss"] != second[0]["loss"], job.said()


@pytest.mark.soak
def test_a_chain_goes_through_the_stages_and_compares_checkpoints(cluster, lab):
    """submit.sh: teacher, then delta, then their comparison; then an array over the checkpoints of delta."""
    root = lab.folder / "chain"
    recipe = yaml.safe_load(lab.recipe.read_text()) | {"root": str(root)}
    recipe["train"]["steps"] = 2
    recipe["checkpoints"] = {"every_steps": 1, "models": True}
    recipe["models"]["teacher"] = {"weights": "{root}/teacher/export"}
    student = {"student": {"weights": str(lab.folder / "teacher_raw")}}
    recipe["pipeline"] = [
        {
            "name": "teacher",
            "train": {"models": student, "objective": {"sft_weight": 1.0, "target": {"name": "teacher"}}},
        },
        {"name": "delta", "train": {}},
        {
            "name": "evaluation",
            "evaluate": {
                "models": {"raw": str(lab.folder / "student"), "delta": "{root}/delta/export"},
                "baseline": "raw",
            },
        },
    ]
    path = lab.folder / "chain.yaml"
    path.write_text(yaml.safe_dump(recipe))
    variables = {"SITE_VENV": sys.prefix, "OMP_NUM_THREADS": "1", "SBATCH_OUTPUT": f"{lab.folder}/%x-%j.log"}
    environment = {**lab.environment(), **cluster.environment, **variables}
    size = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    command = [str(REPOSITORY / "slurm" / "submit.sh"), str(path), *size]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["teacher", "delta", "evaluation"], done.stderr
    wait_until(lambda: not cluster.say("squeue", "--noheader"), "an empty queue", LONG_S)
    logs = "".join(path.read_text() for path in lab.folder.glob("chain*.log"))
    assert "| delta" in (root / "evaluation" / "table.md").read_text(), logs
    compared = root / "delta" / "evaluation"
    for options, made in (
        (["--array=1-2"], ["scores/step-00000001.json", "scores/step-00000002.json"]),
        ([], ["table.md"]),
    ):
        given = {**environment, "RECIPE": str(path), "RUN": "delta"}
        command = ["sbatch", "--parsable", *options, "slurm/stage.sbatch"]
        subprocess.run(command, cwd=REPOSITORY, env=given, check=True, capture_output=True)
        wait_until(lambda: not cluster.say("squeue", "--noheader"), "an empty queue", LONG_S)
        assert all((compared / name).exists() for name in made)
    table = (compared / "table.md").read_text()
    assert "| step-00000001 |" in table and "| step-00000002 |" in table


@pytest.mark.soak
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_hosts_without_slurm_train_as_one(cluster, lab, alone, launcher, tmp_path):
    """Each host's launcher is started by hand: these have no ssh, which deepspeed would start the others by."""
    port = str(free_port())
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("node1 slots=2\nnode2 slots=2\n")
    common = [str(REPOSITORY / "launchers" / "train.py"), "--recipe", str(lab.recipe), f"run=by_{launcher}", *SETTINGS]
    children = []
    for rank in range(2):
        meet = ["--master_addr", "node1", "--master_port", port, "--node_rank", str(rank)]
        start = {
            "torchrun": ["torchrun", "--nnodes", "2", "--nproc_per_node", "2", *meet],
            "deepspeed": ["deepspeed", "--hostfile", str(hosts), "--no_ssh", *meet],
        }[launcher]
        environment = {**lab.environment(), "DELTAKD_LAUNCH": f"by-hand-{launcher}"}
        with (tmp_path / f"{rank}.log").open("wb") as log:
            command = cluster.within(rank + 1, *start, *common)
            children.append(subprocess.Popen(command, cwd=lab.folder, env=environment, stdout=log, stderr=log))
    codes = [child.wait(LONG_S) for child in children]
    assert codes == [0, 0], "".join((tmp_path / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    assert curve(lab.lines(f"by_{launcher}", "steps.jsonl")) == alone
    assert same_weights(lab, f"by_{launcher}", "alone_on_one_node")
