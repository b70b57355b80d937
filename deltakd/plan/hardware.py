"""Accelerators and their nodes: numbers from hardware.yaml or a file of the same form, and what --gpus names.

Without --gpus it is what this machine has: the GPUs that nvidia-smi lists, or one process on the CPU.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from deltakd.base.errors import RunError

OURS = Path(__file__).with_name("hardware.yaml")
GIB, GB, TERA = 2**30, 1e9, 1e12
_GPUS = re.compile(r"(?:(\d+)\s*x\s*)?(\S.*)")
_MOST_GPUS = 1024  # of a node, whose splits are all tried
_LARGEST = 1e12  # beyond any number of a data sheet
# As words of nvidia-smi's begin: a GH200 is no H200. The first that fits.
_WORDS = {"H200": "H200", "H100": "H100", "A100.*80": "A100-80", "A100": "A100-40", "L40S": "L40S", "4090": "RTX4090"}
# Times are quotients of the others.
_MAY_BE_ZERO = {"memory_gib", "host_memory_gib", "nvlink_gbs", "context_gib", "reserve", "temporaries"}


@dataclass(frozen=True)
class Hardware:
    """One accelerator, and its node. Memory in GiB, ways in GB/s one way, peaks in TFLOP/s; see hardware.yaml."""

    name: str
    memory_gib: float
    hbm_gbs: float
    bf16_tflops: float
    fp32_tflops: float
    bf16_share: float
    fp32_share: float
    nvlink_gbs: float
    pcie_gbs: float
    network_gbs: float
    host_memory_gib: float
    host_gbs: float
    context_gib: float
    reserve: float
    temporaries: float
    is_cpu: bool = False

    @property
    def usable_bytes(self) -> float:
        """Memory that one process may plan with; on a CPU all processes of the node share it."""
        return self.memory_gib * GIB * (1 - self.reserve)

    def flops(self, dtype: str) -> float:
        """Operations a second that a training reaches."""
        if dtype == "float32":
            return self.fp32_tflops * TERA * self.fp32_share
        return self.bf16_tflops * TERA * self.bf16_share

    def between(self, num_nodes: int, on_node: int) -> float:
        """Bytes a second that one accelerator gets from its peers: of its node, or of all nodes."""
        if num_nodes > 1:
            return self.network_gbs * GB / on_node
        return (self.nvlink_gbs or self.pcie_gbs) * GB


def read_hardware(file: str | None = None) -> dict[str, Hardware]:
    """Return all accelerators by name; those of `file` win. Raises RunError for a file that does not fit."""
    known: dict[str, Any] = yaml.safe_load(OURS.read_text())
    if file is not None:
        try:
            given = yaml.safe_load(Path(file).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RunError(
                f"--hardware: {file} cannot be read ({str(error).splitlines()[0]}). Write a file."
            ) from error
        if not isinstance(given, dict) or not all(isinstance(entry, dict) for entry in given.values()):
            raise RunError(f"--hardware: {file} holds no names with numbers. See deltakd/plan/hardware.yaml.")
        known |= {str(name): entry for name, entry in given.items()}
    return {name: _hardware(name, entry) for name, entry in known.items()}


def _hardware(name: str, entry: Mapping[str, Any]) -> Hardware:
    numbers = {field.name for field in fields(Hardware)} - {"name", "is_cpu"}
    given = {key: value for key, value in entry.items() if key != "sources"}
    wrong = sorted(numbers - set(given)) or sorted(set(given) - numbers - {"is_cpu"})
    if wrong or not all(_is_number(given[key]) for key in numbers) or type(given.get("is_cpu", True)) is not bool:
        what = f"{wrong[0]} is {'missing' if wrong[0] in numbers else 'not known'}" if wrong else "a value is no number"
        raise RunError(f"--hardware: {name}: {what}. Write what deltakd/plan/hardware.yaml has.")
    if zero := sorted(key for key in numbers - _MAY_BE_ZERO if not given[key]):
        raise RunError(f"--hardware: {name}: {zero[0]} is 0, and times are quotients of it. Write an estimate.")
    if large := next((key for key in ("reserve", "bf16_share", "fp32_share") if given[key] > 1), None):
        raise RunError(f"--hardware: {name}: {large} is {given[large]:g}, and a share. Write a number of at most 1.")
    hardware = Hardware(name=name, **given)
    if not hardware.memory_gib:
        import psutil

        memory = psutil.virtual_memory().total / GIB
        hardware = replace(hardware, memory_gib=memory, host_memory_gib=memory)
    return hardware


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LARGEST


def choose_hardware(gpus: str | None, file: str | None) -> tuple[Hardware, int]:
    """Return what `--gpus 8xH100` names and how many of it a node has; None: this machine's."""
    known = read_hardware(file)
    match = _GPUS.fullmatch((gpus or _found()).strip())
    names = {name.lower(): name for name in known}
    if match is None or match[2].lower() not in names or int(match[1] or 1) < 1:
        raise RunError(f"--gpus: {gpus} is not known. Write a number of one of {', '.join(known)}, as 8xH100.")
    if int(match[1] or 1) > _MOST_GPUS:
        raise RunError(f"--gpus: {gpus}: no node has so many. Write a node's, at most {_MOST_GPUS}, and --nodes.")
    hardware = known[names[match[2].lower()]]
    return hardware, int(match[1] or 1)


def _found() -> str:
    """Say in --gpus' words what this machine has."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "1xCPU"
    asked = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "1xCPU"
    lines = [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
    if not lines:
        return "1xCPU"
    for words, name in _WORDS.items():
        if re.search(rf"\b{words}", lines[0]):
            return f"{len(lines)}x{name}"
    raise RunError(f"--gpus: this machine has {lines[0]}, of which nothing is known. Write --gpus and --hardware FILE.")
