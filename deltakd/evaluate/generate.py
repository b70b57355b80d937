"""Answers to held-out prompts: batched generation, greedy or sampled, the same for the same settings and seed.

Prompts are batched by length, so little of a batch is padding, and put back into their order. transformers generates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deltakd.evaluate.settings import SamplingSettings


class Draw(Protocol):
    """Turns a model's logits [B, V] after tokens [B, L] into those that are drawn from, and keeps what it saw."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits that the next token is drawn from."""

    def known(self, sequences: Tensor) -> Tensor:
        """Return what is known of every drawn token [2, B, new], once all are drawn."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote, without its end-of-turn token, and whether it ended its turn itself."""

    text: str
    ended: bool
    num_tokens: int = 0  # that it wrote, without the one that ends its turn


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    end_id: int,
    settings: SamplingSettings,
    advance: Callable[[int], object] = lambda _: None,
    synced: bool = False,
) -> list[Answer]:
    """Return each prompt's answer; `advance` hears of every batch's size.

    `synced`: the model is shared with other ranks, which answer as many prompts: all go on until all are done. Random
    numbers are drawn apart from the process's own.
    """
    answers = []
    for tokens in write_tokens(model, prompts, end_id, settings, advance, synced):
        ended = tokens[-1:] == [end_id]
        said = tokens[:-1] if ended else tokens
        text = tokenizer.decode(said, skip_special_tokens=True).strip()
        answers.append(Answer(text, ended, len(said)))
    return answers


@torch.no_grad()  # not inference mode: an engine's buffers, made there, could not be trained with any more
def write_tokens(
    model: Any,
    prompts: Sequence[list[int]],
    end_id: int,
    settings: SamplingSettings,
    advance: Callable[[int], object] = lambda _: None,
    synced: bool = False,
) -> list[list[int]]:
    """Return the tokens of each prompt's answer, with the one that ends its turn if it came; else as `generate`."""
    return [tokens for tokens, _ in draw_tokens(model, prompts, end_id, settings, advance, synced)]


@torch.no_grad()
def draw_tokens(
    model: Any,
    prompts: Sequence[list[int]],
    end_id: int,
    settings: SamplingSettings,
    advance: Callable[[int], object] = lambda _: None,
    synced: bool = False,
    vocab_size: int | None = None,
    observe: Callable[[Tensor], Draw] | None = None,
) -> list[tuple[list[int], Tensor | None]]:
    """Return the tokens of each prompt's answer as `write_tokens`, and what is known of each token [2, tokens].

    Tokens from `vocab_size` on are never drawn; None: all may be. `observe` makes from the prompts' mask [B, longest
    prompt] what draws a batch (drawing.py); without it nothing is known.
    """
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    answers: list[tuple[list[int], Tensor | None]] = [([], None)] * len(prompts)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for first in range(0, len(order), settings.batch_size):
            chosen = order[first : first + settings.batch_size]
            asked = [prompts[index] for index in chosen]
            written, known = _generate_batch(model, asked, end_id, settings, synced, vocab_size, observe)
            for row, (index, tokens) in enumerate(zip(chosen, written.tolist(), strict=True)):
                tokens = tokens[: tokens.index(end_id) + 1] if end_id in tokens else tokens
                answers[index] = tokens, None if known is None else known[:, row, : len(tokens)]
            advance(len(chosen))
    return answers


def _generate_batch(
    model: Any,
    prompts: list[list[int]],
    end_id: int,
    settings: SamplingSettings,
    synced: bool,
    vocab_size: int | None,
    observe: Callable[[Tensor], Draw] | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the tokens written after each prompt [B, at most max_new_tokens], and what is known of them."""
    from transformers import GenerationConfig, LogitsProcessorList, SuppressTokensLogitsProcessor

    device = next(model.parameters()).device
    length = max(map(len, prompts))
    # Left of a prompt stands padding that the mask hides, so every answer begins in the same column.
    ids = torch.tensor([[end_id] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    sampling = (
        {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.temperature else {}
    )
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        eos_token_id=end_id,
        pad_token_id=end_id,
        **sampling,
    )
    draw = observe(mask) if observe is not None else None
    processors = LogitsProcessorList([draw] if draw is not None else [])
    head_rows = len(model.get_output_embeddings().weight)
    if vocab_size is not None and vocab_size < head_rows:
        processors.append(SuppressTokensLogitsProcessor(list(range(vocab_size, head_rows)), device=str(device)))
    # A model's own generation_config could bring sampling or a repetition penalty that the recipe does not name.
    own, model.generation_config = model.generation_config, config
    try:
        written: Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            synced_gpus=synced,
            logits_processor=processors,
        )
    finally:
        model.generation_config = own  # which an export writes down
    return written[:, length:], None if draw is None else draw.known(written)
