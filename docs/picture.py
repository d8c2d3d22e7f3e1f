"""Draw docs/picture.svg, the picture in README.md: model and text, plan search, artifact, engines.

    python docs/picture.py

All text stands in filled boxes, and arrows have a mid grey, so the picture is readable on light and on dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

PICTURE: Final = Path(__file__).parent / "picture.svg"

_WIDTH, _HEIGHT = 1000, 300
_INPUT, _WORK, _RESULT, _ENGINE = "#57606a", "#0a5bc4", "#1a7037", "#8a4600"
_LINE: Final = "#8b949e"
_DESCRIPTION: Final = (
    "A dense model and your text go into calibration. A search chooses a size for each layer, by perplexity and by the speed that "
    "an engine shows. The artifact that it writes is served by vLLM, transformers and ONNX Runtime."
)


def _box(x: int, y: int, width: int, height: int, colour: str, title: str, lines: Sequence[str]) -> str:
    """Return a filled box with a bold title and lines of text, centred."""
    middle = x + width / 2
    top = y + height / 2 - 10 * len(lines) + 5
    text = f'<text x="{middle:g}" y="{top:g}" font-size="16" font-weight="bold">{escape(title)}</text>'
    for number, line in enumerate(lines, 1):
        text += f'<text x="{middle:g}" y="{top + 20 * number:g}" font-size="13">{escape(line)}</text>'
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{colour}"/>{text}'


def _frame(x: int, y: int, width: int, height: int) -> str:
    """Return the outline of what belongs together."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="12" fill="none" stroke="{_LINE}" stroke-width="2.5"/>'


def _arrow(*points: tuple[int, int]) -> str:
    """Return a line through the points, along the axes, that ends in an arrow head."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    back = (x - 9 * dx, y - 9 * dy)
    path = " ".join(f"{px},{py}" for px, py in (*points[:-1], back))
    head = f"{x},{y} {back[0] + 5 * dy},{back[1] + 5 * dx} {back[0] - 5 * dy},{back[1] - 5 * dx}"
    return f'<polyline points="{path}" fill="none" stroke="{_LINE}" stroke-width="2.5"/><polygon points="{head}" fill="{_LINE}"/>'


def picture() -> str:
    """Return the picture as SVG."""
    parts = [
        _box(10, 20, 150, 80, _INPUT, "dense model", ["Hub id, folder, GGUF"]),
        _box(10, 130, 150, 80, _INPUT, "your text", ["file or dataset"]),
        _box(205, 45, 165, 140, _WORK, "calibrate", ["what each layer sees:", "covariances and", "loss gradients"]),
        _box(415, 45, 165, 140, _WORK, "search a plan", ["a size for each layer,", "by perplexity", "and by speed"]),
        _box(625, 45, 165, 140, _RESULT, "artifact", ["safetensors, ONNX,", "proof and report,", "no Python, no pickle"]),
        _frame(832, 10, 164, 208),
        _box(840, 20, 148, 80, _ENGINE, "vLLM", ["and transformers"]),
        _box(840, 130, 148, 80, _ENGINE, "ONNX Runtime", ["CPU"]),
        _box(605, 238, 205, 44, _ENGINE, "measured speed", []),
        _arrow((160, 60), (180, 60), (180, 105), (201, 105)),
        _arrow((160, 170), (180, 170), (180, 125), (201, 125)),
        _arrow((370, 115), (411, 115)),
        _arrow((580, 115), (621, 115)),
        _arrow((790, 115), (828, 115)),
        _arrow((914, 218), (914, 260), (814, 260)),
        _arrow((605, 260), (497, 260), (497, 189)),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
            ' role="img" font-family="system-ui, sans-serif" text-anchor="middle" fill="#ffffff">',
            f"<title>How lrserve works</title><desc>{_DESCRIPTION}</desc>",
            *parts,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
