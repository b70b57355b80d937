"""What a student's tokens are drawn from, and how probable they were: its own distribution, or one mixed with another.

Mixed in probabilities, (1 - a) q + a p (MiniLLM, 2306.08543): a student that would wander off is held near what the
teacher would write, and importance weights q / ((1 - a) q + a p) correct for it. Both write with their own cache.

Shapes: B answers, L tokens so far, V shared vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor


class Drawing:
    """Draws one batch of answers from a student at temperature 1, and keeps each token's log-probability."""

    def __init__(self, mask: Tensor, vocab_size: int, teacher: Any = None, share: float = 0.0) -> None:
        """`mask` [B, longest prompt] hides the padding left of prompts; `share` is the teacher's, 0 to 1."""
        self._mask, self._vocab_size = mask, vocab_size
        self._teacher: Any = teacher if share else None
        self._share = share
        self._cache: Any = None
        self._last: tuple[Tensor, Tensor] | None = None  # log q and the log of what was drawn from, [B, V]
        self._known: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._look_back(input_ids)
        log_q = torch.log_softmax(scores[:, : self._vocab_size].float(), dim=-1)
        drawn_from = log_q
        if self._teacher is not None:
            log_p = torch.log_softmax(self._ask(input_ids), dim=-1)
            drawn_from = torch.logaddexp(log_q + math.log1p(-self._share), log_p + math.log(self._share))
        self._last = log_q, drawn_from
        beyond = scores.shape[-1] - self._vocab_size
        return torch.nn.functional.pad(drawn_from, (0, beyond), value=-torch.inf)

    def _look_back(self, input_ids: Tensor) -> None:
        """Note what the token that was drawn last had been given."""
        if self._last is not None:
            log_q, drawn_from = (part.gather(-1, input_ids[:, -1:])[:, 0] for part in self._last)
            self._known.append(torch.stack([log_q, (log_q - drawn_from).exp()]))

    def _ask(self, input_ids: Tensor) -> Tensor:
        """Return the teacher's logits of the next token [B, V]."""
        mask = torch.nn.functional.pad(self._mask, (0, input_ids.shape[1] - self._mask.shape[1]), value=1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        new = input_ids if self._cache is None else input_ids[:, -1:]
        said = self._teacher(
            input_ids=new,
            attention_mask=mask,
            position_ids=positions[:, -new.shape[1] :],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = said.past_key_values
        logits: Tensor = said.logits[:, -1, : self._vocab_size]
        return logits.float()

    def known(self, sequences: Tensor) -> Tensor:
        """Return log-probabilities and importance weights of every drawn token [2, B, new]; call it once."""
        self._look_back(sequences)
        return torch.stack(self._known, dim=-1)
