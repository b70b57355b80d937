"""The table of `bench methods`: a row per method, means over seeds and prompts, paired differences to the baseline.

Nothing is trained or scored here: it takes the rows that were kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from deltakd.evaluate.compare import TITLES, ModelScores, shown, signed
from deltakd.evaluate.scores import Interval, two_level_difference


@dataclass(frozen=True)
class Measured:
    """One run: its scores, and the seconds that it took.

    `writing_s` is what a student took that writes its own batches, between its steps; with references from a service,
    which is asked ahead, a part of it lies within steps. `wall_s` of a run that was resumed is not known.
    """

    seed: int
    scores: ModelScores
    step_s: float  # the sum over steps
    writing_s: float
    wall_s: float | None  # the whole process, loading included
    commit: str  # of the code that trained it


def summarise(
    methods: Mapping[str, Sequence[Measured]], baseline: str, num_resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return each method's figures by name: means, differences to the baseline with their intervals, seconds, seeds.

    Every method has the same seeds in the same order; its run and the baseline's of one seed are a pair. Raises
    DataError where seeds or prompts do not match.
    """
    return {
        name: {
            **{metric: _mean(runs, metric) for metric in runs[0].scores.rows},
            "difference": {}
            if name == baseline
            else {
                metric: asdict(
                    two_level_difference(
                        [run.scores.rows[metric] for run in runs],
                        [run.scores.rows[metric] for run in methods[baseline]],
                        num_resamples,
                        seed,
                    )
                )
                for metric in runs[0].scores.rows
            },
            "training_s": median(run.step_s + run.writing_s for run in runs),
            "wall_s": _median_of_known([run.wall_s for run in runs]),
            "seeds": {str(run.seed): _of_seed(run) for run in runs},
        }
        for name, runs in methods.items()
    }


def _mean(runs: Sequence[Measured], metric: str) -> float:
    return fmean(run.scores.mean(metric) for run in runs)


def _of_seed(run: Measured) -> dict[str, Any]:
    means = {metric: run.scores.mean(metric) for metric in run.scores.rows}
    facts = {"num_truncated": run.scores.num_truncated, "weights": run.scores.weights, "commit": run.commit}
    seconds = {"step_s": run.step_s, "writing_s": run.writing_s, "wall_s": run.wall_s}
    return means | seconds | facts


def _median_of_known(seconds: Sequence[float | None]) -> float | None:
    known = [one for one in seconds if one is not None]
    return median(known) if known else None


def markdown(summary: Mapping[str, Mapping[str, Any]], frozen: Sequence[ModelScores], baseline: str) -> str:
    """Return one base's table and what its columns mean; `frozen` models, which no method trained, come first."""
    runs = next(iter(summary.values()))
    metrics = [metric for metric in runs if metric not in ("difference", "training_s", "wall_s", "seeds")]
    titles = ["method", *(TITLES.get(metric, metric) for metric in metrics), "training, s", "whole process, s"]
    lines = [titles, ["---"] * len(titles)]
    for model in frozen:
        lines.append([model.label, *(shown(model.mean(metric), metric) for metric in metrics), "-", "-"])
    for name, figures in summary.items():
        differences = {metric: Interval(**interval) for metric, interval in figures["difference"].items()}
        cells = [
            shown(figures[metric], metric)
            + (f" ({signed(differences[metric], metric)})" if metric in differences else "")
            for metric in metrics
        ]
        lines.append([name, *cells, *(_seconds(figures[key]) for key in ("training_s", "wall_s"))])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n{_legend(sorted(runs['seeds'], key=int), baseline)}\n"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _legend(seeds: Sequence[str], baseline: str) -> str:
    over = "prompts and seeds, both resampled; of so few seeds it is too narrow where seeds matter more than prompts"
    if len(seeds) == 1:
        over = "prompts alone: there is one seed, and the interval does not know how far another would be"
    of = f"the seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"
    return (
        f"Means over held-out prompts and {of} of the students' training. ROUGE: F1 x 100, rouge-score "
        "with its stemmer. Cross-entropy: validation loss, nats per token of the held-out references, lower is better; "
        "`kept` likewise, on text outside the fine-tuning data. KL to teacher: KL(teacher, student), nats per token of "
        f"the references. In brackets: mean difference per row and seed to {baseline} with its paired 95% bootstrap "
        f"interval over {over}. Training: the sum of a run's step times, and of the time in which a student wrote its "
        "own batches; whole process: loading and export included; medians over seeds."
    )
