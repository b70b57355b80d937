"""Which code ran on which machine, and when: what every record carries."""

import os
import platform
import socket
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "transformers", "deepspeed", "datasets", "pyzmq", "numpy")


def timestamp() -> str:
    """Return the time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def machine_facts() -> dict[str, Any]:
    """Say which code ran on which machine: commit, versions, processor, memory."""
    import psutil

    return {
        "started": timestamp(),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "host": socket.gethostname(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
    }


def commit() -> str:
    """Return the commit of the code at work, with `+` if files differ from it; `unknown` outside a checkout."""
    folder = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
