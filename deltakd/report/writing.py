"""The table of methods outside the page: Markdown for a README, CSV for anything else."""

import csv
import io
from collections.abc import Sequence

from deltakd.evaluate.compare import signed
from deltakd.report.evaluations import Cell, Table, number, title

COLUMNS = ("mean", "low", "high", "difference", "difference_low", "difference_high")


def markdown(tables: Sequence[Table]) -> str:
    """Return every table; in bold a difference whose interval does not hold 0."""
    return "\n".join(_markdown(table) for table in tables)


def _markdown(table: Table) -> str:
    titles = ["model", *(title(metric) for metric in table.metrics)]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * len(table.metrics)]
    for row in table.rows:
        cells = [_cell(row.cells.get(metric), metric) for metric in table.metrics]
        lines.append("| " + " | ".join([row.label.replace("|", "\\|"), *cells]) + " |")
    prompts = f"Protocol {', '.join(table.protocols)}. " if table.protocols else ""
    prompts += f"{table.num_prompts} held-out prompts. " if table.num_prompts else ""
    lines += [
        "",
        f"{prompts}ROUGE: F1 x 100, more is better, as of what is in %. Cross-entropy, KL and `kept`: nats per token, "
        f"less is better. In brackets: mean difference per row to {table.against} with its paired 95% bootstrap "
        "interval, bold where it does not hold 0.",
    ]
    return "\n".join(lines) + "\n"


def _cell(cell: Cell | None, metric: str) -> str:
    if cell is None:
        return ""
    if cell.difference is None:
        return number(cell.mean, metric)
    difference = f"({signed(cell.difference, metric)})"
    return f"{number(cell.mean, metric)} {f'**{difference}**' if cell.difference.excludes_zero else difference}"


def comma_separated(tables: Sequence[Table]) -> str:
    """Return a line per model with every metric's mean, interval and difference, as the evaluation has them."""
    metrics = list(dict.fromkeys(metric for table in tables for metric in table.metrics))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [f"{metric} {column}" for metric in metrics for column in COLUMNS]
    writer.writerow(["evaluation", "baseline", "model", "weights", "identity", "truncated", *names])
    for table in tables:
        for row in table.rows:
            values = [value for metric in metrics for value in _values(row.cells.get(metric))]
            facts = [row.evaluation, table.baseline, row.label, row.weights, row.identity, row.num_truncated]
            writer.writerow([*facts, *values])
    return out.getvalue()


def _values(cell: Cell | None) -> list[float | None]:
    if cell is None:
        return [None] * len(COLUMNS)
    taken = cell.difference
    return [cell.mean, cell.low, cell.high, *((taken.mean, taken.low, taken.high) if taken else (None, None, None))]
