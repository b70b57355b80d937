"""Weights to models: a local folder or a hub id becomes a causal language model, or only its head.

transformers does the loading; this file adds the checks that turn its traces into one sentence, and reads a frozen head
alone, without the rest of its model. Weights come from safetensors only.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from deltakd.base.errors import ModelError
from deltakd.base.hub import could_be_hub_id, refuse_unreachable
from deltakd.base.ranks import says_gone
from deltakd.models.attention import DOCUMENTS, register_documents
from deltakd.models.settings import ModelsSettings, WeightsSettings

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


# What configs call that which is done to logits behind the head: capped, or scaled.
BEHIND_THE_HEAD = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


@dataclass(frozen=True)
class ModelFacts:
    """What can be known of a model without loading it."""

    weights: str
    identity: str  # hash that tells these weights from others
    hidden_size: int
    head_rows: int


@contextmanager
def _one_sentence(where: str, weights: str) -> Iterator[None]:
    """Turn what the hub and transformers raise for a missing or broken model into one sentence."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        if says_gone(error):  # weights that are shared out while they are read
            raise
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ModelError(
            f"{where}: {weights} cannot be loaded ({type(error).__name__}: {reason[:200]}). "
            "Write a folder with config.json and *.safetensors, or a hub id while the hub can be reached."
        ) from error


def resolve(where: str, settings: WeightsSettings) -> Path:
    """Return the local folder of a model, fetching it from the hub if it is a hub id."""
    path = Path(settings.weights).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() or not list(path.glob("*.safetensors")):
            raise ModelError(f"{where}: {path} holds no config.json with *.safetensors. Write the folder of a model.")
        return path
    from huggingface_hub import snapshot_download

    if not could_be_hub_id(settings.weights):
        raise ModelError(f"{where}: {settings.weights} does not exist. Write the folder of a model or a hub id.")
    refuse_unreachable("model", settings.weights, settings.revision, lambda text: ModelError(f"{where}: {text}"))
    with _one_sentence(where, settings.weights):
        return Path(
            snapshot_download(
                settings.weights,
                revision=settings.revision,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
                ignore_patterns=["consolidated*", "original/*"],  # a second copy of the weights, for other programs
            )
        )


def load_model(
    where: str, folder: Path, settings: ModelsSettings, in_8bit: bool = False, num_shards: int = 1
) -> nn.Module:
    """Load a causal language model in the run's dtype, in evaluation mode, on the CPU.

    `in_8bit` rounds every linear weight but the head's to 8 bit with one scale for each row; what flows through the
    model stays in the run's dtype, so no document's numbers depend on its neighbours in a batch. With `num_shards`
    this process loads its part of a model that all processes of the torch.distributed group hold together, on its
    accelerator; the head is whole on each.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    attention, _ = choose_attention(settings)
    implementation = register_documents() if attention == "sdpa" else attention
    logging.disable_progress_bar()  # it counts tensors, not what a person waits for
    with _one_sentence(where, str(folder)):
        special = {"quantization_config": _rounding()} if in_8bit else {}
        special |= {"distributed_config": _split(folder, settings, num_shards)} if num_shards > 1 else {}
        model: nn.Module
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=getattr(torch, settings.dtype),
            attn_implementation=implementation,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
            **special,
        )
    _refuse_more_than_a_product(where, folder, model)
    if implementation == DOCUMENTS:
        _refuse_unfit_for_sdpa(where, folder, model)
    # transformers fills what is missing with random numbers and goes on.
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{where}: {folder} lacks {len(missing)} tensors of its model ({missing[0]}). Fetch or export it again."
        )
    return model.eval()


def choose_attention(settings: ModelsSettings) -> tuple[str, str]:
    """Return which attention models use on this machine, and why."""
    if settings.attention != "auto":
        return settings.attention, "as the recipe says"
    if not torch.cuda.is_available():
        return "sdpa", "flash_attention_2 needs a GPU"
    if find_spec("flash_attn") is None:
        return "sdpa", "flash_attn is not installed"
    if torch.cuda.get_device_capability() < (8, 0):
        return "sdpa", f"flash_attention_2 does not run on {torch.cuda.get_device_name()}"
    if settings.dtype == "float32":
        return "sdpa", "flash_attention_2 computes in 16 bit alone"
    return "flash_attention_2", "installed, and the device fits"


def _refuse_more_than_a_product(where: str, folder: Path, model: Any) -> None:
    """Raise ModelError for a model whose logits are more than its head's weight times its hidden states."""
    config, head = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    found = {name: getattr(config, name, None) for name in BEHIND_THE_HEAD}
    found |= {"a bias of the head": None if getattr(head, "bias", None) is None else "yes"}
    for name, value in found.items():
        if value not in (None, False, 1.0):
            raise ModelError(
                f"{where}: {folder} is a {config.model_type} whose logits are not its head's product alone "
                f"({name}: {value}), which neither loss nor payloads compute. Write a model without."
            )


