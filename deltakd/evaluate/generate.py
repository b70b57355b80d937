"""Answers to held-out prompts: batched generation, greedy or sampled, the same for the same settings and seed.

Prompts are batched by length, so little of a batch is padding, and put back into their order. transformers generates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltakd.evaluate.settings import SamplingSettings


@dataclass(frozen=True)
class Answer:
    """What a model wrote, without its end-of-turn token, and whether it ended its turn itself."""

    text: str
    ended: bool


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
        text = tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True).strip()
        answers.append(Answer(text, ended))
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
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    answers: list[list[int]] = [[]] * len(prompts)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for first in range(0, len(order), settings.batch_size):
            chosen = order[first : first + settings.batch_size]
            written = _generate_batch(model, [prompts[index] for index in chosen], end_id, settings, synced)
            for index, tokens in zip(chosen, written.tolist(), strict=True):
                answers[index] = tokens[: tokens.index(end_id) + 1] if end_id in tokens else tokens
            advance(len(chosen))
    return answers


def _generate_batch(
    model: Any, prompts: list[list[int]], end_id: int, settings: SamplingSettings, synced: bool
) -> Tensor:
    """Return the tokens written after each prompt [B, at most max_new_tokens]."""
    from transformers import GenerationConfig

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
    # A model's own generation_config could bring sampling or a repetition penalty that the recipe does not name.
    own, model.generation_config = model.generation_config, config
    try:
        written: Tensor = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=synced
        )
    finally:
        model.generation_config = own  # which an export writes down
    return written[:, length:]
