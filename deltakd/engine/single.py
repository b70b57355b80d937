"""Plain torch in one process: small models, the raw models of the quickstart, and a plain mirror for ZeRO-3.

Hidden matrices may go to Muon, which learns small models from scratch in fewer steps; all else goes to AdamW.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltakd.engine.protocol import (
    Optimizer,
    StudentModule,
    TrainBatch,
    clip_factor,
    parameter_groups,
    run_module,
    save_folder,
    total_norm,
)
from deltakd.engine.settings import SingleSettings
from deltakd.losses.linear import LinearLoss, Reference


class SingleEngine:
    """One process, one device, no sharding."""

    def __init__(self, module: StudentModule, settings: SingleSettings, optimizer: Optimizer, device: str) -> None:
        self.device = device
        self._module = module.to(device).train()
        self._max_grad_norm = optimizer.max_grad_norm
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._parameters = [parameter for _, parameter in named]
        hidden = [p for name, p in named if p.ndim == 2 and ".layers." in name]
        self._muon = None
        if settings.matrices == "muon":
            self._muon = torch.optim.Muon(
                hidden, lr=settings.muon_learning_rate, weight_decay=optimizer.weight_decay, adjust_lr_fn="original"
            )
            named = [(name, p) for name, p in named if not any(p is other for other in hidden)]
        self._adamw = torch.optim.AdamW(
            parameter_groups(named, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
        )
        self._muon_ratio = settings.muon_learning_rate / optimizer.learning_rate

    def loss(self, batch: TrainBatch, references: Mapping[str, Reference]) -> LinearLoss:
        return run_module(self._module, batch, references)

    def backward(self, total: Tensor, weight: float, last: bool) -> None:
        (total * weight).backward()

    def grad_norm(self) -> float:
        return total_norm([p.grad for p in self._parameters if p.grad is not None])

    def update(self, learning_rate: float, grad_norm: float) -> None:
        factor = clip_factor(grad_norm, self._max_grad_norm)
        for parameter in self._parameters:
            if parameter.grad is not None and factor < 1:
                parameter.grad.mul_(factor)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        if self._muon is not None:
            for group in self._muon.param_groups:
                group["lr"] = learning_rate * self._muon_ratio
            self._muon.step()
        for parameter in self._parameters:
            parameter.grad = None

    def save(self, folder: Path, tokenizer: Any) -> None:
        save_folder(self._module.model, None, tokenizer, folder)
