"""Lines over a common axis as one page that any browser shows, drawn by plotly, which the page brings along."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

COLUMNS = 2
HEIGHT = 320  # pixels of a panel


@dataclass(frozen=True)
class Line:
    """One line: values over the axis."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Some lines with a title, and levels that do not depend on the axis, dashed."""

    title: str
    lines: Sequence[Line]
    levels: Mapping[str, float] = field(default_factory=dict)


def draw(panels: Sequence[Panel], axis: str = "alpha") -> str:
    """Return a page of all panels, two beside each other; it needs no network."""
    from plotly import graph_objects
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    num_rows = -(-len(panels) // COLUMNS)
    figure: Any = make_subplots(rows=num_rows, cols=COLUMNS, subplot_titles=[panel.title for panel in panels])
    colours: dict[str, str] = {}  # a name has one colour in every panel
    for index, panel in enumerate(panels):
        place = {"row": index // COLUMNS + 1, "col": index % COLUMNS + 1}
        xs = sorted({x for line in panel.lines for x in line.x})
        levels = [Line(label, [xs[0], xs[-1]], [value, value]) for label, value in panel.levels.items()]
        for line in [*panel.lines, *levels]:
            is_new = line.label not in colours
            colour = colours.setdefault(line.label, qualitative.Safe[len(colours) % len(qualitative.Safe)])
            is_level = line in levels
            trace = graph_objects.Scatter(
                x=list(line.x),
                y=list(line.y),
                name=line.label,
                legendgroup=line.label,
                showlegend=is_new,
                mode="lines" if is_level else "lines+markers",
                line={"color": colour, "dash": "dash" if is_level else "solid"},
            )
            figure.add_trace(trace, **place)
        figure.update_xaxes(title_text=axis, **place)
    figure.update_layout(template="plotly_white", height=num_rows * HEIGHT)
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page
