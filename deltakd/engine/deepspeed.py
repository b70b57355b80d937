"""DeepSpeed ZeRO: optimizer state, gradients and, in stage 3, weights sharded over the student ranks.

DeepSpeed averages gradients over ranks and knows nothing of tokens, so the loss is weighted by ranks / tokens; the
number of micro-batches varies from step to step, so the boundary is told by hand. AdamW is torch's own: DeepSpeed's
take minutes to compile where there is no GPU.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltakd.base.errors import RunError
from deltakd.base.files import remove
from deltakd.base.ranks import Role
from deltakd.engine.join import by_first_rank
from deltakd.engine.protocol import (
    Optimizer,
    StudentModule,
    TrainBatch,
    device_name,
    make_adamw,
    run_module,
    save_folder,
    standing_still,
    total_norm,
    trained,
)
from deltakd.engine.settings import DeepSpeedSettings
from deltakd.losses.linear import LinearLoss, Reference
from deltakd.models.lora import merge_lora

TAG = "state"  # DeepSpeed's name for one checkpoint of a folder


def config(
    settings: DeepSpeedSettings, optimizer: Optimizer, dtype: str, num_ranks: int, other_ranks: bool = False
) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run; `other_ranks`: it goes on from what another number of them wrote."""
    waiting = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}[settings.offload]
    offloads = {f"offload_{what}": {"device": "cpu"} for what in waiting}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": num_ranks,
        "gradient_clipping": optimizer.max_grad_norm,
        "zero_optimization": {"stage": settings.zero_stage, **offloads},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"load_universal": other_ranks},
        "steps_per_print": 10**12,
    }


class DeepSpeedEngine:
    """The student under ZeRO-3; every rank makes one and calls it in step with the others."""

    def __init__(
        self,
        module: StudentModule,
        settings: DeepSpeedSettings,
        optimizer: Optimizer,
        dtype: str,
        role: Role,
        other_ranks: bool = False,
    ) -> None:
        """`other_ranks`: `load_state` will be given what another number of ranks, or another stage, wrote."""
        import deepspeed

        _adopt_group()
        self.device = device_name(role.local_index)
        self._module = module
        self._num_ranks, self._stage = role.num_students, settings.zero_stage
        self._rank = role.rank
        module.train()
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_adamw(trained(module), optimizer),
            config=config(settings, optimizer, dtype, role.num_students, other_ranks),
        )
        self._other_ranks = other_ranks
        self._has_frozen = len(trained(module)) < len(list(module.parameters()))  # they lie in the student's folder

    def loss(self, batch: TrainBatch, references: Mapping[str, Reference], alpha: float) -> LinearLoss:
        return run_module(self._engine, batch, references, alpha)

    def backward(self, total: Tensor, weight: float, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(total * (weight * self._num_ranks))

    def grad_norm(self) -> float:
        """Return the norm of the whole gradient, from this rank's shard and the others'."""
        from deepspeed.utils import safe_get_full_grad, safe_get_local_grad

        if self._stage < 3:
            whole = [safe_get_full_grad(parameter) for parameter in trained(self._module).values()]
            return total_norm([g for g in whole if g is not None])
        local = [safe_get_local_grad(parameter) for parameter in trained(self._module).values()]
        square = torch.tensor(
            [total_norm([g for g in local if g is not None]) ** 2], dtype=torch.float64, device=self.device
        )
        torch.distributed.all_reduce(square)
        return float(square) ** 0.5

    def update(self, learning_rate: float, grad_norm: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def evaluating(self) -> AbstractContextManager[Any]:
        return standing_still(self._module)

    def gather(self, everywhere: bool) -> dict[str, Tensor]:
        """Gather one parameter at a time."""
        import deepspeed

        state: dict[str, Tensor] = {}
        for name, parameter in self._module.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if everywhere or self._rank == 0:
                    state[name] = parameter.detach().cpu().clone()
        return merge_lora(self._module.model, state)

    def save(self, folder: Path, tokenizer: Any) -> None:
        state = self.gather(everywhere=False)
        by_first_rank(self._rank, self.device, lambda: save_folder(self._module.model, state, tokenizer, folder))

    def save_state(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=self._has_frozen)

    def load_state(self, folder: Path) -> None:
        """Read this rank's share; what another number of ranks wrote is made universal first, in a folder beside."""
        tag, converted = TAG, folder.with_name("universal.part")
        if self._other_ranks:
            tag = f"{TAG}_universal"
            if self._rank == 0:
                make_universal(folder / TAG, converted / tag)
            torch.distributed.barrier()
            folder = converted
        decays = [group["weight_decay"] for group in self._engine.optimizer.param_groups]
        self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not self._has_frozen)
        if self._other_ranks:
            self._mend_universal(decays)
        torch.distributed.barrier()
        if self._rank == 0:
            remove(converted)

    def _mend_universal(self, decays: list[float]) -> None:
        """Set right what DeepSpeed 0.19.8 leaves wrong when it loads a universal checkpoint.

        All groups get the first one's weight decay, and all parameters share one step tensor, which AdamW then counts
        up once for each of them: its bias correction runs ahead.
        """
        adamw = self._engine.optimizer.optimizer
        for group, decay in zip(adamw.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for state in adamw.state.values():
            state["step"] = state["step"].clone()


def make_universal(saved: Path, folder: Path) -> None:
    """Convert a checkpoint so that any number of ranks can read it. Raises RunError if DeepSpeed cannot."""
    remove(folder)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(saved), "--output_folder", str(folder)]
    command.append("--inject_missing_state")  # a note of the format's version, which stages 1 and 2 do not write
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RunError(
            f"{saved}: cannot be read by another number of ranks ({''.join(said)[:160]}). "
            "Start as many student ranks as before."
        )


def _adopt_group() -> None:
    """Have DeepSpeed use the students' process group."""
    import deepspeed

    # Used by nothing in training, and it costs a lot on a CPU: a C++ build of a minute or more at the first start, a
    # lock that hangs every later build if that one is killed, and files that stay in /dev/shm after every run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


@contextmanager
def sharded_loading(configuration: dict[str, Any]) -> Iterator[None]:
    """Have transformers shard a model over the students while it loads, so that no rank ever holds it whole."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    _adopt_group()
    keep = HfDeepSpeedConfig(configuration)
    try:
        yield
    finally:
        del keep
        unset_hf_deepspeed_config()
