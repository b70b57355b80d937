"""Lines over a common axis as one SVG file that any browser shows.

Written by hand: matplotlib is a dependency of development alone, and a user's command must not want it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 260, 52, 12, 30, 36
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#444444")
COLUMNS = 2


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
    """Return the SVG of all panels, two beside each other."""
    num_rows = -(-len(panels) // COLUMNS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{COLUMNS * WIDTH}" height="{num_rows * HEIGHT}" '
        'font-family="sans-serif" font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for index, panel in enumerate(panels):
        row, column = divmod(index, COLUMNS)
        inside = "".join(_panel(panel, axis))
        parts.append(f'<g transform="translate({column * WIDTH},{row * HEIGHT})">{inside}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, axis: str) -> list[str]:
    xs = [x for line in panel.lines for x in line.x]
    ys = [y for line in panel.lines for y in line.y] + list(panel.levels.values())
    (left, right), (low, high) = _range(xs), _range(ys)
    bottom, end = HEIGHT - BOTTOM, WIDTH - RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (end - LEFT)
        return round(across, 1), round(bottom - (y - low) / (high - low) * (bottom - TOP), 1)

    parts = [f'<text x="{LEFT}" y="16" font-size="12">{escape(panel.title)}</text>']
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{end}" fill="none" stroke="#888"/>')
    for share in (0, 0.5, 1):
        value = low + share * (high - low)
        parts.append(f'<text x="{LEFT - 4}" y="{place(left, value)[1] + 3}" text-anchor="end">{value:.3g}</text>')
    for x in sorted(set(xs)):
        parts.append(f'<text x="{place(x, low)[0]}" y="{bottom + 13}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(LEFT + end) // 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axis)}</text>')
    named = []
    for index, line in enumerate(panel.lines):
        colour = COLOURS[index % len(COLOURS)]
        points = [place(x, y) for x, y in zip(line.x, line.y, strict=True)]
        path = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in points]
        named.append((line.label, colour))
    for index, (label, value) in enumerate(panel.levels.items(), len(panel.lines)):
        colour, y = COLOURS[index % len(COLOURS)], place(left, value)[1]
        parts.append(f'<path d="M{LEFT} {y}H{end}" stroke="{colour}" stroke-dasharray="4 3"/>')
        named.append((label, colour))
    for index, (label, colour) in enumerate(named if len(named) > 1 else ()):
        parts.append(f'<text x="{LEFT + 8}" y="{TOP + 10 + 12 * index}" fill="{colour}">{escape(label)}</text>')
    return parts


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis: a little more than the values, and never nothing."""
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or max(0.5, abs(high) * 0.05)
    return low - pad, high + pad
