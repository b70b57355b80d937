"""The Engine seam, and the one module that every engine wraps.

Backbone, head and chunked loss run inside *one* module's forward. Under ZeRO-3 that is the only form that is right with
tied weights: reading a sharded head outside of a wrapped forward finds an empty tensor.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from deltakd.base.errors import RunError
from deltakd.base.files import put_in_place, remove
from deltakd.losses.linear import LinearLoss, Reference, linear_loss
from deltakd.losses.objectives import Objective, objective
from deltakd.losses.policy import Draws
from deltakd.models.forward import Batch, Layout, TokenBatch, head_weight, supervised_hidden

PLAIN = objective({"sft_weight": 1.0})


class TrainBatch(Batch, Protocol):
    """A batch with its labels."""

    @property
    def labels(self) -> Tensor:
        """The token that each supervised position predicts [N]."""

    @property
    def draws(self) -> Tensor | None:
        """Of labels that the student drew: log-probabilities then, importance weights and advantages [3, N]."""

    @property
    def corpus_weight(self) -> float | None:
        """A number where it is plain text, learnt by cross-entropy alone."""


class StudentModule(nn.Module):
    """A causal language model with its loss. Plain tensors go in and out: ZeRO-3 hooks nothing else."""

    def __init__(self, model: nn.Module, objective: Objective, layout: Layout, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        self._objective = objective
        self._layout: Layout = layout
        self._vocab_size = vocab_size

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        starts: Tensor,
        supervised: Tensor,
        labels: Tensor,
        references: Mapping[str, Reference],
        alpha: float,
        draws: Tensor | None = None,
        is_plain: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return a LinearLoss's parts; a batch without supervised tokens gives 0 and still runs every layer."""
        hidden_NH = supervised_hidden(self.model, TokenBatch(tokens, positions, starts, supervised), self._layout)
        head_VH = head_weight(self.model)
        if len(head_VH) != self._vocab_size:
            head_VH = head_VH[: self._vocab_size]
        own = PLAIN if is_plain else self._objective.at(alpha)
        drawn = None if draws is None else Draws(*draws)
        result = linear_loss(hidden_NH, head_VH, references, labels, own, self._objective.chunk_tokens, drawn)
        return result.total, result.statistics


def run_module(module: Any, batch: TrainBatch, references: Mapping[str, Reference], alpha: float) -> LinearLoss:
    """Call a wrapped StudentModule."""
    parts = (batch.tokens, batch.positions, batch.starts, batch.supervised, batch.labels)
    return LinearLoss(*module(*parts, dict(references), alpha, batch.draws, batch.corpus_weight is not None))


@contextmanager
def standing_still(module: StudentModule) -> Iterator[nn.Module]:
    """Turn off gradients and whatever a model does in training alone."""
    module.eval()
    try:
        with torch.no_grad():
            yield module.model
    finally:
        module.train()


@dataclass(frozen=True)
class Optimizer:
    """AdamW's numbers and the norm that gradients are clipped to; the rate of each step comes with the step."""

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float


class Engine(Protocol):
    """Holds the student in training. Losses never see how it is sharded."""

    device: str

    def loss(self, batch: TrainBatch, references: Mapping[str, Reference], alpha: float) -> LinearLoss:
        """Run the student and the loss, its target at `alpha`, on one micro-batch; the total is a sum over tokens."""

    def backward(self, total: Tensor, weight: float, last: bool) -> None:
        """Add weight * d total to the gradients, summed over ranks; `last` marks a step's last micro-batch."""

    def grad_norm(self) -> float:
        """Return the norm of the whole gradient, before any clipping."""

    def update(self, learning_rate: float, grad_norm: float) -> None:
        """Clip to the settings' norm, take one optimizer step at this rate and clear the gradients."""

    def evaluating(self) -> AbstractContextManager[Any]:
        """Stand still for a while: no gradients, no dropout; yields the model, which can then generate."""

    def gather(self, everywhere: bool) -> dict[str, Tensor]:
        """Return the student's weights, whole, on the CPU and in its dtype: on every rank or on rank 0; all call.

        Their names are those of a model without adapters, which are added to their weights.
        """

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write student and tokenizer as a Hugging Face folder, whole or not at all; rank 0 writes, all call."""

    def save_state(self, folder: Path) -> None:
        """Write weights and optimizer as they stand after the last update; every rank its share."""

    def load_state(self, folder: Path) -> None:
        """Go on from what `save_state` wrote, to the same bits on as many ranks."""


def parameter_groups(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into those that decay (matrices) and those that do not (norms and biases)."""

    def is_matrix(parameter: nn.Parameter) -> bool:
        return len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # ZeRO-3 leaves an empty tensor behind

    decay = [parameter for _, parameter in named if is_matrix(parameter)]
    rest = [parameter for _, parameter in named if not is_matrix(parameter)]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what a module trains, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def make_adamw(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> torch.optim.AdamW:
    """Return torch's AdamW over some parameters."""
    groups = parameter_groups(list(parameters.items()), optimizer.weight_decay)
    return torch.optim.AdamW(groups, lr=optimizer.learning_rate, betas=optimizer.betas)


def take_adamw_step(adamw: torch.optim.AdamW, gradients: list[Tensor], learning_rate: float, factor: float) -> None:
    """Scale the gradients by `factor`, where it clips, take one step at this rate, and clear them."""
    for gradient in gradients if factor < 1 else []:
        gradient.mul_(factor)
    for group in adamw.param_groups:
        group["lr"] = learning_rate
    adamw.step()
    adamw.zero_grad()


def total_norm(gradients: list[Tensor]) -> float:
    """Return the norm over all gradients, summed in float64."""
    return float(sum(float(g.detach().double().square().sum()) for g in gradients)) ** 0.5


def clip_factor(grad_norm: float, max_grad_norm: float) -> float:
    """Return what a gradient is multiplied with so that its norm is at most `max_grad_norm`."""
    return min(1.0, max_grad_norm / (grad_norm + 1e-6))


def save_folder(model: Any, state: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write a model of these weights and its tokenizer beside the folder's name and rename it.

    Raises RunError if that cannot be.
    """
    part = folder.with_name(folder.name + ".part")
    try:
        remove(part)
        model.save_pretrained(part, state_dict=state)
        tokenizer.save_pretrained(part)
        put_in_place(part, folder)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            remove(part)
        raise RunError(
            f"{folder}: the model cannot be written ({str(error).splitlines()[0][:160]}). Free space or rights and "
            "start the same command again: it goes on from its last checkpoint."
        ) from error


def device_name(local_index: int) -> str:
    """Return this process's device: one accelerator per process, or the CPU."""
    return f"cuda:{local_index}" if torch.cuda.is_available() else "cpu"
