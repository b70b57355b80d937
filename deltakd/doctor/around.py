"""What lies around the machine: the hub and Slurm."""

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request

from deltakd.doctor.lines import Asked, Line, error, home, hub_folder, ok, warning

REACH_S = 3.0
SLURM = ("sbatch", "srun", "squeue", "scontrol")
ANSWER_S = 5.0
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def hub(asked: Asked) -> list[Line]:
    """Ask the hub who we are to it, or whether it is there at all; a token is sent to the hub alone and never shown."""
    offline = [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    if OFFLINE[0] in offline or OFFLINE[1] in offline:
        return [ok("hub", f"{offline[0]} is set: nothing is asked, caches and local folders alone are read")]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token, source = _token()
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        return [error("hub", f"the token of {source} is more than one word", "Write the token alone")]
    url = f"{endpoint}/api/whoami-v2" if token else endpoint
    try:
        request = urllib.request.Request(url)
        if token:  # not sent on, should the hub redirect to somewhere else
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=REACH_S) as answer:
            name = json.loads(answer.read()).get("name") if token else None
    except urllib.error.HTTPError as refusal:
        if token and refusal.code in (401, 403):
            todo = f"Write a new one from {endpoint}/settings/tokens"
            return [error("hub", f"{endpoint} refuses the token of {source} (HTTP {refusal.code})", todo)]
        return [warning("hub", f"{endpoint} answers HTTP {refusal.code}", "Try again later")]
    except (TimeoutError, OSError, ValueError) as fault:
        reason = getattr(fault, "reason", fault)
        todo = "Write local paths; or fill HF_HOME where there is a network and set HF_HUB_OFFLINE=1"
        return [warning("hub", f"{endpoint} cannot be reached ({reason})", todo)]
    if name:
        return [ok("hub", f"{endpoint} knows the token of {source} as {name}")]
    todo = "For gated models set HF_TOKEN, or run hf auth login"
    return [warning("hub", f"{endpoint} is there, but there is no token", todo) if not token else ok("hub", endpoint)]


def _token() -> tuple[str | None, str]:
    """Return the token that the hub's own library would send, and where it comes from."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return os.environ[name].strip(), name
    file = home(os.environ.get("HF_TOKEN_PATH") or hub_folder() / "token")
    try:
        return file.read_text().strip() or None, str(file)
    except (OSError, UnicodeDecodeError):
        return None, ""


def slurm(asked: Asked) -> list[Line]:
    """Say whether jobs can be submitted from here, and what this one has."""
    missing = [name for name in SLURM if shutil.which(name) is None]
    job = os.environ.get("SLURM_JOB_ID")
    if len(missing) == len(SLURM):
        if job:
            todo = "Mount Slurm's commands into the container: jobs queue themselves again with them"
            return [warning("slurm", f"inside job {job}, but without its commands", todo)]
        return [ok("slurm", "not here: runs of this machine alone")]
    if missing:
        return [warning("slurm", f"{', '.join(missing)} missing", "Complete PATH: slurm/submit.sh needs all of them")]
    try:
        said = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=ANSWER_S)
        version = said.stdout.strip() or said.stderr.strip().splitlines()[-1]
    except (OSError, IndexError, subprocess.TimeoutExpired) as fault:
        return [warning("slurm", f"sbatch --version fails ({type(fault).__name__})", "Ask whoever runs the cluster")]
    if said.returncode:
        why, todo = f"sbatch --version fails ({version[:120]})", "Look at SLURM_CONF"
        # Outside a job that is no fault of this machine: Slurm may lie here and nobody run a cluster with it.
        return [error("slurm", why, todo) if job else warning("slurm", why, todo)]
    if job is None:
        return [ok("slurm", f"{version}; outside any job", version=version)]
    keys = ("JOB_NODELIST", "NTASKS", "CPUS_PER_TASK", "JOB_PARTITION")
    given = [f"{key.lower()} {os.environ[f'SLURM_{key}']}" for key in keys if f"SLURM_{key}" in os.environ]
    return [ok("slurm", f"{version}; inside job {job}: {', '.join(given)}", version=version, job=job)]
