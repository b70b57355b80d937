"""Python, the requirements and builds that were killed: from metadata and files, without importing a library."""

import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, distributions, requires
from pathlib import Path

import psutil

import deltakd
from deltakd.doctor.gpus import nvidia_devices
from deltakd.doctor.lines import Asked, Line, error, home, ok, warning

REQUIREMENTS = Path(deltakd.__file__).parents[1] / "requirements.txt"
OLDEST = (3, 11)
SHARED_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "fuse", "afs", "panfs", "pvfs")
ABANDONED_S = 1800.0  # a build on another node takes minutes


def python(asked: Asked) -> list[Line]:
    """Look at the interpreter."""
    said = f"{sys.version.split()[0]} in {sys.prefix}"
    if sys.version_info[:2] < OLDEST:
        return [error("python", said, "Make the environment with Python 3.11 or newer: make install PYTHON=python3.11")]
    return [ok("python", said)]


def requirements(asked: Asked, wanted: Iterable[str] | None = None, path: Sequence[str] | None = None) -> list[Line]:
    """Hold what is installed on `path` against requirements.txt, or outside a checkout the package's own list."""
    from packaging.requirements import Requirement

    lines = _required() if wanted is None else [line.partition("#")[0].strip() for line in wanted]
    installed = _installed(sys.path if path is None else path)
    found: dict[str, object] = {}
    faults: list[Line] = []
    for requirement in (Requirement(line) for line in lines if line):
        version = installed.get(_canonical(requirement.name))
        found[requirement.name] = version
        if version is None:
            todo = "Run `make install`, or pip install -r requirements.txt"
            faults.append(error("requirements", f"{requirement} is not installed", todo))
        elif not requirement.specifier.contains(version, prereleases=True):
            todo = f"Run pip install '{requirement}'; other versions are not tested"
            faults.append(warning("requirements", f"{requirement.name} is {version}, tested is {requirement}", todo))
    fit = ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)
    return [*faults, ok("requirements", f"{len(found) - len(faults)} of {len(found)} as tested: {fit}", **found)]


def _required() -> list[str]:
    if REQUIREMENTS.is_file():
        return [line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines()]
    return [line for line in requires("deltakd") or [] if "extra ==" not in line]


def _installed(path: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in distributions(path=list(path)):
        name = _name(one)
        if name and name not in found:  # the first on the path is the one that is imported
            found[name] = one.version
    return found


def _name(distribution: Distribution) -> str | None:
    """Return a distribution's name by its folder: reading every METADATA file costs half a second."""
    folder = getattr(distribution, "_path", None)
    stem = re.match(r"([^-]+)(-.*)?\.(dist|egg)-info$", folder.name) if isinstance(folder, Path) else None
    name = stem[1] if stem else distribution.metadata["Name"]
    return _canonical(name) if name else None


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def torch_build(asked: Asked) -> list[Line]:
    """Say which torch is installed, and for which CUDA it was built: its version file says so."""
    file = _package_file("torch", "version.py")
    if file is None:
        return [error("torch", "not installed", "Run `make install`")]
    said = dict(re.findall(r"^(__version__|cuda|hip)\b[^=\n]*= *'?([^'\n]+)'?", file.read_text(), re.MULTILINE))
    cuda, version = said.get("cuda", "None"), said.get("__version__", "of unknown version")
    if cuda != "None":
        return [ok("torch", f"{version}, built for CUDA {cuda}", version=version, cuda=cuda)]
    if said.get("hip", "None") != "None":
        return [warning("torch", f"{version}, built for ROCm", "Not tried: expect what is said of CUDA to differ")]
    if nvidia_devices():
        todo = "Install the CUDA build: pip install --force-reinstall torch from the index for your driver"
        return [error("torch", f"{version} computes on the CPU alone, but this machine has an NVIDIA GPU", todo)]
    return [ok("torch", f"{version}, for the CPU", version=version, cuda=None)]


def _package_file(package: str, name: str) -> Path | None:
    files = (Path(folder, package, name) for folder in sys.path)
    return next((file for file in files if file.is_file()), None)


def extension_folder() -> Path:
    """Return where torch puts the ops that it compiles."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return home(given or f"{cache}/torch_extensions")


def deepspeed(asked: Asked) -> list[Line]:
    """Say whether DeepSpeed is there: AdamW is torch's own and the engine switches the CPU's communication op off."""
    if _package_file("deepspeed", "__init__.py") is None:
        return [error("deepspeed", "not installed", "Run `make install`, or write engine: {name: fsdp2}")]
    return [ok("deepspeed", "installed; a run compiles none of its ops")]


def build_locks(asked: Asked) -> list[Line]:
    """Look for locks of builds that were killed: whoever compiles that op next waits for ever. No run does."""
    folder = extension_folder()
    locks = [lock for pattern in ("*/lock", "*/*/lock") for lock in folder.glob(pattern)]
    lines = [_judge(lock) for lock in sorted(locks)]
    return lines or [ok("build locks", f"none in {folder}")]


def _judge(lock: Path) -> Line:
    try:
        facts = lock.stat()
    except OSError:
        return ok("build locks", f"{lock} is gone this moment")
    holder = _holder(facts.st_dev, facts.st_ino)
    if holder is not None:
        return ok("build locks", f"{lock}: process {holder} is building")
    minutes = (time.time() - facts.st_mtime) / 60
    if _is_shared(lock) and 60 * minutes < ABANDONED_S:
        said = f"{lock}: {minutes:.0f} min old; another node builds, or was killed while it did"
        return warning("build locks", said, f"If no node builds: rm {lock}")
    said = f"{lock}: left by a build that was killed {minutes:.0f} min ago; who compiles its op waits for ever"
    return warning("build locks", said, f"Run rm {lock}")


def _holder(device: int, inode: int) -> int | None:
    """Return a process of this machine that has the file open, as a build has its lock from start to end."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            facts = link.stat()
        except OSError:  # another user's, or gone
            continue
        if (facts.st_dev, facts.st_ino) == (device, inode):
            return int(link.parts[2])
    return None


def _is_shared(path: Path) -> bool:
    """Tell whether other nodes see a file too."""
    where = str(path.resolve())
    inside = [one for one in psutil.disk_partitions(all=True) if Path(where).is_relative_to(one.mountpoint)]
    kind = max(inside, key=lambda one: len(one.mountpoint)).fstype if inside else ""
    return kind.lower().startswith(SHARED_FILE_SYSTEMS)
