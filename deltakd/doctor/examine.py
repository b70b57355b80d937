"""All that the doctor looks at, each beside the others, since some ask programs or the network and wait.

Imports neither torch nor transformers. A machine without a GPU is answered for within two seconds, or three where the
network swallows what is sent; a probe that takes longer than its time is a line of its own.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from deltakd.base.errors import RunError
from deltakd.base.files import write_json
from deltakd.doctor import around, gpus, node, software
from deltakd.doctor.lines import ORDER, Asked, Line, error, warning

Probe = Callable[[Asked], list[Line]]
WAIT_S = 4.0
PATIENT: dict[Probe, float] = {gpus.driver: 2 * gpus.SMI_S, gpus.wiring: 2 * gpus.SMI_S, gpus.trial: gpus.TRY_S + 5}
PROBES: tuple[tuple[str, Probe], ...] = (
    ("python", software.python),
    ("requirements", software.requirements),
    ("torch", software.torch_build),
    ("gpu", gpus.driver),
    ("cuda", gpus.trial),
    ("wiring", gpus.wiring),
    ("deepspeed", software.deepspeed),
    ("build locks", software.build_locks),
    ("shared memory", node.shared_memory),
    ("limits", node.limits),
    ("ports", node.ports),
    ("disk", node.disks),
    ("threads", node.threads),
    ("hub", around.hub),
    ("slurm", around.slurm),
)


def examine(asked: Asked) -> list[Line]:
    """Look at everything; the lines come in the order of PROBES."""
    found: dict[str, list[Line]] = {}

    def look(name: str, probe: Probe) -> None:
        try:
            found[name] = probe(asked)
        except Exception as fault:  # one probe's bug must not hide what the others found
            todo = "Report it, with this line"
            found[name] = [error(name, f"cannot be looked at ({type(fault).__name__}: {fault})", todo)]

    begin = time.monotonic()
    waiting = []
    for name, probe in PROBES:
        thread = threading.Thread(target=look, args=(name, probe), daemon=True)  # one that hangs ends with the process
        thread.start()
        waiting.append((name, thread, begin + PATIENT.get(probe, WAIT_S)))
    for name, thread, until in waiting:
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            said = f"no answer within {until - begin:.0f} s"
            found.setdefault(name, [warning(name, said, "Look at what a disk or a driver waits for")])
    return [line for name, _ in PROBES for line in found[name]]


def doctor(asked: Asked, report: Path | None) -> None:
    """Print a line for everything, and write it to `report` if given. Raises RunError where there is an error."""
    lines = examine(asked)
    for line in lines:
        print(line)
    worst = max((line.status for line in lines), key=ORDER.index)
    counts = {status: sum(line.status == status for line in lines) for status in ORDER}
    if report is not None:
        said = {"status": worst, "counts": counts, "lines": [asdict(line) for line in lines]}
        try:
            write_json(report, said, lasting=False)
        except OSError as fault:
            raise RunError(f"--json: {report} cannot be written ({fault.strerror}). Write a path.") from fault
    if counts["error"]:
        raise RunError(f"doctor: {counts['error']} of {len(lines)} lines are errors. Do what they say, then ask again.")
    print(f"No errors, {counts['warning']} warnings.")
