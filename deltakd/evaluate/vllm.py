"""vLLM as the one that writes responses, where it is installed. Untried: not measured yet."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deltakd.base.errors import RunError
from deltakd.evaluate.generate import Answer
from deltakd.evaluate.settings import SamplingSettings


def fits() -> bool:
    """Tell whether vLLM can be used here: it is installed and there is a GPU."""
    import torch

    return find_spec("vllm") is not None and torch.cuda.is_available()


def writer(
    path: Path, dtype: str, tokenizer: Any, end_id: int, settings: SamplingSettings
) -> Callable[[list[list[int]], int], list[Answer]]:
    """Load a model into vLLM and return what answers prompts with it. Raises RunError if it is not installed."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise RunError("generation.backend: vllm is not installed. Run `pip install vllm`, or write auto.") from error
    model = LLM(model=str(path), dtype=dtype)

    def write(prompts: list[list[int]], seed: int) -> list[Answer]:
        asked = [
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=[end_id],
                seed=seed + number,
            )
            for number in range(len(prompts))
        ]
        written = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
        answers = []
        for one in written:
            tokens = [token for token in one.outputs[0].token_ids if token != end_id]
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            answers.append(Answer(text, ended=one.outputs[0].finish_reason == "stop", num_tokens=len(tokens)))
        return answers

    return write
