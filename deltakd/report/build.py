"""The page itself: what was read, laid out by Jinja, with plotly, style and script in it and nothing fetched.

Every text is escaped where it enters the page: by Jinja in markup, and here in the data that the script reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from deltakd.base.machine import commit, timestamp
from deltakd.report import evaluations as methods
from deltakd.report.evaluations import Evaluation, Table
from deltakd.report.examples import MOST_LETTERS, Examples, examples
from deltakd.report.figures import charts, plotly_source
from deltakd.report.find import Found, find
from deltakd.report.gaps import gaps, scored_runs
from deltakd.report.recipes import differences
from deltakd.report.run import Run, read_runs
from deltakd.report.sweeps import Response, responses

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("page.js", "examples.js")
POINTS, FEWEST_POINTS, MOST_POINTS = 40_000, 240, 1000  # of one chart over all runs; of one curve


@dataclass(frozen=True)
class Material:
    """Everything that a report says, before it is laid out."""

    found: Found
    runs: Sequence[Run]
    evaluations: Sequence[Evaluation]
    tables: Sequence[Table]
    responses: Sequence[Response]


def gather(paths: Sequence[str]) -> Material:
    """Read what lies under `paths`. Raises RunError if there is nothing."""
    found = find(paths)
    most = max(FEWEST_POINTS, min(MOST_POINTS, POINTS // max(1, len(found.runs))))
    runs = read_runs([(found.name(path), path) for path in found.runs], most)
    evaluations = [methods.read_evaluation(found.name(path), path) for path in found.evaluations]
    found_responses = [one for path in found.sweeps for one in responses(found.name(path), path)]
    return Material(found, runs, evaluations, methods.tables(evaluations), found_responses)


def page(material: Material, title: str) -> str:
    """Return the page as HTML."""
    runs, tables = material.runs, material.tables
    by_name = {one.name: one for one in material.evaluations}
    shown = [examples(table, by_name, MOST_LETTERS // max(1, len(tables))) for table in tables]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"metric": methods.title, "number": methods.number, "better": methods.better}
    sections = charts(runs, material.responses)
    places = {run.name: index for index, run in enumerate(runs)}
    colours = {key: places[name] for key, name in scored_runs(runs, material.evaluations).items()}
    return environment.get_template("page.html").render(
        title=title,
        made=timestamp(),
        made_by=commit(),
        runs=runs,
        tables=tables,
        evaluations=material.evaluations,
        examples=shown,
        differences=differences(runs),
        gaps=gaps(runs, material.evaluations, tables),
        sections=sections,
        colours=colours,
        plotly=_script(plotly_source()),
        style=(PAGE / "style.css").read_text(),
        script="\n".join((PAGE / name).read_text() for name in SCRIPTS),
        data=_data(runs, colours, sections, shown),
    )


def _data(
    runs: Sequence[Run],
    colours: Mapping[tuple[str, str], int],
    sections: Mapping[str, Sequence[Mapping[str, Any]]],
    shown: Sequence[Examples],
) -> str:
    scored = set(colours.values())
    value = {
        "runs": [{"name": run.name, "steps": run.steps, "scored": index in scored} for index, run in enumerate(runs)],
        "charts": [chart for section in sections.values() for chart in section],
        "examples": [
            {
                "models": [{"label": label, "run": colours.get(key)} for label, key in one.models.items()],
                "rows": one.rows,
                "num_prompts": one.num_prompts,
            }
            for one in shown
        ],
        "titles": {name: methods.title(name) for name in (*methods.SHARES, *methods.TITLES_HERE)},
        "shares": list(methods.SHARES),
    }
    return msgspec.json.encode(value).decode().replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _script(source: str) -> str:
    """Return a script that no browser takes to end before its end."""
    return source.replace("</script", "<\\/script")
