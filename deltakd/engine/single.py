"""Plain torch in one process: small models, the raw models of the quickstart, and a plain mirror for ZeRO-3."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltakd.engine.protocol import (
    Optimizer,
    StudentModule,
    TrainBatch,
    clip_factor,
    make_adamw,
    run_module,
    save_folder,
    take_adamw_step,
    total_norm,
)
from deltakd.losses.linear import LinearLoss, Reference


class SingleEngine:
    """One process, one device, no sharding."""

    def __init__(self, module: StudentModule, optimizer: Optimizer, device: str) -> None:
        self.device = device
        self._module = module.to(device).train()
        self._max_grad_norm = optimizer.max_grad_norm
        self._adamw = make_adamw(module, optimizer)

    def loss(self, batch: TrainBatch, references: Mapping[str, Reference], alpha: float) -> LinearLoss:
        return run_module(self._module, batch, references, alpha)

    def backward(self, total: Tensor, weight: float, last: bool) -> None:
        (total * weight).backward()

    def grad_norm(self) -> float:
        return total_norm(self._gradients())

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._module.parameters() if parameter.grad is not None]

    def update(self, learning_rate: float, grad_norm: float) -> None:
        factor = clip_factor(grad_norm, self._max_grad_norm)
        take_adamw_step(self._adamw, self._gradients(), learning_rate, factor)

    def save(self, folder: Path, tokenizer: Any) -> None:
        save_folder(self._module.model, None, tokenizer, folder)

    def save_state(self, folder: Path) -> None:
        save_file(dict(self._module.named_parameters()), folder / "weights.safetensors")
        state = self._adamw.state_dict()["state"]
        moments = {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
        save_file(moments, folder / "adamw.safetensors")

    def load_state(self, folder: Path) -> None:
        weights = load_file(folder / "weights.safetensors")
        with torch.no_grad():
            for name, parameter in self._module.named_parameters():
                parameter.copy_(weights[name])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(folder / "adamw.safetensors").items():
            index, _, moment = name.partition(".")
            state.setdefault(int(index), {})[moment] = value
        self._adamw.load_state_dict({**self._adamw.state_dict(), "state": state})
