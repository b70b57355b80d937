"""The `report` verb: its options, and what it writes. Plotly and Jinja wait until there is a page to make."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_report(verbs: Any, example: Mapping[str, Any]) -> None:
    """Add `report` to the command line; its help ends with `example`."""
    text = "write one page about runs and evaluations: table, curves, time, examples, recipes, what was not measured"
    command = verbs.add_parser("report", help=text, description=text[0].upper() + text[1:] + ".", **example)
    command.add_argument(
        "paths", nargs="+", metavar="RUNS", help="run directories, evaluations, or folders that hold some"
    )
    command.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="default: report.html")
    command.add_argument("--title", help="what the page is called; default: the folder's name")
    command.add_argument("--markdown", type=Path, metavar="FILE", help="write the table of methods, for a README")
    command.add_argument("--csv", type=Path, metavar="FILE", help="write every metric of every model")


def run_report(options: argparse.Namespace) -> None:
    """Write what the options ask for. Raises RunError if there is nothing to report or no place to write it."""
    from deltakd.base.errors import RunError
    from deltakd.base.files import write_text
    from deltakd.report.build import gather, page
    from deltakd.report.writing import comma_separated, markdown

    places = _places(options)
    material = gather(options.paths)
    whole = Path(options.paths[0]).resolve() if len(options.paths) == 1 else material.found.root
    title = options.title or whole.name or "runs"
    texts = {
        "-o": lambda: page(material, title),
        "--markdown": lambda: markdown(material.tables),
        "--csv": lambda: comma_separated(material.tables),
    }
    for option, path in places.items():
        try:
            write_text(path, texts[option](), lasting=False)
        except OSError as error:
            raise RunError(
                f"{path}: cannot be written ({error.strerror}). Write {option} with a place that can."
            ) from error
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB" if option == "-o" else f"{path}: written")


def _places(options: argparse.Namespace) -> dict[str, Path]:
    """Return by option where each text goes. Raises RunError for a folder, or for one place of two."""
    from deltakd.base.errors import RunError

    given = {"-o": options.out, "--markdown": options.markdown, "--csv": options.csv}
    places = {option: path for option, path in given.items() if path is not None}
    taken = dict[Path, str]()
    for option, path in places.items():
        if path.is_dir():
            raise RunError(f"{option}: {path} is a folder. Write the name of a file.")
        other = taken.setdefault(path.resolve(), option)
        if other != option:
            raise RunError(f"{option}: {path} is where {other} goes. Write another file.")
    return places
