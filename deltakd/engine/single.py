"""Plain torch in one process: small models, the raw models of the quickstart, and a plain mirror for ZeRO-3."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltakd.engine.protocol import (
    Optimizer,
    StudentModule,
    TrainBatch,
    clip_factor,
    make_adamw,
    run_module,
    save_folder,
    standing_still,
    take_adamw_step,
    total_norm,
    trained,
)
from deltakd.losses.linear import LinearLoss, Reference
from deltakd.models.lora import merge_lora


class SingleEngine:
    """The student in this process, with AdamW. Steps move float32 masters where the weights are of 16 bit."""

    def __init__(self, module: StudentModule, optimizer: Optimizer, device: str) -> None:
        self.device = device
        self._module = module.to(device).train()
        self._max_grad_norm = optimizer.max_grad_norm
        self._trained = trained(self._module)
        self._masters = {name: _master(parameter) for name, parameter in self._trained.items()}
        self._adamw = make_adamw(self._masters, optimizer)

    def loss(self, batch: TrainBatch, references: Mapping[str, Reference], alpha: float) -> LinearLoss:
        return run_module(self._module, batch, references, alpha)

    def backward(self, total: Tensor, weight: float, last: bool) -> None:
        (total * weight).backward()
        for name, master in self._masters.items():
            if (parameter := self._trained[name]) is not master and parameter.grad is not None:
                added, parameter.grad = parameter.grad.float(), None
                master.grad = added if master.grad is None else master.grad + added

    def grad_norm(self) -> float:
        return total_norm(self._gradients())

    def _gradients(self) -> list[Tensor]:
        return [master.grad for master in self._masters.values() if master.grad is not None]

    def update(self, learning_rate: float, grad_norm: float) -> None:
        factor = clip_factor(grad_norm, self._max_grad_norm)
        take_adamw_step(self._adamw, self._gradients(), learning_rate, factor)
        self._round_masters()

    @torch.no_grad()
    def _round_masters(self) -> None:
        for name, master in self._masters.items():
            if (parameter := self._trained[name]) is not master:
                parameter.copy_(master)

    def evaluating(self) -> AbstractContextManager[Any]:
        return standing_still(self._module)

    def gather(self, everywhere: bool) -> dict[str, Tensor]:
        state = {name: parameter.detach().cpu() for name, parameter in self._module.model.named_parameters()}
        return merge_lora(self._module.model, state)

    def save(self, folder: Path, tokenizer: Any) -> None:
        save_folder(self._module.model, self.gather(everywhere=False), tokenizer, folder)

    def save_state(self, folder: Path) -> None:
        save_file(dict(self._masters), folder / "weights.safetensors")
        state = self._adamw.state_dict()["state"]
        moments = {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
        save_file(moments, folder / "adamw.safetensors")

    def load_state(self, folder: Path) -> None:
        weights = load_file(folder / "weights.safetensors")
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(weights[name])
        self._round_masters()
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(folder / "adamw.safetensors").items():
            index, _, moment = name.partition(".")
            state.setdefault(int(index), {})[moment] = value
        self._adamw.load_state_dict({**self._adamw.state_dict(), "state": state})


def _master(parameter: nn.Parameter) -> nn.Parameter:
    wide = parameter.dtype in (torch.float32, torch.float64)
    return parameter if wide else nn.Parameter(parameter.detach().float())
