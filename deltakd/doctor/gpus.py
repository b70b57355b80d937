"""GPUs: the driver and how they are wired, by nvidia-smi; CUDA, NCCL and pinned memory, by a process that tries them.

That process imports torch, which takes seconds, so none is started on a machine without a GPU.
"""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from deltakd.doctor.lines import Asked, Line, error, ok, warning

SMI_S = 20.0  # a driver that must wake its GPUs takes seconds
TRY_S = 90.0
QUERY = "name,memory.total,memory.used,driver_version,compute_mode"
BUSY = 0.1  # of a GPU's memory


def nvidia_devices() -> list[Path]:
    """Return the NVIDIA devices that the kernel shows."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


def driver(asked: Asked) -> list[Line]:
    """Ask the driver which GPUs there are."""
    devices = nvidia_devices()
    if not devices:
        return [ok("gpu", "no NVIDIA GPU here: all runs on the CPU, with gloo in place of NCCL")]
    said = _ask("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
    if isinstance(said, Line):
        return [said]
    rows = [[part.strip() for part in row.split(",")] for row in said.splitlines() if row.count(",") == 4]
    if not rows:
        return [error("gpu", f"{devices[0]} is there, but nvidia-smi lists no GPU", "Ask whoever runs this machine")]
    names = sorted({f"{row[0]}, {row[1]} MiB" for row in rows})
    lines = [ok("gpu", f"{len(rows)} x {' and '.join(names)}; driver {rows[0][3]}", driver=rows[0][3], count=len(rows))]
    for index, (_, total, used, _, mode) in enumerate(rows):
        if mode == "Exclusive_Process":
            todo = f"Run nvidia-smi -i {index} -c DEFAULT, or give teachers a GPU of their own"
            lines.append(
                warning("gpu", f"GPU {index} takes one process: a student and its teacher cannot share it", todo)
            )
        if total.isdecimal() and used.isdecimal() and int(used) > BUSY * int(total):
            todo = "Look at nvidia-smi for whose they are"
            lines.append(warning("gpu", f"GPU {index}: {used} of {total} MiB are taken by others", todo))
    return lines


def wiring(asked: Asked) -> list[Line]:
    """Say how the GPUs of this node reach each other."""
    if len(nvidia_devices()) < 2:
        return []
    links, peers = _ask("nvidia-smi", "topo", "-m"), _ask("nvidia-smi", "topo", "-p2p", "r")
    if isinstance(links, Line) or isinstance(peers, Line):
        return [warning("wiring", "nvidia-smi topo does not answer", "Expect nothing of the speed between GPUs")]
    kinds = sorted(set(matrix(links).values()))
    apart = sorted(pair for pair, kind in matrix(peers).items() if kind != "OK")
    name = "NVLink" if all(kind.startswith("NV") for kind in kinds) else "PCIe for some"
    lines = [ok("wiring", f"{name}: {', '.join(kinds)}")]
    if apart:
        todo = "Expect slow gathers under ZeRO-3; in a container check its device settings, on a virtual machine ACS"
        lines.append(warning("wiring", f"GPU {apart[0][0]} cannot read GPU {apart[0][1]}'s memory", todo))
    return lines


def matrix(said: str) -> dict[tuple[int, int], str]:
    """Read one of nvidia-smi's matrices: how GPU i reaches GPU j, for i below j."""
    words = [re.sub(r"\x1b\[[0-9;]*m", "", row).split() for row in said.splitlines()]
    is_gpu = re.compile(r"GPU\d+").fullmatch
    rows = [row for row in words if len(row) > 1 and is_gpu(row[0]) and not is_gpu(row[1])]  # without the header
    return {(i, j): row[1 + j] for i, row in enumerate(rows) for j in range(i + 1, len(rows)) if len(row) > 1 + j}


def trial(asked: Asked) -> list[Line]:
    """Have a process compute on a GPU, pin memory and import flash-attn, and tell what came of it."""
    if not nvidia_devices():
        return [ok("flash-attn", "not needed without a GPU: torch's sdpa attends")]
    said = _ask(sys.executable, "-m", "deltakd.doctor.trial", seconds=TRY_S)
    if isinstance(said, Line):
        return [error("cuda", f"torch cannot be tried: {said.text}", "Run python -c 'import torch; torch.cuda.init()'")]
    found = json.loads(said.splitlines()[-1])
    if "fault" in found:
        todo = "Install the torch build that your driver carries, or ask for a newer driver"
        return [error("cuda", f"torch {found.get('torch')} cannot compute on the GPU ({found['fault']})", todo)]
    lines = [
        ok("cuda", f"torch computes on {found['devices']} GPUs, {found['capability']}; CUDA {found['cuda']}", **found)
    ]
    lines.append(ok("nccl", found["nccl"]) if found["nccl"] else error("nccl", "torch has none", "Reinstall torch"))
    if "pin_fault" in found:
        todo = "Raise `ulimit -l`, or the container's --ulimit memlock=-1"
        lines.append(warning("pinned memory", f"64 MiB cannot be pinned ({found['pin_fault']})", todo))
    else:
        lines.append(ok("pinned memory", "64 MiB pinned"))
    return [*lines, _flash(found)]


def _flash(found: dict[str, str]) -> Line:
    if find_spec("flash_attn") is None:
        todo = "Run pip install --no-build-isolation -r requirements-gpu.txt"
        return warning("flash-attn", "not installed: torch's sdpa attends, which pads less well", todo)
    if "flash_fault" in found:
        todo = "Build it anew against this torch: pip install --no-build-isolation --force-reinstall flash-attn"
        return error("flash-attn", f"installed, but cannot be imported ({found['flash_fault']})", todo)
    return ok("flash-attn", found["flash"])


def _ask(*command: str, seconds: float = SMI_S) -> str | Line:
    """Return what a program prints, or a line of what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except FileNotFoundError:
        return error(
            "gpu", f"{command[0]} is not installed, though there are NVIDIA devices", "Install the driver's tools"
        )
    except subprocess.TimeoutExpired:
        return error("gpu", f"{command[0]} gave no answer within {seconds:.0f} s", "Look at dmesg for Xid lines")
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        return error("gpu", f"{command[0]} failed ({words[-1][:120]})", "Load the driver, or restart the machine")
    return done.stdout
