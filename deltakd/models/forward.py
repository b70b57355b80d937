"""One forward over a batch of documents, on either side of the service: tokens to hidden states that predict labels.

Documents never see each other. Packed, they lie side by side in one row and the restarting positions tell the attention
where each begins; that holds only with use_cache=False: with the default cache transformers lets documents attend to
their neighbours in silence. Padded, each has a row of its own and what stands right of it is never seen.

Shapes: T tokens of the batch, S documents, L longest document, N supervised positions, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

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
    lengths = batch.starts.diff()
    width = int(lengths.max())
    rows, columns = (part.to(lengths.device) for part in lay_out(lengths.tolist(), width, layout))
    cells_T = torch.repeat_interleave(rows * width + columns, lengths) + batch.positions
    num_rows = int(rows.max()) + 1
    used_R = rows.new_zeros(num_rows).index_add_(0, rows, lengths)
    # What is left of a row is a document of its own, at its end, where nobody looks.
    positions_RW = (torch.arange(width, device=rows.device) - used_R[:, None]).clamp(min=0)
    positions_RW.view(-1)[cells_T] = batch.positions
    tokens_RW = torch.zeros_like(positions_RW)
    tokens_RW.view(-1)[cells_T] = batch.tokens
    hidden_RWH = backbone(input_ids=tokens_RW, position_ids=positions_RW, use_cache=False).last_hidden_state
    return hidden_RWH.flatten(0, 1)[cells_T[batch.supervised]]


def lay_out(lengths: Sequence[int], width: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the row and first column of every document.

    Attention costs tokens x width, so packed rows are no wider than the longest document: longest first, each into the
    first row that holds it.
    """
    if layout == "padded":
        return torch.arange(len(lengths)), torch.zeros(len(lengths), dtype=torch.int64)
    used: list[int] = []
    rows, columns = [0] * len(lengths), [0] * len(lengths)
    for document in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        row = next((row for row, taken in enumerate(used) if taken + lengths[document] <= width), len(used))
        if row == len(used):
            used.append(0)
        rows[document], columns[document] = row, used[row]
        used[row] += lengths[document]
    return torch.tensor(rows), torch.tensor(columns)


def head_weight(model: Any) -> Tensor:
    """Return the weight of a causal language model's head [rows, H], tied or not."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight
