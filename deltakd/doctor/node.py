"""The node: shared memory, limits, ports, disks and threads."""

import os
import resource
import shutil
import socket
from pathlib import Path

import psutil

from deltakd.base.scratch import leftovers
from deltakd.doctor.gpus import nvidia_devices
from deltakd.doctor.lines import Asked, Line, error, home, hub_folder, ok, size, warning

NO_SLOTS = 64 * 2**20  # what a container gets by default: not a payload of an ordinary run
FEW_SLOTS = 4 * 2**30  # Qwen2.5 7B -> 1.5B: 48 slots of 56 MiB on a node with four students
FILES, FEW_FILES = 256, 4096
PROCESSES, FEW_PROCESSES = 256, 4096
FIRST_PORT, LAST_PORT = 49152, 65535  # ZeroMQ binds students' ports at random among these
PORT_STEP = 512
DISK_FULL = 2**30
DISK_SMALL = {True: 200 * 2**30, False: 5 * 2**30}  # with a GPU: two checkpoints of a 7B teacher, and weights


def shared_memory(asked: Asked) -> list[Line]:
    """Look whether slots for payloads fit, and what dead runs have left there."""
    folder = asked.shared_memory
    try:
        room = os.statvfs(folder)
    except OSError as fault:
        return [error("shared memory", f"{folder} cannot be read ({fault.strerror})", "Mount a tmpfs there")]
    whole, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    said, facts = f"{folder}: {size(free)} free of {size(whole)}", {"free": free, "size": whole}
    more = "Free some, mount it larger, or start the container with --shm-size=64g"
    if not os.access(folder, os.W_OK):
        lines = [error("shared memory", f"{folder} cannot be written to", "Make it a tmpfs of mode 1777", **facts)]
    elif free < NO_SLOTS:
        lines = [error("shared memory", f"{said}: teachers' payloads do not fit", more, **facts)]
    elif free < FEW_SLOTS and nvidia_devices():
        lines = [warning("shared memory", f"{said}: models of some billions fill {size(FEW_SLOTS)}", more, **facts)]
    else:
        lines = [ok("shared memory", said, **facts)]
    if left := leftovers(folder):
        taken = sum(file.stat().st_size for one in left for file in one.glob("*") if file.is_file())
        todo = "Run python -m deltakd tidy"
        lines.append(warning("shared memory", f"{size(taken)} in {len(left)} folders of dead runs ({left[0]})", todo))
    return lines


def limits(asked: Asked) -> list[Line]:
    """Look at what the shell allows a process."""
    lines = [
        _count("open files", resource.RLIMIT_NOFILE, FILES, FEW_FILES, "-n"),
        _count("processes", resource.RLIMIT_NPROC, PROCESSES, FEW_PROCESSES, "-u"),
    ]
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    amount = "unlimited" if soft == resource.RLIM_INFINITY else size(soft)
    if amount != "unlimited" and list(Path("/sys/class/infiniband").glob("*")):
        said, todo = f"{amount}, but InfiniBand pins its buffers", "Set ulimit -l unlimited before a launch"
        return [*lines, warning("locked memory", said, todo)]
    return [*lines, ok("locked memory", amount)]


def _count(subject: str, limit: int, fewest: int, few: int, letter: str) -> Line:
    soft, hard = resource.getrlimit(limit)
    if soft == resource.RLIM_INFINITY:
        return ok(subject, "unlimited")
    said = f"at most {soft:,} (ulimit {letter})"
    highest = few if hard == resource.RLIM_INFINITY else min(few, hard)
    todo = f"Run ulimit {letter} {highest} before a launch" if highest > soft else "Ask for a higher hard limit"
    if soft < fewest:
        return error(subject, f"{said}: ranks, sockets and loaders need more", todo)
    return warning(subject, said, todo) if soft < few else ok(subject, said)


def ports(asked: Asked) -> list[Line]:
    """Try the port where students meet, and a sample of those where they listen."""
    tried = range(FIRST_PORT, LAST_PORT + 1, PORT_STEP)
    taken = sum(_fault_of("127.0.0.1", port) is not None for port in tried)
    said = f"{len(tried) - taken} of {len(tried)} tried between {FIRST_PORT} and {LAST_PORT} are free on loopback"
    if taken == len(tried):
        return [_meeting(asked), error("ports", said, "Look at ip addr show lo, and at what the sandbox forbids")]
    if taken > len(tried) // 2:
        return [_meeting(asked), warning("ports", said, "Look at ss -tln for what takes them")]
    return [_meeting(asked), ok("ports", said)]


def _meeting(asked: Asked) -> Line:
    port, chosen = asked.meeting_port
    if not isinstance(port, int) or not 0 < port < 2**16:
        return error(
            "ports", f"{port}, where students would meet, is no port", "Write 1024 to 65535 as MASTER_PORT or --port"
        )
    fault = _fault_of("", port)
    if fault is None:
        return ok("ports", f"{port}, where students meet, is free")
    who = _listener(port) or fault
    said, todo = f"{port}, where students would meet, is taken: {who}", f"Launch with --master_port {port + 1}"
    return error("ports", said, todo) if chosen else warning("ports", said, todo)


def _fault_of(host: str, port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as fault:
            return str(fault.strerror)
    return None


def _listener(port: int) -> str | None:
    """Name the process that listens on a port, if this user may know it."""
    try:
        sockets = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    pids = [one.pid for one in sockets if one.laddr and one.laddr.port == port and one.pid]
    try:
        return f"process {pids[0]} ({psutil.Process(pids[0]).name()}) listens there" if pids else None
    except psutil.Error:
        return None


def disks(asked: Asked) -> list[Line]:
    """Look for room where runs and caches are written."""
    folders = {
        "runs": asked.runs,
        "hub cache": home(os.environ.get("HF_HUB_CACHE") or hub_folder() / "hub"),
        "rows' cache": home(os.environ.get("HF_DATASETS_CACHE") or hub_folder() / "datasets"),
    }
    return [_disk(name, folder) for name, folder in folders.items()]


def _disk(name: str, folder: Path) -> Line:
    try:
        there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    except OSError as fault:  # of a folder of somebody else's not even this can be asked, nor of too long a name
        return error("disk", f"{name}: {folder} cannot be looked at ({fault.strerror})", "Write a folder of your own")
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return error("disk", f"{name}: {folder} cannot be written to", f"Make {there} a folder that you may write to")
    free = shutil.disk_usage(there).free
    said = f"{name}: {size(free)} free in {folder}"
    if free < DISK_FULL:
        return error("disk", said, "Free some, or write root=FOLDER on another disk; HF_HOME moves the caches")
    if free < DISK_SMALL[bool(nvidia_devices())]:
        return warning("disk", said, f"Expect to need {size(DISK_SMALL[bool(nvidia_devices())])}")
    return ok("disk", said, free=free)


def threads(asked: Asked) -> list[Line]:
    """Hold OMP_NUM_THREADS against the cores that this process may use."""
    cores, given = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    first = (given or "1").partition(",")[0]
    if not first.isdecimal() or int(first) < 1:
        return [error("threads", f"OMP_NUM_THREADS is {given!r}, no number of threads", "Write 1 or more, or unset it")]
    if given is None:
        return [ok("threads", f"OMP_NUM_THREADS is unset: one a process, on {cores} cores", cores=cores)]
    if int(first) > cores:
        said = f"OMP_NUM_THREADS is {first} on {cores} cores"
        return [warning("threads", said, f"Write {cores} or less: every process of a node takes so many", cores=cores)]
    return [ok("threads", f"OMP_NUM_THREADS is {first} on {cores} cores, in every process of a node", cores=cores)]
