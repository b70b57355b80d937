"""Protocols: how models are asked and what their answers are held against. Numbers of two protocols do not compare."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deltakd.data.conversation import Conversation
from deltakd.evaluate.settings import EvaluationSettings, SamplingSettings


@dataclass(frozen=True)
class Protocol:
    """One way to ask; every prompt is answered once for each seed."""

    name: str
    seeds: tuple[int, ...]
    sampling: SamplingSettings  # but for its seed
    max_prompt_tokens: int | None = None
    all_references: bool = False  # the best score over a row's references counts; else its last turn alone

    def cut(self, prompt: list[int]) -> list[int]:
        """Return the end of a prompt that is too long: the question stands there, and the header of the answer."""
        return prompt if self.max_prompt_tokens is None else prompt[-self.max_prompt_tokens :]

    def references(self, row: Conversation) -> list[str]:
        """Return what an answer to a row is held against."""
        return [row.reference, *(row.also if self.all_references else ())]

    def facts(self) -> dict[str, Any]:
        """Return all of it for records, as plain values."""
        own = {"seeds": list(self.seeds), "max_prompt_tokens": self.max_prompt_tokens}
        return own | {"all_references": self.all_references} | self.sampling.model_dump(mode="json", exclude={"seed"})


def _paper(settings: EvaluationSettings) -> Protocol:
    sampling = SamplingSettings(**settings.model_dump(include=set(SamplingSettings.model_fields)))
    return Protocol("paper", (settings.seed,), sampling)


def _minillm(settings: EvaluationSettings) -> Protocol:
    """MiniLLM's (2306.08543) as DistiLLM and DSKD took it over: 512 tokens are 256 of the prompt and 256 of the answer.

    Theirs keeps the beginning of a prompt that is too long, and has no chat template whose end could be lost.
    """
    sampling = SamplingSettings(max_new_tokens=256, batch_size=settings.batch_size, temperature=1.0, top_p=1.0)
    return Protocol("minillm", (10, 20, 30, 40, 50), sampling, 256, all_references=True)


PROTOCOLS: dict[str, Callable[[EvaluationSettings], Protocol]] = {"paper": _paper, "minillm": _minillm}
