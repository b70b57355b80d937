"""`deltakd push`: upload a finished run's model, its tokenizer and its card to the hub. Nothing does so by itself."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from deltakd.base.errors import RunError
from deltakd.base.hub import HUB_ID
from deltakd.base.rundir import FINISHED, RunDirectory


def push(directory: str, hub_id: str, private: bool) -> str:
    """Upload a run's export to the hub's `hub_id`; returns where it lies.

    Raises RunError, with nothing uploaded, if the run is not finished, or if the hub does not know us or refuses.
    """
    run = RunDirectory(Path(directory))
    if not (run.path / FINISHED).exists() or not (run.export / "config.json").exists():
        raise RunError(f"{run.path}: no finished run. Write the folder of one, as runs/quickstart/delta.")
    if HUB_ID.fullmatch(hub_id) is None or "/" not in hub_id:
        raise RunError(f"--to: {hub_id} is no id of the hub. Write OWNER/NAME.")
    from huggingface_hub import HfApi, get_token, is_offline_mode

    if is_offline_mode():
        raise RunError("push: HF_HUB_OFFLINE is set, and nothing is sent to a hub that is not to be asked. Unset it.")
    if get_token() is None:
        raise RunError("push: no token of the hub is here. Set HF_TOKEN to one that may write, or run `hf auth login`.")
    hub = HfApi()
    _try("who you are", lambda: hub.whoami())
    _try(f"making {hub_id}", lambda: hub.create_repo(hub_id, private=private, exist_ok=True))
    if private and _try(f"looking at {hub_id}", lambda: not hub.model_info(hub_id).private):  # one of before stays so
        raise RunError(f"--to: {hub_id} is on the hub already, and public. Write --public, or another name.")
    said = f"{run.path.name}, by deltakd"
    send = partial(hub.upload_folder, repo_id=hub_id, folder_path=run.export, commit_message=said)
    where = _try(f"uploading {run.export}", send)
    return f"{run.export}: lies in {hub_id} ({where})"


def _try(what: str, ask: Callable[[], object]) -> object:
    try:
        return ask()
    except Exception as failure:  # the network library's errors belong to no hierarchy that the hub promises
        said = (str(failure).splitlines() or [type(failure).__name__])[0][:160]
        raise RunError(
            f"push: the hub failed at {what} ({said}). Set HF_TOKEN to a token that may write, or run `hf auth login`."
        ) from failure
