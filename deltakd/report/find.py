"""What lies in the folders that a report is asked for: run directories, evaluations and sweeps.

It looks at names only, and not into what a run keeps for itself (weights, logs, checkpoints).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltakd.base.errors import RunError

RECIPE, RESULTS, SWEEP = "recipe.yaml", "results.json", "sweep.json"
WITHIN = frozenset({"scores", "predictions"})  # of an evaluation
CLOSED = WITHIN | {"checkpoints", "export", "export.part", "tensorboard", "logs", "status", "models", "best", "faulty"}
CLOSED |= {"service", "tokens", "trace", "world", "tokenizer", "wandb"}
CLOSED |= {"rates"}  # trials for a learning rate, of which nothing is shown but the choice
MOST_DEEP = 5


@dataclass(frozen=True)
class Found:
    """Folders of runs, of evaluations and of sweeps, each once, and the folder that their names are relative to."""

    root: Path
    runs: Sequence[Path]
    evaluations: Sequence[Path]
    sweeps: Sequence[Path]

    def name(self, folder: Path) -> str:
        """Return what a folder is called in the report."""
        name = os.path.relpath(folder, self.root)
        return folder.name if name == "." else name


def find(paths: Sequence[str]) -> Found:
    """Find every run and evaluation under `paths`. Raises RunError where a path holds neither, or is not there."""
    runs, evaluations, sweeps = dict[Path, None](), dict[Path, None](), dict[Path, None]()
    for text in paths:
        path = Path(text).resolve()
        if not path.is_dir():
            raise RunError(f"{text}: no such folder. Write a run's directory, or a folder of some, as runs/quickstart.")
        before = len(runs) + len(evaluations)
        known = path in runs or path in evaluations
        for folder in _folders(path):
            if (folder / SWEEP).is_file():
                sweeps[folder] = None
            if (folder / RECIPE).is_file():
                runs[folder] = None
            elif (folder / RESULTS).is_file() or any((folder / name).is_dir() for name in WITHIN):
                evaluations[folder] = None
        if len(runs) + len(evaluations) == before and not known and not _inside(path, [*runs, *evaluations]):
            raise RunError(
                f"{text}: holds no run (a folder with {RECIPE}) and no evaluation (one with {RESULTS}). "
                "Write the directory that a run has made, as runs/quickstart/delta."
            )
    parents = [str(folder.parent) for folder in (*runs, *evaluations) if folder.parent not in runs]
    return Found(Path(os.path.commonpath(parents)), list(runs), list(evaluations), list(sweeps))


def _inside(path: Path, folders: Sequence[Path]) -> bool:
    """Tell whether some folder is `path` or lies under it."""
    return any(folder.is_relative_to(path) for folder in folders)


def _folders(top: Path) -> list[Path]:
    folders = []
    for here, names, _ in os.walk(top):
        folders.append(Path(here))
        deep = len(Path(here).relative_to(top).parts)
        names[:] = sorted(name for name in names if name not in CLOSED and name[0] != ".") if deep < MOST_DEEP else []
    return folders
