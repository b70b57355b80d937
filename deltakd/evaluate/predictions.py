"""Every answer of a model with its scores, as Parquet: `predictions/<label>.parquet`, a row for each prompt and seed.

Any other score can be taken from them later without a model. Rows stand in the order of the seeds, and within a seed in
that of the prompts; what does not depend on the answer (cross_entropy and both KL) is repeated for every seed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltakd.base.errors import RunError
from deltakd.base.files import settle

COLUMNS = {
    "prompt": "string",  # the last user turn
    "reference": "string",  # the last assistant turn
    "answer": "string",
    "seed": "int64",
    "num_tokens": "int64",  # of the answer, without the one that ends its turn
    "ended": "bool",
    "rouge1": "double",
    "rouge2": "double",
    "rougeL": "double",
    "answer_correct": "bool",  # null where the row has no final answer to compare with
    "cross_entropy": "double",
    "kl_to_teacher": "double",  # null where no teacher was named
    "kl_to_target": "double",  # null where it was not asked for
}


def predictions_path(folder: Path, label: str) -> Path:
    """Return where one model's answers lie."""
    return folder / "predictions" / f"{label}.parquet"


def write_predictions(folder: Path, label: str, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write one model's answers, whole or not at all. Raises RunError if they cannot be written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in COLUMNS.items()])
    path = predictions_path(folder, label)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({name: columns[name] for name in COLUMNS}, schema=schema), part)
        settle(part)
        part.replace(path)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}). Free space or rights, and start again."
        ) from error


def read_predictions(folder: Path, label: str) -> list[dict[str, Any]]:
    """Return one model's answers, row by row."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(predictions_path(folder, label)).to_pylist()
    return rows
