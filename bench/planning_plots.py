"""The plots of `docs/results.md`: quality over time, and what each method took to the target."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.planning_grid import FLOOR, TASKS, Grid
from bench.planning_tables import Results, interval, plot_name
from muster.testbed import simulated
from shared.files import write_whole

_MINE = {"fedpipe": "tab:red", "legend": "tab:blue"}
"""What the others are compared with."""
_OTHERS = ("tab:green", "tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "black")
_DASHES = ("-", "--", ":")


def write(grid: Grid, results: Results, folder: Path) -> None:
    """A plot for each cell that has runs; the same runs give the same bytes."""
    for task, alpha, _ in grid.cells:
        here = [(run, result) for run, result in results if (run.task, run.alpha) == (task, alpha) and result.rounds]
        if here:
            write_whole(folder / plot_name(task, alpha), draw(here, TASKS[task].target))


def draw(results: Results, target: float) -> bytes:
    """An SVG of runs of one cell: the curves of all seeds, and means to the target with their 95 % intervals."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    found = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "muster", "svg.fonttype": "none"}):
        figure = Figure(figsize=(12, 4.5), layout="constrained")
        FigureCanvasSVG(figure)
        curves, seconds, traffic = figure.subplots(1, 3, width_ratios=(2, 1, 1))
        names = _in_order(results, target)
        looks = _looks(names)
        _draw_curves(curves, results, names, looks, target)
        _draw_means(seconds, results, names, looks, [simulated.time_to(r.rounds, target) for _, r in results])
        seconds.set(title="seconds to the target", xlabel="virtual seconds")
        sizes = [simulated.bytes_to(r.rounds, target) for _, r in results]
        _draw_means(traffic, results, names, looks, [None if size is None else size / 1e6 for size in sizes])
        traffic.set(title="traffic to the target", xlabel="MB, all links", yticklabels=[])
        figure.savefig(found, format="svg", metadata={"Date": None})
    return found.getvalue()


def _in_order(results: Results, target: float) -> list[str]:
    """The methods, the fastest first, the floor and those that never arrived last."""

    def key(name: str) -> tuple[bool, float, str]:
        times = [simulated.time_to(result.rounds, target) for run, result in results if run.method.name == name]
        came = [one for one in times if one is not None]
        return name == FLOOR, fmean(came) if came else float("inf"), name

    return sorted({run.method.name for run, _ in results}, key=key)


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, dash and width of each method's curve."""
    looks: dict[str, dict[str, Any]] = {}
    others = sorted(name for name in names if name not in _MINE)
    for place, name in enumerate(others):
        dash = _DASHES[place // len(_OTHERS) % len(_DASHES)]
        looks[name] = {"color": _OTHERS[place % len(_OTHERS)], "linestyle": dash, "linewidth": 0.9}
    return looks | {name: {"color": color, "linewidth": 2.2, "zorder": 3} for name, color in _MINE.items()}


def _draw_curves(
    axes: Any, results: Results, names: Sequence[str], looks: dict[str, dict[str, Any]], target: float
) -> None:
    for name in names:
        mine = [result for run, result in results if run.method.name == name]
        for place, result in enumerate(mine):
            begun = simulated.first_plan(result.rounds)
            points = [(one.at - begun, q) for one in result.rounds if (q := simulated.quality(one)) is not None]
            at, quality = [p[0] for p in points], [abs(p[1]) for p in points]
            axes.plot(at, quality, label=name if not place else None, **looks[name])
    axes.axhline(abs(target), color="grey", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="virtual seconds since the first plan", title="every seed, until it arrives")
    axes.set_ylabel("accuracy (held out)" if target > 0 else "loss (held out)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)


def _draw_means(
    axes: Any, results: Results, names: Sequence[str], looks: dict[str, dict[str, Any]], values: Sequence[float | None]
) -> None:
    """Means with intervals; a method of which a seed never arrived has none."""
    for place, name in enumerate(names):
        mine = [value for (run, _), value in zip(results, values, strict=True) if run.method.name == name]
        came = [value for value in mine if value is not None]
        if not came or len(came) < len(mine):
            continue
        mean, half = interval(came)
        spread = half if len(came) > 1 else 0.0
        axes.errorbar(mean, place, xerr=spread, color=looks[name]["color"], marker="o", capsize=3)
    axes.set_yticks(range(len(names)), names, fontsize="x-small")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.grid(alpha=0.3, axis="x")
