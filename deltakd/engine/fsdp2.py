"""PyTorch's FSDP2: weights, gradients and optimizer state sharded over the student ranks, without another library.

Each decoder layer is gathered for its own forward and backward; embeddings, head and loss belong to the root module and
stay gathered through the step, which is what lets the loss read a tied head. Gradients are averaged over ranks, so the
loss is weighted by ranks / tokens. Checkpoints are torch.distributed.checkpoint's: any number of ranks reads them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from deltakd.base.ranks import Role
from deltakd.engine.join import by_first_rank
from deltakd.engine.protocol import (
    Optimizer,
    StudentModule,
    TrainBatch,
    clip_factor,
    device_name,
    make_adamw,
    run_module,
    save_folder,
    standing_still,
    take_adamw_step,
    total_norm,
    trained,
)
from deltakd.engine.settings import Fsdp2Settings
from deltakd.losses.linear import LinearLoss, Reference
from deltakd.models.lora import merge_lora

TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)  # what is frozen lies in the student's folder


class Fsdp2Engine:
    """The student under FSDP2; every rank makes one and calls it in step with the others."""

    def __init__(
        self, module: StudentModule, settings: Fsdp2Settings, optimizer: Optimizer, dtype: str, role: Role
    ) -> None:
        """`module` comes in float32, its master weights; `dtype` is what it computes in."""
        self.device = device_name(role.local_index)
        self._module, self._rank, self._num_ranks = module, role.rank, role.num_students
        self._max_grad_norm, self._dtype = optimizer.max_grad_norm, getattr(torch, dtype)
        mesh = init_device_mesh(self.device.partition(":")[0], (role.num_students,))
        precision = MixedPrecisionPolicy(param_dtype=self._dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=self.device != "cpu") if settings.offload == "all" else OffloadPolicy()
        shard: Any = fully_shard
        decoder: Any = module.model.get_submodule("model")
        for layer in decoder.layers:
            shard(layer, mesh=mesh, mp_policy=precision, offload_policy=offload)
        shard(module, mesh=mesh, mp_policy=precision, offload_policy=offload)
        module.train()
        self._root: Any = module
        self._adamw = make_adamw(trained(module), optimizer)

    def loss(self, batch: TrainBatch, references: Mapping[str, Reference], alpha: float) -> LinearLoss:
        return run_module(self._module, batch, references, alpha)

    def backward(self, total: Tensor, weight: float, last: bool) -> None:
        (total * (weight * self._num_ranks)).backward()

    def grad_norm(self) -> float:
        """Return the norm of the whole gradient, from this rank's shard and the others'."""
        square = torch.tensor([total_norm(self._gradients()) ** 2], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(square)
        return float(square) ** 0.5

    def _gradients(self) -> list[Tensor]:
        """Return this rank's shards of the gradient."""
        gradients: list[Any] = [parameter.grad for parameter in self._module.parameters() if parameter.grad is not None]
        return [gradient.to_local() for gradient in gradients]

    def update(self, learning_rate: float, grad_norm: float) -> None:
        factor = clip_factor(grad_norm, self._max_grad_norm)
        take_adamw_step(self._adamw, self._gradients(), learning_rate, factor)

    @contextmanager
    def evaluating(self) -> Iterator[Any]:
        """Generation calls the model below the root, whose own weights are gathered for it."""
        with standing_still(self._module) as model:
            self._root.unshard()
            try:
                yield model
            finally:
                self._root.reshard()

    def gather(self, everywhere: bool) -> dict[str, Tensor]:
        """Gather one parameter at a time."""
        state: dict[str, Tensor] = {}
        parameters: Any = self._module.model.named_parameters()
        for name, parameter in parameters:
            whole = parameter.detach().to(self.device).full_tensor()
            if everywhere or self._rank == 0:
                state[name] = whole.to(self._dtype).cpu().clone()
        return merge_lora(self._module.model, state)

    def save(self, folder: Path, tokenizer: Any) -> None:
        state = self.gather(everywhere=False)
        by_first_rank(self._rank, self.device, lambda: save_folder(self._module.model, state, tokenizer, folder))

    def save_state(self, folder: Path) -> None:
        model, adamw = get_state_dict(self._module, self._adamw, options=TRAINED_ONLY)
        dcp.save({"model": model, "adamw": adamw}, checkpoint_id=folder)

    def load_state(self, folder: Path) -> None:
        model, adamw = get_state_dict(self._module, self._adamw, options=TRAINED_ONLY)
        state: dict[str, Any] = {"model": model, "adamw": adamw}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self._module,
            self._adamw,
            model_state_dict=state["model"],
            optim_state_dict=state["adamw"],
            options=TRAINED_ONLY,
        )
