"""What to change: settings that the same arithmetic says are faster, or that make a run fit at all."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from deltakd.plan.facts import APART, Run
from deltakd.plan.split import Cluster, Split, fastest, splits

_WORTH = 0.03  # of a step
_MOST = 4


@dataclass(frozen=True)
class Change:
    """A setting and what a step would take with it."""

    setting: str
    step_s: float
    note: str = ""


def advise(run: Run, cluster: Cluster, best: Split) -> list[Change]:
    """Return the changes that save most of a step, the best first. None of them changes what is learnt."""
    found = []
    for setting, other, note in _changes(run, cluster):
        split = fastest(splits(other, cluster))
        if split is not None and split.step_s < best.step_s * (1 - _WORTH):
            found.append(Change(_with_split(setting, split, best), split.step_s, note))
    return sorted(found, key=lambda change: change.step_s)[:_MOST]


def would_fit(run: Run, cluster: Cluster) -> Change | None:
    """Return the fastest change under which a run fits that does not, or the fastest pair of changes."""
    # A cache is no way out: the same models must fit to write it.
    first = [change for change in _changes(run, cluster) if not change[0].startswith("references")]
    if found := _fitting(first, cluster):
        return found
    pairs = [
        (f"{setting} {second}", other, note)
        for setting, changed, _ in first
        for second, other, note in _changes(changed, cluster)
        if not second.startswith("references")
    ]
    return _fitting(pairs, cluster)


def _fitting(changes: list[tuple[str, Run, str]], cluster: Cluster) -> Change | None:
    found = []
    for setting, other, note in changes:
        if split := fastest(splits(other, cluster)):
            found.append(Change(_with_split(setting, split, None), split.step_s, note))
    return min(found, key=lambda change: change.step_s, default=None)


def _with_split(setting: str, split: Split, best: Split | None) -> str:
    if split.teachers and (best is None or split.teachers != best.teachers):
        return f"{setting} teachers.per_node={split.teachers}"
    return setting


def _changes(run: Run, cluster: Cluster) -> Iterator[tuple[str, Run, str]]:
    """Yield settings that change memory and time, and not the numbers that are learnt beyond rounding."""
    recipe, train, engine = run.recipe, run.recipe.train, run.recipe.engine
    for given in (True, False):
        if train.gradient_checkpointing is not given:
            yield (
                f"train.gradient_checkpointing={str(given).lower()}",
                _changed(run, train={"gradient_checkpointing": given}),
                "recomputes" if given else "keeps activations",
            )
    for factor in (2.0, 0.5, 0.25):
        tokens = int(train.tokens_per_micro_batch * factor)
        if recipe.data.max_tokens <= tokens <= train.tokens_per_step:
            key = "tokens_per_micro_batch"
            yield f"train.{key}={tokens}", _changed(run, train={key: tokens}), ""
    if engine.name == "deepspeed":
        for stage in (1, 2, 3):
            if stage != engine.zero_stage and (stage == 3 or engine.offload != "all"):
                yield f"engine.zero_stage={stage}", _changed(run, engine={"zero_stage": stage}), ""
    if engine.name != "single":
        for waiting in ("none", "all") if engine.name == "fsdp2" else ("none", "optimizer"):
            if waiting != engine.offload:
                yield f"engine.offload={waiting}", _changed(run, engine={"offload": waiting}), ""
    if run.asks_service:
        if not recipe.rollouts.are_written:
            size = sum(run.payload_bytes(run.payload, 64)) / 64 * run.supervised * train.tokens_per_step * train.steps
            note = f"written once before, {size / 1e9:,.0f} GB on the disk"
            yield "references.from=cache", _changed(run, references={"source": "cache"}), note
        yield from _other_teachers(run, cluster)


def _other_teachers(run: Run, cluster: Cluster) -> Iterator[tuple[str, Run, str]]:
    """Yield other ways to lay frozen models over a node's teachers, where there are several accelerators."""
    teachers, names = run.recipe.teachers, sorted(run.frozen)
    if run.recipe.engine.name == "single":  # all parts of its teacher are on its own device
        return
    for shards in (1, 2, 4, 8) if cluster.per_node > 1 else ():
        if shards != teachers.tensor_parallel and _splittable(run, shards):
            yield f"teachers.tensor_parallel={shards}", _changed(run, teachers={"tensor_parallel": shards}), ""
    if teachers.serves is None and run.payload in APART and 1 < len(names) < cluster.per_node:
        one_each = {"serves": [[name] for name in names], "per_node": len(names), "tensor_parallel": 1}
        setting = f"'teachers.serves=[{', '.join(f'[{name}]' for name in names)}]'"
        setting += " teachers.tensor_parallel=1" if teachers.tensor_parallel > 1 else ""
        yield setting, _changed(run, teachers=one_each), "each model on a teacher of its own"


def _splittable(run: Run, shards: int) -> bool:
    """Tell whether every frozen model could be split over so many processes."""
    if run.recipe.teachers.serves is not None or (shards > 1 and any(one.in_8bit for one in run.frozen.values())):
        return False
    return all(gcd(one.shape.num_heads, one.shape.num_kv_heads) % shards == 0 for one in run.frozen.values())


def _changed(run: Run, **groups: dict[str, Any]) -> Run:
    """Return a run with some settings of its recipe changed."""
    parts = {name: getattr(run.recipe, name).model_copy(update=update) for name, update in groups.items()}
    return replace(run, recipe=run.recipe.model_copy(update=parts))
