"""A small world for tests that run the whole path: rows, a tokenizer, and four models made on the spot.

The teacher's head has more rows than the student's, as Qwen2.5's 7B and 1.5B have. Nothing is trained: what the tests
compare are two ways to the same numbers.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIG_DFL, SIGHUP, SIGKILL, signal
from subprocess import PIPE

import psutil
import pytest
import torch
import yaml
from hypothesis import settings
from safetensors.torch import load_file, save_file

from deltakd.base.errors import DeltaKDError
from deltakd.base.ranks import Placement, forget_placement
from deltakd.data.settings import TokenizerSettings
from deltakd.data.tokenizer import train_tokenizer
from deltakd.models.new import write_new_model
from deltakd.models.settings import NewModelSettings
from deltakd.recipe.load import load
from deltakd.recipe.ranks import Launch, run_rank

# The same examples every time: a change is judged by what it changed.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

REPOSITORY = Path(__file__).parents[1]
# A suite that nohup started would hand its deafness for SIGHUP on to every run that a test sends one.
signal(SIGHUP, SIG_DFL)
DEADLINE_S = 600  # of a command, on a busy machine
NAMES = ["anna", "bela", "carl", "dora", "emil", "frida", "gustav", "hanna"]
THINGS = ["apple", "book", "cat", "drum", "egg", "fan", "goat", "hat", "ink", "jar"]


def chat_rows(first: int, count: int) -> list[dict[str, object]]:
    """Rows of different lengths; every second one has two assistant turns."""
    rows = []
    for index in range(first, first + count):
        name, thing = NAMES[index % len(NAMES)], THINGS[index % len(THINGS)]
        turns = [("user", f"what has {name} got ?"), ("assistant", f"{name} has a {thing} " * (1 + index % 3) + ".")]
        if index % 2:
            turns += [("user", f"number {index} ?"), ("assistant", f"the {thing} .")]
        rows.append({"messages": [{"role": role, "content": content.strip()} for role, content in turns]})
    return rows


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def free_port() -> int:
    """Runs beside each other need a port each; this one is free now, and drawn from thousands."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def kill_family(pid: int) -> None:
    """Kill a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


@dataclass(frozen=True)
class Lab:
    """Where the small world lies, and the commands that users type."""

    folder: Path
    recipe: Path

    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # Where this process stands, which training within it has written down, says nothing of the run's processes.
        own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        forget_placement(own)
        return {**own, "PATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def command(
        self,
        *overrides: str,
        ranks: int | None = None,
        stage: str | None = None,
        port: int | None = None,
        launcher: str = "deepspeed",
    ) -> list[str]:
        """Return the command of a training run: by a launcher if `ranks` is given, else one process.

        local.sh starts at once what deepspeed's launcher takes two more processes and their imports for.
        """
        script = str(REPOSITORY / "launchers" / "train.py")
        meet = ["--master_port", str(port or free_port())]
        tail = ["--recipe", str(self.recipe), *(["--stage", stage] if stage else []), *overrides]
        if ranks is None:
            return [sys.executable, script, *tail]
        if launcher == "torchrun":
            return ["torchrun", *meet, "--nproc_per_node", str(ranks), script, *tail]
        if launcher == "deepspeed":
            return ["deepspeed", *meet, "--num_accelerators", str(ranks), script, *tail]
        teachers = next((one.partition("=")[2] for one in overrides if one.startswith("teachers.per_node=")), "1")
        if ranks == 1 or "references.from=in_process" in overrides:
            teachers = "0"  # a student that is alone starts its own
        students = str(ranks - int(teachers))
        return ["bash", str(REPOSITORY / "launchers" / "local.sh"), str(self.recipe), students, teachers, *overrides]

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end; one that hangs is killed with all that it started, and shows how far it came."""
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment(), stdout=PIPE, stderr=PIPE, text=True, errors="replace"
        )
        watch = threading.Timer(DEADLINE_S, kill_family, [process.pid])
        watch.start()
        try:
            output, errors = process.communicate()
        finally:
            watch.cancel()
        if process.returncode == -SIGKILL:
            pytest.fail(f"{command} hung:\n{output[-3000:]}{errors[-3000:]}")
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def train_here(self, run: str, *overrides: str) -> None:
        """Live a student rank's life in this process, which has imported already what takes a new one ten seconds."""
        run_rank(load(str(self.recipe), [f"run={run}", *overrides]), Launch(Placement(0, 1, 0, 1)))

    def train(
        self, run: str, *overrides: str, ranks: int | None = None, launcher: str = "local.sh"
    ) -> list[dict[str, float]]:
        """Train to the end and return the lines of steps.jsonl."""
        if ranks is None and not any("engine={" in one for one in overrides if "single" not in one):
            self.train_here(run, *overrides)
            return self.lines(run, "steps.jsonl")
        done = self.run(*self.command(f"run={run}", *overrides, ranks=ranks, launcher=launcher))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return self.lines(run, "steps.jsonl")

    def refuses(self, run: str, *overrides: str) -> str:
        """Return the sentence with which a run is refused; how it is said: test_bad_input."""
        with pytest.raises(DeltaKDError) as refused:
            self.train_here(run, *overrides)
        return str(refused.value)

    def lines(self, run: str, name: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "runs" / run / name).read_text().splitlines()]


def make_outspoken(folder: Path) -> None:
    """Scale a new model's weights: as initialised, all models say nearly the same of every token."""
    weights = load_file(folder / "model.safetensors")
    scaled = {name: weight * 4 if weight.ndim > 1 else weight for name, weight in weights.items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    torch.set_num_threads(1)
    train = write_rows(folder / "train.jsonl", chat_rows(0, 60))
    write_rows(folder / "validation.jsonl", chat_rows(100, 10))
    train_tokenizer(TokenizerSettings(files=[str(train)], vocab_size=300), folder / "tokenizer")
    sizes = {"student": (32, 2, 0, None), "teacher": (48, 3, 1, 320), "teacher_raw": (48, 3, 2, 320)}
    for name, (hidden, layers, seed, head_rows) in sizes.items():
        made = NewModelSettings(
            tokenizer=str(folder / "tokenizer"),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=2 * hidden,
            tie_embeddings=name == "student",
            head_rows=head_rows,
            seed=seed,
        )
        write_new_model(made, folder / name)
        make_outspoken(folder / name)
    recipe = {
        "root": str(folder / "runs"),
        "models": {name: {"weights": str(folder / name)} for name in sizes} | {"dtype": "float32"},
        "data": {
            "train": {"path": str(train)},
            "validation": {"path": str(folder / "validation.jsonl")},
            "max_tokens": 128,
        },
        "objective": {"target": {"name": "delta", "alpha": 0.5}},
        "train": {"steps": 5, "tokens_per_step": 512, "tokens_per_micro_batch": 256, "learning_rate": 1.0e-2},
        "engine": {"name": "single"},
        "records": {"tensorboard": False},
        "evaluation": {"max_new_tokens": 8},
    }
    path = folder / "lab.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return Lab(folder, path)
