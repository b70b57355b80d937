"""One forward over a batch of documents, on either side of the service: tokens to the hidden states that predict labels.

Documents never see each other. Packed, they lie side by side in one row and the restarting positions tell the attention
where each begins; that holds only with use_cache=False: with the default cache transformers lets documents attend to
their neighbours in silence. Padded, each has a row of its own and what stands right of it is never seen.

Shapes: T tokens of the batch, S documents, L longest document, N supervised positions, H hidden size.
"""

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


def supervised_hidden(model: Any, batch: Batch, layout: Layout) -> Tensor:
    """Return the last hidden states, final norm included, at the supervised positions [N, H]."""
    backbone: nn.Module = model.get_decoder()
    if layout == "packed":
        hidden_1TH = backbone(
            input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False
        ).last_hidden_state
        return hidden_1TH[0, batch.supervised]
    lengths = batch.starts.diff()
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    tokens_SL = batch.tokens.new_zeros(len(lengths), int(lengths.max()))
    tokens_SL[rows, batch.positions] = batch.tokens
    positions_SL = torch.arange(tokens_SL.shape[1], device=tokens_SL.device).expand_as(tokens_SL)
    hidden_SLH = backbone(input_ids=tokens_SL, position_ids=positions_SL, use_cache=False).last_hidden_state
    return hidden_SLH[rows[batch.supervised], batch.positions[batch.supervised]]


def head_weight(model: Any) -> Tensor:
    """Return the weight of a causal language model's head [rows, H], tied or not."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight
