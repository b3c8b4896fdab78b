"""Pictures of the curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(curves: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws each kind of curve that was measured into a file.

    Args:
        curves: The curves by name, of all sections.
        folder: Where to.

    Returns:
        The files.
    """
    drawn = []
    for name, plot in (
        ("concurrency", _concurrency),
        ("transfer", _transfer),
        ("batch", _batch),
    ):
        if name in curves:
            figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
            axes = figure.add_subplot()
            plot(axes, curves[name])
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
            path = folder / f"{name}.png"
            figure.savefig(path)
            drawn.append(path)
    return drawn


def _concurrency(axes: Axes, curves: Mapping[str, Any]) -> None:
    for name, levels in curves.items():
        callers = list(levels)
        [line] = axes.loglog(
            callers, [levels[c]["p50"] for c in callers], "o-", label=f"{name}, p50"
        )
        axes.loglog(
            callers,
            [levels[c]["p99"] for c in callers],
            "--",
            color=line.get_color(),
            label=f"{name}, p99",
        )
    axes.set_xlabel("concurrent callers")
    axes.set_ylabel("latency, ms")
    axes.set_xscale("log", base=2)


def _transfer(axes: Axes, curves: Mapping[str, Any]) -> None:
    for name, rates in curves.items():
        mib = [size / 2**20 for size in rates]
        axes.loglog(mib, list(rates.values()), "o-", label=name)
    axes.set_xlabel("size, MiB")
    axes.set_ylabel("GB/s, without the server's work")
    axes.set_xscale("log", base=2)


def _batch(axes: Axes, curves: Mapping[str, Any]) -> None:
    colors: dict[str, str] = {}
    for name, rates in curves.items():
        function, _, way = name.partition(", ")
        color = colors.setdefault(function, f"C{len(colors)}")
        style = "o-" if way == "server" else "--"
        axes.loglog(list(rates), list(rates.values()), style, color=color, label=name)
    axes.set_xlabel("points in one call")
    axes.set_ylabel("points/s")
    axes.set_xscale("log", base=2)
