"""An arm of `bench step`: the frozen models are loaded one after the other, each for some micro-batches at a time.

What a process does that has memory for one reference model and no room for a service. Everything else is the training
that a user starts.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from deltakd.base.processes import use_threads
from deltakd.base.ranks import Placement, assign_role
from deltakd.base.rundir import RunDirectory
from deltakd.bench.recorder import Steps
from deltakd.bench.watched import WARM_UP
from deltakd.engine.protocol import device_name
from deltakd.recipe.build import build_frozen, build_parts, frozen_heads, meet
from deltakd.recipe.inputs import Inputs, read_examples, read_inputs
from deltakd.recipe.load import load
from deltakd.teacher.references import B, InProcessReferences, NeverShort, Payloads
from deltakd.train.loop import train

WINDOW = WARM_UP  # micro-batches that one loading serves


class OneByOne(NeverShort):
    """Asks each frozen model of a window's micro-batches before the next is loaded."""

    def __init__(self, inputs: Inputs, device: str) -> None:
        self._inputs, self._device = inputs, device
        self._heads = frozen_heads(inputs, device)

    def ahead(self, batches: Iterable[tuple[B, float] | None]) -> Iterator[tuple[B, Payloads]]:
        left = (one for one in batches if one is not None)
        while window := list(islice(left, WINDOW)):
            payloads: list[Payloads] = [{} for _ in window]
            for name in self._inputs.frozen:
                one = InProcessReferences(build_frozen(self._inputs, self._device, frozenset([name])), self._heads)
                for into, (_, payload) in zip(payloads, one.ahead(window), strict=True):
                    into |= payload
                del one
            for (batch, _), payload in zip(window, payloads, strict=True):
                yield batch, payload


def main(recipe: str, *overrides: str) -> None:
    """Train a recipe so, and leave its steps in the run's directory."""
    use_threads()
    loaded = load(recipe, overrides)
    run, role = RunDirectory(Path(loaded.recipe.directory)), assign_role(Placement(0, 1, 0, 1), 0)
    run.path.mkdir(parents=True)
    inputs = read_inputs(loaded.recipe, loaded.where)
    examples = read_examples(loaded.recipe, inputs.tokenizer, progress=False)
    references = OneByOne(inputs, device_name(0))
    records = Steps()
    train(build_parts(inputs, examples, role, meet(loaded.recipe, role), None, references=references), records)
    for record in records.taken:
        run.append("steps.jsonl", asdict(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
