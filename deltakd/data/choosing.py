"""Which rows of a source are let in, by what their columns hold: before any is counted, tokenised or kept.

Knows no data set's columns: a recipe names them. Reads the named columns alone where the rows are on the disk.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from deltakd.base.errors import DataError
from deltakd.data.settings import SourceSettings


def columns(source: SourceSettings) -> list[str]:
    """Name the columns that decide."""
    return sorted({*(source.where or {}), *(source.max_characters or {})})


def refuse_unknown_columns(source: SourceSettings, known: Iterable[str]) -> None:
    """Raise DataError for a column that the rows do not have."""
    there = list(known)
    for name in columns(source):
        if name not in there:
            key = "where" if name in (source.where or {}) else "max_characters"
            raise DataError(f"{source.path}: {key} names {name}, no column of {', '.join(there)}. Write one of them.")


def lets_in(source: SourceSettings, row: Mapping[str, Any]) -> bool:
    """Tell whether a row is used."""
    if any(row.get(name) not in values for name, values in (source.where or {}).items()):
        return False
    return all(_characters(row.get(name)) <= most for name, most in (source.max_characters or {}).items())


def first_rows(source: SourceSettings, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the rows that are let in, from skip_rows on and num_rows of them, with their number counted from one.

    Reads no row beyond the last that it yields: rows may come over a network.
    """
    chosen, last = 0, None if source.num_rows is None else source.skip_rows + source.num_rows
    for number, row in enumerate(rows, start=1):
        if number == 1:
            refuse_unknown_columns(source, row)
        if not lets_in(source, row):
            continue
        chosen += 1
        if chosen > source.skip_rows:
            yield number, row
        if chosen == last:
            return


def _characters(value: Any) -> int:
    """Count the characters of all texts in a value; of messages these are contents and roles."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(part) for part in value.values())
    return sum(_characters(part) for part in value) if isinstance(value, list) else 0
