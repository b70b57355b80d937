"""A trace of some steps, by torch's profiler: which operation took how long, on the processor and the accelerator."""

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from deltakd.train.settings import ProfileSettings

FOLDER = "trace"


class Trace:
    """Records a window of steps; told when one begins and when one has been taken."""

    def __init__(self, directory: Path, window: ProfileSettings) -> None:
        self._first, self._last = window.first_step, window.last_step
        self._path = directory / FOLDER / f"steps-{self._first}-{self._last}.json.gz"
        self._profile: Any = None

    def begins(self, step: int) -> None:
        """Start recording before the first step of the window, or before the first one that this process takes."""
        if self._profile is None and self._first <= step <= self._last:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True, profile_memory=True)
            self._profile.start()

    def ended(self, step: int | None) -> Path | None:
        """Write the trace after the last step of the window, or of the run (None); returns where."""
        if self._profile is None or (step is not None and step < self._last):
            return None
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
        return self._path
