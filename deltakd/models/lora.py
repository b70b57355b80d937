"""LoRA students (Hu et al. 2021, 2106.09685): W + scale B A, of which B and A are trained; peft puts them in."""

from typing import Any

import torch
from torch import Tensor, nn

from deltakd.base.errors import ModelError
from deltakd.models.settings import LoraSettings

ADAPTER = "default"


def add_lora(where: str, model: Any, settings: LoraSettings, seed: int) -> None:
    """Freeze a model and put trainable adapters of one seed into its linear layers; its head stays as it is.

    Raises ModelError if no layer has the names that the settings give.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.layers,
    )
    torch.manual_seed(seed)  # whatever loading has drawn: all engines and ranks begin with the same adapters
    try:
        inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        raise ModelError(
            f"{where}: {settings.layers} names no linear layer of the student. Write all-linear, or names as q_proj."
        ) from error
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and (
            not isinstance(layer.get_base_layer(), nn.Linear) or layer is model.get_output_embeddings()
        ):
            raise ModelError(
                f"{where}: {name} can have no adapter: embeddings and the head are read by their weights. Leave it out."
            )


def merge_lora(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a whole state dict with adapters added to their weights, under the names of a model without any."""
    if not any(".lora_A." in name for name in state):
        return state
    from peft.tuners.lora import LoraLayer

    merged = dict(state)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            down, up = (merged.pop(f"{name}.lora_{part}.{ADAPTER}.weight").float() for part in "AB")
            weight = merged[f"{name}.base_layer.weight"]
            merged[f"{name}.base_layer.weight"] = (weight + layer.scaling[ADAPTER] * (up @ down)).to(weight.dtype)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in merged.items()}
