"""`deltakd run`: the stages of a recipe's pipeline in order, each skipped once it is finished.

Training stages run as processes of their own through the launcher that users type (`deepspeed launchers/train.py`), so
the pipeline is nothing but the commands, in order. Their output goes to log.txt in the stage's folder; here one bar per
stage follows its steps.jsonl. What a stage made is never made again, and a recipe that changed under it is refused.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deltakd.base.errors import EXIT_STOPPED, DeltaKDError, RunError, Stopped
from deltakd.base.files import remove
from deltakd.base.machine import machine_facts
from deltakd.base.rundir import RunDirectory
from deltakd.data.examples import ExampleCounts
from deltakd.recipe.checks import check_every_stage, check_recipe
from deltakd.recipe.finished import is_finished
from deltakd.recipe.load import Loaded, find_recipe, load
from deltakd.recipe.paths import check_compared, check_hub, check_paths
from deltakd.recipe.schema import Recipe, StageSettings
from deltakd.train.records import describe, describe_briefly

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
POLL_S = 0.2


def run(name: str, overrides: Sequence[str], num_processes: int | None, only: str | None = None) -> None:
    """Run every stage that is not finished, or `only` one, and print the table and where the results lie."""
    base = check_every_stage(name, overrides)[0]
    if not base.recipe.pipeline:
        raise RunError(f"{base.where('pipeline')}: no stages. Write some, or use `deltakd train {name}`.")
    stages = [stage for stage in base.recipe.pipeline if only in (None, stage.name)]
    if not stages:
        names = ", ".join(stage.name for stage in base.recipe.pipeline)
        raise RunError(f"{base.where('pipeline')}: no stage {only}. Write --stage with one of {names}.")
    name_accelerator()
    console = Console(stderr=True)
    root = Path(base.recipe.root)
    claim = RunDirectory(root / ".stages" / only if only else root)  # jobs of one chain run beside each other
    check_compared(base.recipe, base.where, name, only)
    with claim.claim(), ended_as_interrupted():
        for stage in stages:
            if stage.train is not None:
                _train_stage(name, overrides, stage.name, num_processes, console)
            elif stage.generate is not None:
                _generate_stage(base, name, overrides, stage, num_processes, console)
            else:
                _make_stage(base, stage, console)
    tables = [root / stage.name / "table.md" for stage in stages if stage.evaluate is not None]
    for table in tables:
        from deltakd.recipe.evaluation import results_in

        print(f"\n{table.read_text()}\n{results_in(table.parent)}")


@contextmanager
def ended_as_interrupted() -> Iterator[None]:
    """Have SIGTERM end this process as Ctrl-C does: with a stage's training asked to keep its state, and its word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def name_accelerator() -> None:
    """Tell DeepSpeed that there is no accelerator, if there is none: it warns of that in every process otherwise."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def train(
    name: str, overrides: Sequence[str], stage: str | None, num_processes: int | None, resume: bool = False
) -> None:
    """Become the launcher that fits this machine, for the recipe or one of its training stages.

    What a rank would refuse of the recipe is refused here, before any process starts and prints around it.
    """
    loaded = load(name, overrides, stage)
    check_recipe(loaded.recipe, loaded.where)
    if not is_finished(RunDirectory(Path(loaded.recipe.directory)), loaded.recipe):
        check_paths(loaded.recipe, loaded.where, name)
    command = [*launch_command(loaded.recipe, name, overrides, stage, num_processes), *(["--resume"] if resume else [])]
    print(" ".join(command), flush=True)
    os.execvpe(command[0], command, launch_environment())


def launch_command(
    recipe: Recipe,
    name: str,
    overrides: Sequence[str],
    stage: str | None,
    num_processes: int | None,
    port: int | None = None,
) -> list[str]:
    """Return the command that starts a training: the engine's launcher over this machine's accelerators.

    DeepSpeed's ranks meet at one port of the machine: launches beside each other need a `port` each.
    """
    if not (LAUNCHERS / "train.py").exists():
        raise RunError(f"{LAUNCHERS}: no launchers. Work in a checkout of the repository (`pip install -e .`).")
    tail = [str(LAUNCHERS / "train.py"), "--recipe", str(find_recipe(name)), *(["--stage", stage] if stage else [])]
    if recipe.engine.name == "single":
        return [sys.executable, *tail, *overrides]
    if recipe.engine.name == "fsdp2":
        nodes = ["--standalone", "--nproc_per_node", str(num_processes or _num_accelerators())]
        return [_program("torchrun"), *nodes, *tail, *overrides]
    count = ["--num_accelerators", str(num_processes)] if num_processes else []
    meet = [] if port is None else ["--master_port", str(port)]
    return [_program("deepspeed"), *count, *meet, *tail, *overrides]


def _program(name: str) -> str:
    """Return a launcher's path. Raises RunError if it is not installed."""
    beside = Path(sys.executable).with_name(name)
    program = str(beside) if beside.exists() else shutil.which(name)
    if program is None:
        raise RunError(f"{name}: not found beside python. Run `pip install -r requirements.txt`.")
    return program


def _num_accelerators() -> int:
    import torch

    return max(1, torch.accelerator.device_count())


