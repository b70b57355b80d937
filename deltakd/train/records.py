"""Where a run's numbers go: steps.jsonl always, TensorBoard and Weights & Biases by recipe, the console for people.

Rank 0 speaks. On a terminal one progress bar, else one line per step; both with loss, tokens/s and waiting.
"""

import hashlib
import json
from dataclasses import asdict
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deltakd.base.errors import RunError
from deltakd.base.rundir import RunDirectory
from deltakd.train.settings import RecordsSettings
from deltakd.train.step import StepRecord
from deltakd.train.trace import Trace
from deltakd.train.validation import Sample, ValidationRecord

PLOTTED = (
    *("loss", "cross_entropy", "policy", "reward", "corpus", "divergence", "grad_norm", "learning_rate"),
    *("step_s", "wait_s"),
)
VALIDATED = ("loss", "cross_entropy", "divergence", "kl_to_target", "rouge1", "rouge2", "rougeL")
SHOWN_LETTERS = 60  # of a prompt or an answer, on the console


class Records:
    """Writes every step's record; use with `with`."""

    def __init__(self, run: RunDirectory, settings: RecordsSettings, name: str, num_steps: int, done: int = 0) -> None:
        """Open the writers; a run that has `done` steps goes on in the same curves.

        Raises RunError if the recipe asks for Weights & Biases and it is not installed.
        """
        self._run = run
        self._tensorboard: Any = None
        self._wandb: Any = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run.path / "tensorboard"), purge_step=done + 1)
        if settings.wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise RunError("records.wandb_project: wandb is not installed. Run `pip install wandb`.") from error
            started = f"{run.path.resolve()}|{json.loads((run.path / 'run.json').read_text())['started']}"
            identity = hashlib.blake2b(started.encode(), digest_size=8).hexdigest()  # the same when it goes on
            self._wandb = wandb.init(
                project=settings.wandb_project, name=name, dir=str(run.path), id=identity, resume="allow"
            )
        self._trace = Trace(run.path, settings.profile) if settings.profile else None
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=num_steps, completed=done, text="")
        self._is_terminal = console.is_terminal
        self._num_steps = num_steps

    def __enter__(self) -> "Records":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write_trace(None)
        self._bar.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def begins(self, step: int) -> None:
        """Hear that a step begins; it may be one to trace."""
        if self._trace is not None:
            self._trace.begins(step)

    def _write_trace(self, step: int | None) -> None:
        if self._trace is not None and (path := self._trace.ended(step)):
            self._bar.console.print(f"{path}: a trace, for chrome://tracing or ui.perfetto.dev", soft_wrap=True)

    def write(self, record: StepRecord) -> None:
        """Record one optimizer step everywhere."""
        self._write_trace(record.step)
        values = asdict(record)
        self._run.append("steps.jsonl", values)
        plotted = {name: values[name] for name in PLOTTED if values[name] is not None}
        for name, value in plotted.items() if self._tensorboard is not None else ():
            self._tensorboard.add_scalar(name, value, record.step)
        if self._wandb is not None:
            self._wandb.log(plotted, step=record.step)
        text = describe(values)
        self._bar.update(self._task, completed=record.step, text=describe_briefly(values))
        if not self._is_terminal:
            print(f"step {record.step}/{self._num_steps}  {text}", flush=True)

    def validated(self, record: ValidationRecord, samples: list[Sample]) -> None:
        """Record a validation everywhere, with some of the answers that it drew."""
        values = asdict(record)
        self._run.append("validation.jsonl", values)
        for sample in samples:
            self._run.append("samples.jsonl", {"step": record.step, **asdict(sample)})
        plotted = {f"validation/{name}": values[name] for name in VALIDATED if values[name] is not None}
        text = "\n\n".join(f"**{one.prompt}**\n\n{one.answer}" for one in samples)
        if self._tensorboard is not None:
            for name, value in plotted.items():
                self._tensorboard.add_scalar(name, value, record.step)
            if samples:
                self._tensorboard.add_text("validation/answers", text, record.step)
        if self._wandb is not None:
            self._wandb.log(plotted, step=record.step)
        self._bar.console.print(describe_validation(record, samples), markup=False, highlight=False, soft_wrap=True)


def describe_validation(record: ValidationRecord, samples: list[Sample]) -> str:
    """Say a validation in one line, and an answer in another."""
    parts = [f"validation {record.step}  loss {record.loss:.4f}  cross_entropy {record.cross_entropy:.4f}"]
    parts += [f"kl_to_target {record.kl_to_target:.4f}"] if record.kl_to_target is not None else []
    parts += [f"ROUGE-L {100 * record.rougeL:.1f}"] if record.rougeL is not None else []
    parts += ["the best so far"] if record.is_best else []
    text = "  ".join(parts)
    if samples:
        text += f"\n  asked {_short(samples[0].prompt)}, answers {_short(samples[0].answer)}"
    return text


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= SHOWN_LETTERS else text[:SHOWN_LETTERS] + "...", ensure_ascii=False)


def describe(record: dict[str, Any]) -> str:
    """Say a step in one line."""
    return (
        f"loss {record['loss']:.4f}  grad_norm {record['grad_norm']:.3f}  lr {record['learning_rate']:.2e}  "
        f"{record['num_tokens'] / record['step_s']:,.0f} tokens/s  waiting {record['wait_s'] / record['step_s']:.1%}"
    )


def describe_briefly(record: dict[str, Any]) -> str:
    """Say a step beside a progress bar, on a terminal of 80 columns."""
    waiting = record["wait_s"] / record["step_s"]
    return f"loss {record['loss']:.3f} {record['num_tokens'] / record['step_s']:,.0f} tok/s wait {waiting:.0%}"
