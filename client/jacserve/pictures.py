"""Pictures of sparsity patterns: text blocks for a terminal, or an image file."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from jacserve.functions import Sparsity
from jacserve.sparse import Pattern
from jacserve.tensors import Array

_MOST_COLUMNS, _MOST_LINES = 64, 32
_MOST_PIXELS = 800


class PictureError(ValueError):
    """A picture can't be drawn; the text says why."""


def text_blocks(pattern: Pattern) -> list[str]:
    """Draws a pattern with block characters, each two cells high.

    Args:
        pattern: The pattern. A large one is drawn smaller: a cell is filled where any
            of the entries that it stands for is.

    Returns:
        The lines, at most 32 of at most 64 characters.
    """
    cells = _counts(pattern, 2 * _MOST_LINES, _MOST_COLUMNS) > 0
    if len(cells) % 2:
        cells = np.vstack([cells, np.zeros((1, cells.shape[1]), bool)])
    blocks = np.array([[" ", "▄"], ["▀", "█"]])
    upper, lower = cells[::2].astype(int), cells[1::2].astype(int)
    return ["".join(line) for line in blocks[upper, lower]]


def draw(sparsity: Sparsity, title: str, path: Path) -> None:
    """Draws a pattern into an image file.

    Args:
        sparsity: The pattern, and what it costs.
        title: What it is the pattern of.
        path: The file; its ending says in which format, such as .png.

    Raises:
        PictureError: matplotlib is not installed, or the file can't be written.
    """
    try:
        # Without pyplot, which would look for a display.
        figures: Any = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise PictureError(
            f"{error.name} is missing, which draws pictures. Run: pip install "
            '"jacserve[plot]"'
        ) from error
    pattern = sparsity.pattern
    m, n = pattern.shape
    counts = _counts(pattern, _MOST_PIXELS, _MOST_PIXELS)
    figure = figures.Figure(figsize=(5.2, 5.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(
        counts > 0,
        cmap="Blues",
        vmin=0,
        vmax=1.2,
        interpolation="nearest",
        extent=(-0.5, n - 0.5, m - 0.5, -0.5),
        aspect="equal" if 0.2 < m / max(n, 1) < 5 else "auto",
    )
    axes.set_xlabel("variable j")
    axes.set_ylabel("result i")
    figure.suptitle(title, fontsize=12)
    entries = f"{pattern.nnz:,} of {m * n:,} entries, {sparsity.color_count} colours"
    axes.set_title(entries, fontsize=9, color="0.35")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise PictureError(f"{path} can't be written: {error}") from error


def _counts(pattern: Pattern, most_rows: int, most_columns: int) -> Array:
    """Counts the entries in each cell of a grid of limited size."""
    m, n = pattern.shape
    rows, columns = min(max(m, 1), most_rows), min(max(n, 1), most_columns)
    counts = np.zeros((rows, columns), np.int64)
    down = pattern.rows.astype(np.int64) * rows // max(m, 1)
    across = pattern.columns.astype(np.int64) * columns // max(n, 1)
    np.add.at(counts, (down, across), 1)
    return counts
