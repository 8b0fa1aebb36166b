"""A line chart with error bars as PNG, drawn with Pillow: the tests need no plotting library for it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 960, 600, 70
COLORS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")


def draw_lines(path: Path, title: str, x: list[int], curves: dict[str, tuple[list[float], list[float]]]) -> None:
    """One curve per name, as (values, half intervals) at `x`; evenly spaced, as budgets that double would crowd."""
    low = min(v - h for values, halves in curves.values() for v, h in zip(values, halves))
    high = max(v + h for values, halves in curves.values() for v, h in zip(values, halves))
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    canvas = ImageDraw.Draw(image)
    across = [MARGIN + i * (WIDTH - 3 * MARGIN) / max(1, len(x) - 1) for i in range(len(x))]

    def up(value: float) -> float:
        return HEIGHT - MARGIN - (value - low) / max(high - low, 1e-9) * (HEIGHT - 2 * MARGIN)

    canvas.text((MARGIN, 20), title, fill="black")
    for i, budget in enumerate(x):
        canvas.text((across[i], HEIGHT - MARGIN + 12), str(budget), fill="black", anchor="mt")
    for i in range(6):
        value = low + (high - low) * i / 5
        canvas.line([(MARGIN, up(value)), (across[-1], up(value))], fill="#dddddd")
        canvas.text((MARGIN - 8, up(value)), f"{value:.3f}", fill="black", anchor="rm")
    for number, (name, (values, halves)) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        canvas.line([(a, up(v)) for a, v in zip(across, values)], fill=color, width=3)
        for a, v, h in zip(across, values, halves):
            shifted = a + 3 * (number - len(curves) / 2)
            canvas.line([(shifted, up(v - h)), (shifted, up(v + h))], fill=color)
        canvas.text((across[-1] + 14, MARGIN + 18 * number), name, fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
