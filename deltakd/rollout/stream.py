"""Batches that the student writes itself: the prompts of a step's examples, answered by the student as it stands.

A copy of the student, whole on every rank, writes: generation from sharded weights gathers them for every token. At the
first written step of each block of `refresh_steps` it takes the weights and answers the prompts of all written steps of
the block. Which steps these are depends on the seed and the step alone, and ranks only share the work out. What was
written and not trained on yet, and what may be learnt again, is part of a checkpoint.

    step      1   2w  3   4w | 5w  6   7w  8 |        refresh_steps: 4, w: written
    weights     after step 1 | after step 4  |
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltakd.data.examples import Example, ExampleSet
from deltakd.data.packing import PackedBatch
from deltakd.data.stream import Stream
from deltakd.rollout.mixture import Mixture
from deltakd.rollout.settings import RolloutSettings
from deltakd.rollout.writing import AGAIN, Writer, prompt_of

Asked = tuple[int, NDArray[np.int64]]  # a step, and the examples that it takes


class Rollouts:
    """This rank's micro-batches, of which the student has written some."""

    def __init__(
        self,
        stream: Stream,
        examples: ExampleSet,
        settings: RolloutSettings,
        seed: int,
        mixture: Mixture,
        writer: Writer,
        refresh: Callable[[], None],
        record: Callable[[Mapping[str, Any]], None] = lambda facts: None,
    ) -> None:
        """`refresh` gives the writing copy the student's weights, on all ranks together; `writer` answers with it."""
        self._stream, self._examples, self._settings, self._seed = stream, examples, settings, seed
        self._mixture, self._writer, self._refresh, self._record = mixture, writer, refresh, record
        self._made: dict[int, list[Example]] = {}  # the student's tokens by step, up to the last that is decided
        self._decided = 0
        self._last: Sequence[float] = ()  # what was written last, and for which step first
        capacity = settings.replay.capacity if settings.replay is not None else 0
        self._buffer: deque[Example] = deque(maxlen=capacity)

    def waits(self, step: int) -> bool:
        """Tell whether a step's batches can only be made when the step before it has been taken."""
        moves = self._settings.adaptive is not None
        return step > self._decided and (moves or self._mixture.source(step, is_full=False) != "data")

    def observe(self, loss: float) -> None:
        """Take note of a validation's loss, the same on every rank."""
        self._mixture.observe(loss)

    def steps(self, first: int = 0) -> Iterator[list[PackedBatch]]:
        """Yield the micro-batches of the step after `first`, the next step, and so on without end."""
        numbered = enumerate(self._stream.indices(), start=1)
        while True:
            block = list(islice(numbered, self._settings.refresh_steps))
            for step, chosen in block:
                if step <= first:
                    continue
                if self.waits(step):
                    last = max(step, self._mixture.num_steps)  # nobody learns what is written for a step behind it
                    self._decide([(one, asked) for one, asked in block if step <= one <= last])
                made = self._made.get(step)
                yield self._stream.cut(chosen) if made is None else self._stream.cut_examples(made)

    def _decide(self, block: Sequence[Asked]) -> None:
        """Find out whose tokens some steps take, and have what is to be written written, by the weights as they are."""
        started = time.perf_counter()
        capacity, sources, filled = self._buffer.maxlen or 0, {}, len(self._buffer)
        for step, chosen in block:
            sources[step] = self._mixture.source(step, filled >= capacity)
            filled += len(chosen) if sources[step] == "written" else 0
        prompts = {
            step: [prompt_of(self._examples[int(index)]) for index in chosen]
            for step, chosen in block
            if sources[step] == "written"
        }
        if prompts:
            self._refresh()
        written = self._writer.answer(prompts) if prompts else {}
        self._made = {}
        for step, chosen in block:
            if sources[step] == "written":
                self._made[step] = written[step]
                self._buffer.extend(written[step])
            elif sources[step] == "replayed":
                self._made[step] = self._again(step, len(chosen))
        self._decided = block[-1][0]
        answers = [example for examples in written.values() for example in examples]
        tokens = sum(int(answer.supervised.sum()) for answer in answers)
        spent = time.perf_counter() - started
        self._tell((block[0][0], len(answers), tokens, self._mixture.fraction, spent))

    def _tell(self, facts: Sequence[float]) -> None:
        """Take note of what was written last."""
        self._last = facts
        step, answers, tokens, fraction, spent = facts
        self._record(
            {"step": int(step), "answers": int(answers), "tokens": int(tokens), "fraction": fraction, "s": spent}
        )

    def _again(self, step: int, count: int) -> list[Example]:
        """Draw answers from the buffer, none twice while there are enough."""
        draw = np.random.default_rng([self._seed, AGAIN, step])
        places = draw.choice(len(self._buffer), size=count, replace=count > len(self._buffer))
        return [self._buffer[int(place)] for place in places]

    def state(self, step: int) -> dict[str, Tensor]:
        """Return what the steps after one depend on, as flat tensors."""
        kept = [(one, example) for one, made in self._made.items() if one > step for example in made]
        kept += [(0, example) for example in self._buffer]
        state = {name: torch.tensor(value, dtype=torch.float64) for name, value in self._mixture.state().items()}
        state["decided"] = torch.tensor(self._decided)
        if self._last and self._last[0] > step:  # a run that goes on from here has no line of it
            state["last"] = torch.tensor(self._last, dtype=torch.float64)
        if not kept:
            return state
        draws = [example.draws for _, example in kept if example.draws is not None]
        return {
            **state,
            "steps": torch.tensor([one for one, _ in kept]),
            "lengths": torch.tensor([len(example.tokens) for _, example in kept]),
            "tokens": torch.from_numpy(np.concatenate([example.tokens for _, example in kept])),
            "supervised": torch.from_numpy(np.concatenate([example.supervised for _, example in kept])),
        } | ({"draws": torch.from_numpy(np.concatenate(draws, axis=1))} if draws else {})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state` returned."""
        self._made = {}
        self._buffer.clear()
        self._decided = int(state["decided"])
        if "last" in state:
            self._tell(state["last"].tolist())
        self._mixture.restore({name: float(state[name]) for name in ("fraction", "compared") if name in state})
        if "steps" not in state:
            return
        ends = np.cumsum(state["lengths"].numpy())[:-1]
        tokens, supervised = (np.split(state[name].numpy(), ends) for name in ("tokens", "supervised"))
        draws: list[NDArray[np.float32] | None] = [None] * len(tokens)
        if "draws" in state:
            learnt = np.cumsum([int(one.sum()) for one in supervised])[:-1]
            draws = list(np.split(state["draws"].numpy(), learnt, axis=1))
        parts: list[Any]
        for step, *parts in zip(state["steps"].tolist(), tokens, supervised, draws, strict=True):
            example = Example(*parts)
            if step:
                self._made.setdefault(step, []).append(example)
            else:
                self._buffer.append(example)
