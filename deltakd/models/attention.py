"""Attention over documents that lie side by side: each attends to itself alone, without a mask and without padding.

transformers' own way for such a row is a mask of [tokens, tokens], and attention over all of it. Here torch's
scaled_dot_product_attention is called once a document, so cost and memory follow the documents' own lengths. Where no
documents are given (generation), it is transformers' sdpa as it stands.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

DOCUMENTS = "deltakd_documents"  # transformers' name for this attention


def register_documents() -> str:
    """Let models be loaded with this attention; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(DOCUMENTS, _attend)
    AttentionMaskInterface.register(DOCUMENTS, sdpa_mask)  # for generation, which has padding
    return DOCUMENTS


def document_arguments(model: Any, starts: Tensor) -> dict[str, Any]:
    """Return what a backbone is called with beside a row of tokens and positions; `starts` [S+1] as in a batch."""
    if model.config._attn_implementation != DOCUMENTS:
        return {}
    # A mask of four dimensions is taken as it is: transformers makes none, and nobody reads this one.
    return {"documents": starts.tolist(), "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)}


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: list[int] | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attend from query [1, heads, T, D] to key and value [1, kv heads, T, D]; returns [1, T, heads, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if documents is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
        return output, None
    parts = []
    for first, last in pairwise(documents):
        own = (part[:, :, first:last] for part in (query, key, value))
        mask = _band(last - first, sliding_window, query.device)
        parts.append(sdpa_attention_forward(module, *own, mask, is_causal=True, **rest)[0])
    return torch.cat(parts, dim=1), None


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which of a document's tokens see which [1, 1, length, length]; None: all that came before."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return ((distance >= 0) & (distance < window))[None, None]
