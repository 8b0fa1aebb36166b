"""Charts as inline SVG: readable without color (dashes, patterns), with a name and a description for screen readers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 720, 320, 56, 36, 52, 16
COLORS = ("#0b5394", "#b45f06", "#38761d")  # each 4.5:1 or more on white
DASHES = ("", "6 4", "2 3")
_NUMBERS = itertools.count()


class Curve(NamedTuple):
    """Values at successive x, with a band from low to high; None leaves a gap."""

    name: str
    values: Sequence[float | None]
    low: Sequence[float | None]
    high: Sequence[float | None]


def curves(title: str, text: str, x: Sequence[object], series: Sequence[Curve], x_label: str) -> str:
    """Lines with bands over evenly spaced x; y from 0 to 1. `text` describes the chart to who cannot see it."""
    step = _inner_width() / max(1, len(x) - 1)
    parts = [_axes(0, 1, 5), _x_labels([(LEFT + i * step, str(label)) for i, label in enumerate(x)], x_label)]
    for number, curve in enumerate(series):
        color, dash = COLORS[number % len(COLORS)], DASHES[number % len(DASHES)]
        there = [
            (LEFT + i * step, _y(v, 1), _y(lo or 0, 1), _y(hi or 0, 1))
            for i, (v, lo, hi) in enumerate(zip(curve.values, curve.low, curve.high))
            if v is not None
        ]
        band = [(px, high) for px, _, _, high in there] + [(px, low) for px, _, low, _ in reversed(there)]
        parts.append(f'<polygon points="{_points(band)}" fill="{color}" fill-opacity="0.15"/>')
        line = _points([(px, py) for px, py, _, _ in there])
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2.5" stroke-dasharray="{dash}"/>'
        )
    return _svg(title, text, [*parts, _legend([curve.name for curve in series])])


def histogram(
    title: str, text: str, edges: Sequence[float], series: Sequence[tuple[str, Sequence[int]]], mark: float | None
) -> str:
    """Counts between successive `edges` as steps, each series filled in part; `mark` is a vertical line."""
    top = max([1, *(count for _, counts in series for count in counts)])
    scale = _inner_width() / (edges[-1] - edges[0])

    def across(value: float) -> float:
        return LEFT + (value - edges[0]) * scale

    ticks = [(across(edge), f"{edge:.2f}") for edge in edges[:: max(1, len(edges) // 10)]]
    parts = [_axes(0, top, 4), _x_labels(ticks, "cosine similarity to the main image")]
    for number, (_, counts) in enumerate(series):
        color, dash = COLORS[number % len(COLORS)], DASHES[number % len(DASHES)]
        corners = [(across(edges[0]), _y(0, top))]
        for left, right, count in zip(edges, edges[1:], counts):
            corners += [(across(left), _y(count, top)), (across(right), _y(count, top))]
        corners.append((across(edges[-1]), _y(0, top)))
        parts.append(
            f'<polygon points="{_points(corners)}" fill="{color}" fill-opacity="0.2" stroke="{color}" '
            f'stroke-width="2" stroke-dasharray="{dash}"/>'
        )
    if mark is not None:
        x, bottom = across(mark), HEIGHT - BOTTOM
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#111" stroke-width="1.5"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="{TOP + 12}">{mark:.3f}</text>')
    return _svg(title, text, [*parts, _legend([name for name, _ in series])])


def _svg(title: str, text: str, parts: Sequence[str]) -> str:
    number = next(_NUMBERS)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="chart{number}t chart{number}d">'
        f'<title id="chart{number}t">{escape(title)}</title><desc id="chart{number}d">{escape(text)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def _axes(low: float, high: float, n_ticks: int) -> str:
    parts = []
    for i in range(n_ticks + 1):
        value = low + (high - low) * i / n_ticks
        y = _y(value, high)
        label = f"{value:.1f}" if high <= 1 else f"{value:,.0f}"
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ccc"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    return "".join(parts)


def _x_labels(labels: Sequence[tuple[float, str]], name: str) -> str:
    thinned = labels[:: max(1, len(labels) // 20)]
    texts = [
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(label)}</text>'
        for x, label in thinned
    ]
    middle = LEFT + _inner_width() / 2
    return "".join(texts) + f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(name)}</text>'


def _legend(names: Sequence[str]) -> str:
    parts = []
    for number, name in enumerate(names):
        x, color, dash = LEFT + number * 220, COLORS[number % len(COLORS)], DASHES[number % len(DASHES)]
        parts.append(
            f'<line x1="{x}" y1="14" x2="{x + 32}" y2="14" stroke="{color}" stroke-width="3" '
            f'stroke-dasharray="{dash}"/><text x="{x + 40}" y="18">{escape(name)}</text>'
        )
    return "".join(parts)


def _inner_width() -> int:
    return WIDTH - LEFT - RIGHT


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP)


def _points(corners: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
