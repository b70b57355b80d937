"""Where rows come from: the hub or local files, both through the `datasets` library, which only this file imports.

Local files are read one by one, so that a row is known by its file and its place there. The library keeps an Arrow copy
under its cache folder (HF_DATASETS_CACHE) and reads a file again when its modification time changes; rows are memory
mapped from there, so a large set costs disk and not memory. Of a hub data set with `num_rows` the first rows are
streamed into such a copy, and no file behind them is fetched. Importing the library takes seconds: not at the top.
"""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from deltakd.base.errors import DataError
from deltakd.base.hub import FILE_SUFFIXES, could_be_hub_id, refuse_unreachable
from deltakd.data.choosing import columns, first_rows, lets_in, refuse_unknown_columns
from deltakd.data.settings import SourceSettings


@dataclass(frozen=True)
class Rows:
    """The rows of one source, in order: parts of (file or hub id, its `datasets.Dataset`, each row's number there)."""

    parts: tuple[tuple[str, Any, Sequence[int]], ...]

    def __len__(self) -> int:
        return sum(len(dataset) for _, dataset, _ in self.parts)

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield `file:row`, counted from one, and the row."""
        for name, dataset, numbers in self.parts:
            try:
                for number, row in zip(numbers, dataset, strict=True):
                    yield f"{name}:{number}", row
            except UnicodeDecodeError as error:
                raise DataError(f"{name}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from error


def load_rows(source: SourceSettings) -> Rows:
    """Open the rows of a source. Raises DataError in one sentence if there are none to be had."""
    files = local_files(source.path)
    if not files and source.num_rows is not None:
        return _stream_hub(source)
    parts = [(str(file), _load_file(file)) for file in files] if files else [(source.path, _load_hub(source))]
    let_in = [_let_in(source, name, dataset) for name, dataset in parts]
    selected = _select(let_in, source.skip_rows, source.num_rows)
    if not selected:
        raise _none_left(source, sum(len(dataset) for _, dataset in parts), sum(len(part[1]) for part in let_in))
    return Rows(selected)


def identity(source: SourceSettings) -> list[list[Any]]:
    """Return what a cache of this source depends on: every file's path, size and modification time, or the hub's names.

    A hub data set without a `revision` counts as unchanging; pin one where that matters.
    """
    files = local_files(source.path)
    if not files:
        return [[source.path, source.subset, source.split, source.revision]]
    facts = [(file, file.stat()) for file in files]
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in facts]


def local_files(path: str) -> list[Path]:
    """Return the files that a file, folder or pattern stands for, sorted; none where the path can be a hub id."""
    here = Path(path).expanduser()
    if here.is_dir():
        found = sorted(file for file in here.rglob("*") if file.name.endswith(FILE_SUFFIXES) and file.is_file())
    elif here.exists():
        found = [here]
    elif has_magic(path):
        matches = glob(str(here), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        found = sorted(file for file in map(Path, matches) if file.is_file())
    elif could_be_hub_id(path):
        return []
    else:
        raise DataError(f"{path}: does not exist. Write an existing file, folder or pattern, or a hub id.")
    known = [file for file in found if file.name.endswith(FILE_SUFFIXES)]
    if not known or len(known) < len(found):
        other = next((file for file in found if file not in known), None)
        raise DataError(
            f"{path}: {f'cannot read {other.name}' if other else 'no files there'}. "
            f"Write a path to files that end in {', '.join(FILE_SUFFIXES)}."
        )
    return known


def _none_left(source: SourceSettings, num_rows: int, num_let_in: int) -> DataError:
    which, todo = f"{num_rows:,}", "Write a smaller skip_rows"
    if source.chooses:
        which += f", of which where and max_characters let in {num_let_in:,},"
        todo += ", or let in more"
    return DataError(f"{source.path}: no rows left of {which} after skip_rows {source.skip_rows:,}. {todo}.")


def _let_in(source: SourceSettings, name: str, dataset: Any) -> tuple[str, Any, Sequence[int]]:
    """Return the rows of a data set that are let in, with their numbers."""
    if not source.chooses:
        return name, dataset, range(1, len(dataset) + 1)
    refuse_unknown_columns(source, dataset.column_names)
    deciding = dataset.select_columns(columns(source))
    chosen = [index for index, row in enumerate(deciding) if lets_in(source, row)]
    return name, dataset.select(chosen), [index + 1 for index in chosen]


def _select(
    parts: list[tuple[str, Any, Sequence[int]]], skip: int, num_rows: int | None
) -> tuple[tuple[str, Any, Sequence[int]], ...]:
    selected = []
    for name, dataset, numbers in parts:
        begin = min(skip, len(dataset))
        end = len(dataset) if num_rows is None else min(begin + num_rows, len(dataset))
        skip -= begin
        if num_rows is not None:
            num_rows -= end - begin
        if begin < end:
            selected.append((name, dataset.select(range(begin, end)), numbers[begin:end]))
    return tuple(selected)


def _load_file(file: Path) -> Any:
    import datasets

    builder = "parquet" if file.name.endswith(".parquet") else "json"
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{file}: the file is empty. Write rows into it, or another path.")
        with _quiet():
            return datasets.load_dataset(builder, data_files=[str(file)], split="train")
    except (datasets.exceptions.DatasetsError, StopIteration, ValueError, EOFError, OSError) as error:
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):  # both mean a file without rows
            raise DataError(f"{file}: no rows in it. Write rows into it, or another path.") from error
        raise DataError(_explain(file, error)) from error


NUMBER = "deltakd_row_number"  # the column that keeps each streamed row's place


def _stream_hub(source: SourceSettings) -> Rows:
    """Copy the first rows that are let in to the disk, once; nothing behind them is fetched."""
    import datasets

    try:
        with _quiet():
            kept = datasets.Dataset.from_generator(_fetch, gen_kwargs={"source": source.model_dump()})
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from error
        raise DataError(f"{source.path}: {_first_line(error.__cause__ or error)}. Write another split.") from error
    numbers = kept[NUMBER]
    return Rows(((source.path, kept.remove_columns(NUMBER), list(numbers)),))


def _fetch(source: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from huggingface_hub import is_offline_mode

    settings = SourceSettings(**source)
    rows = _load_hub(settings, streaming=not is_offline_mode())  # offline the library's cache may hold it whole
    taken = 0
    for number, row in first_rows(settings, rows):
        taken += 1
        yield {NUMBER: number, **row}
    if not taken:
        raise DataError(
            f"{settings.path}: none of its rows is let in behind skip_rows {settings.skip_rows:,}. "
            "Write a smaller skip_rows, or another where and max_characters."
        )


def _load_hub(source: SourceSettings, streaming: bool = False) -> Any:
    import datasets

    refuse_unreachable("dataset", source.path, source.revision, DataError)
    try:
        return datasets.load_dataset(
            source.path, name=source.subset, split=source.split, revision=source.revision, streaming=streaming
        )
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise DataError(
            f"{source.path}: cannot be loaded with subset {source.subset}, split {source.split} "
            f"({_first_line(error)}). Write a subset and split that it has, or a local path."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's own progress bars and logs; errors come to the user through DataError instead."""
    import datasets

    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _explain(file: Path, error: Exception) -> str:
    """Say what is wrong with a file that the library refuses: the first line that is no JSON object, if any."""
    if not file.name.endswith(".parquet"):
        try:
            fault = _first_bad_line(file)
        except (OSError, EOFError, UnicodeDecodeError) as unreadable:
            return f"{file}: cannot be read ({_first_line(unreadable)}). Write the file anew."
        if fault:
            return f"{file}:{fault}. Correct the line, or leave it out."
    return f"{file}: cannot be read ({_first_line(error.__cause__ or error)}). Write a file of rows in its format."


def _first_bad_line(file: Path) -> str | None:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        if ".jsonl" not in file.name and lines.read(1) == "[":  # one list, over any number of lines
            lines.seek(0)
            try:
                json.load(lines)
            except json.JSONDecodeError as error:
                return f"{error.lineno}: not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
            return None
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                return f"{number}: not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
            if not isinstance(row, dict):
                return f"{number}: {type(row).__name__} where an object with columns belongs"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:150].rstrip(". ")