def launch_environment() -> dict[str, str]:
    """Return the environment of a launched run: this python first, one thread per process unless it says otherwise."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, "PATH": path}


def _train_stage(name: str, overrides: Sequence[str], stage: str, num_processes: int | None, console: Console) -> None:
    loaded = load(name, overrides, stage)
    recipe = loaded.recipe
    directory = RunDirectory(Path(recipe.directory))
    if is_finished(directory, recipe):
        console.print(f"{stage}: finished before")
        return
    check_paths(recipe, loaded.where, name)
    check_hub(recipe, loaded.where)
    command = launch_command(recipe, name, overrides, stage, num_processes)
    directory.path.mkdir(parents=True, exist_ok=True)
    log = directory.path / "log.txt"
    if not console.is_terminal:
        console.print(f"{stage}: {recipe.train.steps:,} steps; output in {log}", soft_wrap=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=launch_environment()
        )
    try:
        _follow(process, directory, stage, recipe.train.steps, console)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise failure(stage, log, EXIT_STOPPED) from None
    finally:
        # Interrupted: its ranks keep their state and end, whether they hear of it or only miss their launcher.
        process.terminate()
        process.wait()
    # A launcher's exit code does not prove success (a killed one may return 0): the run's own word does.
    if process.returncode != 0 or not is_finished(directory, recipe):
        raise failure(stage, log, process.returncode)
    if not console.is_terminal and (last := directory.last_line("steps.jsonl")):
        console.print(f"{stage}: {last['step']} steps, {describe(last)}", soft_wrap=True)
    counts = ExampleCounts(**json.loads((directory.path / "run.json").read_text())["data"])
    if counts.left_out:
        console.print(f"{stage}: {counts.describe()}", soft_wrap=True)


def _follow(process: "subprocess.Popen[bytes]", run: RunDirectory, stage: str, steps: int, console: Console) -> None:
    """Show a bar of the stage's steps until its process ends."""
    columns = (
        TextColumn(f"{stage:<14}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
    )
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(stage, total=steps, text="starting")
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=POLL_S)
            if last := run.last_line("steps.jsonl"):
                bar.update(task, completed=last["step"], text=describe_briefly(last))
            if process.returncode is not None:
                return


def failure(stage: str, log: Path, code: int) -> DeltaKDError:
    """Say why a stage failed: its own sentence if it left one, else where its log is."""
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("deltakd: ")]
    if said:
        kind = Stopped if code == EXIT_STOPPED or "deltakd: stopped by " in said[-1] else RunError  # torchrun returns 1
        word = said[-1].removeprefix("deltakd: ")
        # We pass a request to stop on by SIGTERM, whatever it came by.
        return kind(f"stage {stage}: {word.replace('stopped by SIGTERM', 'stopped') if kind is Stopped else word}")
    if code == EXIT_STOPPED:  # its launcher may end before its ranks have kept their state and said so
        return Stopped(f"stage {stage}: stopped; its ranks keep what is trained. The same command goes on.")
    return RunError(f"stage {stage}: ended with exit code {code} before it was finished. Look at {log}.")


def _make_stage(base: Loaded, stage: StageSettings, console: Console) -> None:
    """Run a stage that trains nothing, unless its folder already says that it is finished with the same settings."""
    folder = RunDirectory(Path(base.recipe.root) / stage.name)
    if stage.tokenizer is not None and stage.tokenizer.files is None:
        files = {"files": [base.recipe.data.train.path]}
        stage = stage.model_copy(update={"tokenizer": stage.tokenizer.model_copy(update=files)})
    settings = stage.model_dump(mode="json")
    finished = folder.finished()
    if finished is not None and stage.evaluate is None:
        if finished["settings"] != settings:
            made, wanted = finished["settings"][stage.kind], settings[stage.kind]
            key = next((one for one in wanted if made.get(one) != wanted[one]), "kind") if made else "kind"
            raise RunError(
                f"{folder.path}: finished with other settings than {base.where('pipeline')} gives {stage.name} now "
                f"({key}: {(made or {}).get(key)}, now {wanted.get(key)}). Write root=... for a new place, or remove "
                "the folder."
            )
        console.print(f"{stage.name}: finished before")
        return
    if stage.evaluate is not None:
        from deltakd.recipe.evaluation import evaluate

        evaluate(base, stage.name, stage.evaluate, folder.path, console)
        return
    part = folder.path.with_name(folder.path.name + ".part")
    remove(part)
    with console.status(f"{stage.name}: writing"):
        made = _make(stage, part)
    remove(folder.path)
    part.replace(folder.path)
    folder.finish({"settings": settings, "made": made, **machine_facts()})
    console.print(f"{stage.name}: {made}")


def _generate_stage(
    base: Loaded, name: str, overrides: Sequence[str], stage: StageSettings, num_processes: int | None, console: Console
) -> None:
    """Have a model write responses; what it has written before stays."""
    from deltakd.recipe.generating import command_of, make

    assert stage.generate is not None  # asked before
    folder = Path(base.recipe.root) / stage.name
    count = num_processes or _num_accelerators()
    console.print(make(base, stage.generate, folder, count, command_of(name, overrides, stage.name), console))


def _make(stage: StageSettings, folder: Path) -> str:
    """Make what a stage makes in a folder of its own; return one line about it."""
    if stage.world is not None:
        from deltakd.data.world import write_world

        write_world(folder, **stage.world.model_dump())
        return f"{stage.world.num_persons} persons, {stage.world.num_raw:,} raw rows, {stage.world.num_chats:,} chats"
    if stage.tokenizer is not None:
        from deltakd.data.tokenizer import load_tokenizer, train_tokenizer

        train_tokenizer(stage.tokenizer, folder)
        return f"{len(load_tokenizer(str(folder))):,} tokens"
    assert stage.model is not None  # the schema allows exactly one kind
    from deltakd.models.new import write_new_model

    return f"{write_new_model(stage.model, folder):,} parameters, random"
