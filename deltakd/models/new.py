"""New small models with random weights, for worlds that bring no model of their own."""

from pathlib import Path

import torch

from deltakd.models.settings import NewModelSettings


def write_new_model(settings: NewModelSettings, folder: Path, dtype: torch.dtype = torch.float32) -> int:
    """Write a random model and its tokenizer as a Hugging Face folder; return its number of parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    config = AutoConfig.for_model(
        settings.architecture,
        vocab_size=settings.head_rows or len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=settings.tie_embeddings,
        **(
            {}
            if settings.architecture in ("qwen2", "llama")
            else {"head_dim": settings.hidden_size // settings.num_heads}
        ),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
