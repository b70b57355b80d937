"""The card of an exported model, README.md in the hub's format: what it is, of which data and recipe, and its scores.

Written when a run ends, and again when `evaluate` or a pipeline's stage has scored its model; a sweep leaves it alone.
huggingface_hub writes the front matter.
"""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from deltakd.base.files import write_text
from deltakd.base.hub import could_be_hub_id
from deltakd.base.rundir import RunDirectory

CARD = "README.md"
FACTS = ("protocol", "rows", "num_prompts", "commit", "started")  # of an evaluation
Scores = Mapping[str, Any]  # of one model, as results.json has them, with `facts` of the evaluation


def write_card(run: RunDirectory, scores: Scores | None = None) -> None:
    """Write a finished run's card beside its exported weights, with scores where there are some."""
    recipe: dict[str, Any] = yaml.safe_load((run.path / "recipe.yaml").read_text())
    facts: dict[str, Any] = json.loads((run.path / "run.json").read_text())
    write_text(run.export / CARD, f"---\n{_front(run, recipe, scores)}\n---\n\n{_body(run, recipe, facts, scores)}")


def card_scores(run: RunDirectory, results: Mapping[str, Any], label: str) -> None:
    """Write a run's card anew with what an evaluation says of its model."""
    write_card(run, {**results["models"][label], "facts": {name: results[name] for name in FACTS}})


def _front(run: RunDirectory, recipe: Mapping[str, Any], scores: Scores | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    weights = [model["weights"] for model in _models(recipe).values()]
    rows = recipe["data"]["train"]["path"]
    found = []
    for name in ("rouge1", "rouge2", "rougeL", "answer"):
        if scores is not None and (value := scores.get(name)) is not None:
            dataset = scores["facts"]["rows"]  # which need not be those of the run's own recipe
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset,
                    dataset_name=dataset,
                    metric_type="accuracy" if name == "answer" else "rouge",
                    metric_name=name,
                    metric_value=round(value, 4),
                )
            )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["deltakd", "knowledge-distillation"],
        base_model=[one for one in weights if could_be_hub_id(one)] or None,
        datasets=[rows] if could_be_hub_id(rows) else None,
        model_name=f"{run.path.parent.name}-{run.path.name}",
        eval_results=found or None,
    )
    text: str = data.to_yaml()
    return text


def _models(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    named = {name: recipe["models"].get(name) for name in ("student", "teacher", "teacher_raw")}
    return {name: model for name, model in named.items() if model is not None}


def _body(run: RunDirectory, recipe: Mapping[str, Any], facts: Mapping[str, Any], scores: Scores | None) -> str:
    objective, train, counts = recipe["objective"], recipe["train"], facts.get("data", {})
    learnt = f"target `{objective['target']['name']}`, divergence `{objective['divergence']['name']}`"
    if objective["sft_weight"] == 1:
        learnt = "cross-entropy on the rows alone"
    models = "\n".join(f"- {name}: `{model['weights']}`" for name, model in _models(recipe).items())
    rows, rate = recipe["data"]["train"]["path"], train["learning_rate"]
    text = f"""# {run.path.parent.name}-{run.path.name}

A student that deltakd has trained: {learnt}.

{models}
- rows: `{rows}`, {counts.get("rows", 0):,} of them, {counts.get("supervised_tokens", 0):,} supervised tokens
- {train["steps"]:,} steps of {train["tokens_per_step"]:,} tokens, learning rate {rate:g}, seed {recipe["seed"]}
- code at {facts.get("commit")}, {facts.get("machine")}, begun {facts.get("started")}

## Scores

{_table(scores)}
## Recipe

`python -m deltakd train recipe.yaml`, with this as recipe.yaml:

```yaml
{yaml.safe_dump(recipe, sort_keys=False).strip()}
```
"""
    return text


def _table(scores: Scores | None) -> str:
    if scores is None:
        return "Not measured yet.\n"
    facts, intervals = scores["facts"], scores.get("intervals", {})
    lines = ["| metric | mean | 95% interval |", "|---|---|---|"]
    for name, found in intervals.items():
        lines.append(f"| {name} | {found['mean']:.4f} | {found['low']:.4f} to {found['high']:.4f} |")
    what = f"Protocol {facts['protocol']}, {facts['num_prompts']:,} prompts of `{facts['rows']}`, {facts['started']}, "
    what += f"code at {facts['commit']}."
    return "\n".join([*lines, "", f"{what} ROUGE lies between 0 and 1."]) + "\n"
