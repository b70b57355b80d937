"""What a model is made of, from its config.json or from models.yaml: sizes, and how many parameters follow from them.

Knows decoders of one form: attention with grouped heads, a gated feed-forward part, RMS norms. Others are refused, and
so are mixtures of experts: their arithmetic would be wrong in silence.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from deltakd.base.errors import ModelError

NORMS = {
    "qwen2": 2,
    "qwen3": 2,
    "llama": 2,
    "mistral": 2,
    "gemma": 2,
    "gemma2": 4,
}  # of each layer; and the known types
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
TUNED = ("-Instruct", "-it", "-Chat")


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder. q and kv are the widths of queries and of keys, over all heads."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    head_rows: int
    is_tied: bool
    max_positions: int
    kind: str = "qwen2"  # its model_type
    window: int | None = None  # of attention; None: all that came before
    norms_per_layer: int = 2
    norms_in_float32: bool = False  # throughout, and with 1 + weight
    norms_heads: bool = False  # queries and keys have a norm of their own (qwen3)
    has_bias: bool = False  # of queries, keys and values

    @property
    def q(self) -> int:
        """Width of all queries."""
        return self.num_heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all keys, or of all values."""
        return self.num_kv_heads * self.head_dim

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The matrices of a layer by name, as (inputs, outputs)."""
        h, q, kv, i = self.hidden_size, self.q, self.kv, self.intermediate_size
        attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
        return attention | {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, norms and biases included."""
        extra = self.norms_per_layer * self.hidden_size
        extra += 2 * self.head_dim if self.norms_heads else 0
        extra += self.q + 2 * self.kv if self.has_bias else 0
        return self.layer_matrices + extra

    @property
    def layer_matrices(self) -> int:
        """Parameters of the matrices of one layer: what arithmetic goes with."""
        return sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def backbone_matrices(self) -> int:
        """Parameters of all layers' matrices."""
        return self.num_layers * self.layer_matrices

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, and as many of the head."""
        return self.head_rows * self.hidden_size

    @property
    def outer_parameters(self) -> int:
        """Parameters outside of the layers: embedding, head and last norm."""
        return self.embedding_parameters * (1 if self.is_tied else 2) + self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All of them; tied ones count once."""
        return self.num_layers * self.layer_parameters + self.outer_parameters


def read_architecture(where: str, weights: str) -> Architecture | None:
    """Return a model's sizes from its folder or, of a hub id, from models.yaml; None if neither has it.

    Raises ModelError if what is there is no decoder of a known form.
    """
    path = Path(weights).expanduser() / "config.json"
    if path.is_file():
        try:
            return from_config(where, weights, json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise ModelError(f"{where}: {path} cannot be read ({error}). Fetch or export the model again.") from error
    known = known_models()
    base = weights
    for ending in TUNED:
        base = base.removesuffix(ending)
    found = next((name for name in known if name.lower() in (weights.lower(), base.lower())), None)
    return from_config(where, weights, known[found]) if found else None


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Return the config facts of the models that this package knows by their hub id."""
    facts: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text())
    return facts


def from_config(where: str, name: str, config: Mapping[str, Any]) -> Architecture:
    """Read a config.json. Raises ModelError for a form that is not known or a size that is missing."""
    if not isinstance(config, Mapping):
        raise ModelError(f"{where}: the config.json of {name} holds no mapping. Fetch it again.")
    config = config.get("text_config", config)
    kind = str(config.get("model_type"))
    if kind not in NORMS or any(config.get(key) for key in EXPERTS):
        what = f"a {kind}" if kind not in NORMS else "a mixture of experts"
        raise ModelError(
            f"{where}: {name} is {what}, whose arithmetic plan does not know. Known: {', '.join(NORMS)}; "
            "name a model of one of these with as many layers and parameters."
        )
    try:
        heads = int(config["num_attention_heads"])
        return Architecture(
            name=name,
            hidden_size=int(config["hidden_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            intermediate_size=int(config["intermediate_size"]),
            head_rows=int(config["vocab_size"]),
            is_tied=bool(config.get("tie_word_embeddings", False)),
            max_positions=int(config.get("max_position_embeddings") or 0),
            kind=kind,
            window=config.get("sliding_window") if config.get("use_sliding_window", kind != "qwen2") else None,
            norms_per_layer=NORMS[kind],
            norms_in_float32=kind.startswith("gemma"),
            norms_heads=kind == "qwen3",
            has_bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
        )
    except KeyError as error:
        raise ModelError(f"{where}: the config.json of {name} has no {error.args[0]}. Fetch it again.") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{where}: the config.json of {name} has a size that is none ({error}). Fetch it again."
        ) from error