def _refuse_unfit_for_sdpa(where: str, folder: Path, model: Any) -> None:
    """Raise ModelError for a model whose attention is more than softmax over earlier tokens."""
    config = model.config.get_text_config(decoder=True)
    reasons = {
        "its attention is its own": not (model._supports_sdpa and model._supports_attention_backend),
        "it attends in chunks": getattr(config, "attention_chunk_size", None),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ModelError(
                f"{where}: {folder} is a {config.model_type}, which sdpa does not compute ({reason}). "
                "Write models.attention: eager."
            )


def _rounding() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def _split(folder: Path, settings: ModelsSettings, num_shards: int) -> Any:
    from transformers import AutoConfig
    from transformers.distributed import DistributedConfig

    # Payloads read the head's weight. Without a forward of its own nothing would gather it, so it is not cut; nor is an
    # embedding that it is tied to.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    whole = [HEAD, *([EMBEDDING] if config.tie_word_embeddings else [])]
    return DistributedConfig(tp_size=num_shards, tp_plan={name.removesuffix(".weight"): "replicate" for name in whole})


def refuse_unsplittable(where: str, folder: Path, num_shards: int, trust_remote_code: bool) -> None:
    """Raise ModelError if transformers cannot split a model over so many processes; reads its config alone."""
    from transformers import AutoConfig

    with _one_sentence(where, str(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config(decoder=True)
    if not config.base_model_tp_plan:
        raise ModelError(
            f"{where}: {folder} is a {config.model_type}, and transformers has no plan to split one over processes. "
            "Write teachers.tensor_parallel: 1."
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    most = gcd(heads, kv_heads)
    if most % num_shards:
        fitting = ", ".join(str(number) for number in range(1, most + 1) if most % number == 0)
        raise ModelError(
            f"{where}: the {heads} attention heads and {kv_heads} key-value heads of {folder} do not split over "
            f"{num_shards} processes. Write one of {fitting} as teachers.tensor_parallel."
        )


def facts(where: str, folder: Path, in_8bit: bool = False) -> ModelFacts:
    """Read a model's facts from its config and the headers of its weights; costs milliseconds at any size."""
    from safetensors import safe_open

    with _one_sentence(where, str(folder)):
        config = json.loads((folder / "config.json").read_text())
        config = config.get("text_config", config)
        file, name = _find_head(where, folder)
        with safe_open(file, framework="pt") as weights:
            head_rows = weights.get_slice(name).get_shape()[0]
        return ModelFacts(str(folder), identity(folder, in_8bit), int(config["hidden_size"]), int(head_rows))


def load_head(where: str, folder: Path, dtype: torch.dtype, vocab_size: int) -> Tensor:
    """Load the first `vocab_size` rows of a model's head [V, H] and nothing else of it."""
    from safetensors import safe_open

    with _one_sentence(where, str(folder)):
        file, name = _find_head(where, folder)
        with safe_open(file, framework="pt") as weights:
            head: Tensor = weights.get_slice(name)[:vocab_size]
    if not torch.isfinite(head).all():
        raise ModelError(f"{where}: the head of {folder} holds numbers that are not finite. Fetch or export it again.")
    return head.to(dtype).contiguous()


def _find_head(where: str, folder: Path) -> tuple[Path, str]:
    """Return the file and tensor name of the head; a model with tied embeddings keeps it under the embedding's name."""
    from safetensors import safe_open

    names: dict[str, Path] = {}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    else:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as weights:
                names |= dict.fromkeys(weights.keys(), file)
    for name in (HEAD, EMBEDDING):
        if name in names:
            return names[name], name
    raise ModelError(f"{where}: {folder} has neither {HEAD} nor {EMBEDDING}. Write a causal language model's folder.")


def identity(folder: Path, in_8bit: bool = False) -> str:
    """Hash a model's weights by sizes, headers and 64 samples of each file: any training changes all of them.

    Weights that are rounded as they are loaded are others, and say so.
    """
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as weights:
            for sample in range(64):
                weights.seek(size * sample // 64)
                digest.update(weights.read(65536))
    return digest.hexdigest() + (" in 8 bit" if in_8bit else "")
