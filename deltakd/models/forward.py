"""One forward over a batch of documents, on either side of the service: tokens to hidden states that predict labels.

Documents never see each other. Packed, they lie side by side in one row: `attention.py` is told where each begins, and
other attention knows from the restarting positions. That holds only with use_cache=False: with the default cache
transformers lets documents attend to their neighbours in silence. Padded, each has a row of its own and what stands
right of it is never seen.

Shapes: T tokens of the batch, S documents, L longest document, N supervised positions, H hidden size.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from deltakd.models.attention import document_arguments

Layout = Literal["packed", "padded"]


class Batch(Protocol):
    """The part of a packed batch that a forward needs."""

    @property
    def tokens(self) -> Tensor:
        """Token ids [T], documents side by side."""

    @property
    def positions(self) -> Tensor:
        """Positions [T], from 0 in every document."""

    @property
    def starts(self) -> Tensor:
        """First token of each document, and T [S+1]."""

    @property
    def supervised(self) -> Tensor:
        """Positions that predict a label [N], as indices into T."""


@dataclass(frozen=True)
class TokenBatch:
    """A batch as plain tensors: what travels to a teacher rank or through an engine's wrapped forward."""

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    supervised: Tensor


def supervised_hidden(model: Any, batch: Batch, layout: Layout) -> Tensor:
    """Return the last hidden states, final norm included, at the supervised positions [N, H]."""
    backbone: nn.Module = model.get_decoder()
    if layout == "packed":
        row = document_arguments(model, batch.starts)
        output = backbone(input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False, **row)
        hidden_TH: Tensor = output.last_hidden_state[0]
        return hidden_TH[batch.supervised]
    lengths = batch.starts.diff()
    num_rows, width = len(lengths), int(lengths.max())
    cells_T = torch.arange(num_rows, device=lengths.device).repeat_interleave(lengths) * width + batch.positions
    positions_RW = torch.arange(width, device=lengths.device).repeat(num_rows, 1)
    tokens_RW = torch.zeros_like(positions_RW)
    tokens_RW.view(-1)[cells_T] = batch.tokens
    hidden_RWH = backbone(input_ids=tokens_RW, position_ids=positions_RW, use_cache=False).last_hidden_state
    return hidden_RWH.flatten(0, 1)[cells_T[batch.supervised]]


def head_weight(model: Any) -> Tensor:
    """Return the weight of a causal language model's head [rows, H], tied or not."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight
