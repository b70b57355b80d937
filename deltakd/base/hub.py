"""Ask the hub once, briefly, before a library asks it many times: without a network the answer comes in seconds.

`datasets` and `transformers` retry for half a minute each. One request of ten seconds at most tells whether it is worth
it. With HF_HUB_OFFLINE=1 nothing is asked and the libraries use what is in their caches.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from deltakd.base.errors import DeltaKDError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FILE_SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
ASK_S = 10.0


def could_be_hub_id(path: str) -> bool:
    """Tell whether a path that does not exist here can name something on the hub."""
    return HUB_ID.fullmatch(path) is not None and not path.endswith(FILE_SUFFIXES) and not Path(path).exists()


def refuse_unreachable(
    kind: Literal["dataset", "model"], hub_id: str, revision: str | None, error: Callable[[str], DeltaKDError]
) -> None:
    """Raise `error` with one sentence unless the hub answers that it has `hub_id` for us, or is not to be asked."""
    from huggingface_hub import HfApi, constants, is_offline_mode
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    if is_offline_mode():
        return
    try:
        ask: Callable[..., Any] = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
        if getattr(ask(hub_id, revision=revision, timeout=ASK_S), "gated", None):  # it tells of those to everyone
            HfApi().auth_check(hub_id, repo_type=kind)
    except GatedRepoError as refusal:
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{hub_id}"
        raise error(
            f"{hub_id}: gated, and the hub does not give it to us. Accept its licence at {page}, then set HF_TOKEN to "
            "a token of that account, or run `hf auth login`."
        ) from refusal
    except HfHubHTTPError as refusal:
        status = refusal.response.status_code
        at = f" at revision {revision}" if revision else ""
        raise error(
            f"{hub_id}: neither a local path nor a {kind} that the hub gives out{at} (HTTP {status}). "
            "Write an existing path or id; private and gated ones need `hf auth login`."
        ) from refusal
    except Exception as failure:  # the network library's errors belong to no hierarchy that the hub promises
        raise error(
            f"{hub_id}: not a local path, and the hub cannot be reached ({_brief(failure)}). "
            "Write a local path, or set HF_HUB_OFFLINE=1 if it is in your hub cache."
        ) from failure


def _brief(failure: Exception) -> str:
    return (str(failure).splitlines() or [type(failure).__name__])[0][:100]
