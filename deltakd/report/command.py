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

    material = gather(options.paths)
    title = options.title or material.found.root.name or "runs"
    texts = {options.out: lambda: page(material, title)}
    if options.markdown:
        texts[options.markdown] = lambda: markdown(material.tables)
    if options.csv:
        texts[options.csv] = lambda: comma_separated(material.tables)
    for path, text in texts.items():
        try:
            write_text(path, text(), lasting=False)
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror}). Write -o with a place that can.") from error
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB" if path == options.out else f"{path}: written")
