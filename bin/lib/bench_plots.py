"""The plots of the page: what is drawn, as plain data with everything placed, from recorded figures alone.

The template (`bench_page.html`) only turns it into SVG.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench_dispatch import Dispatch, percentile
from bench_overhead import FIRST_BUILDS, Overhead, ratio_by_round
from bench_scale import Scale

WIDTH = 720
LABELS = 230  # pixels left of the bars
BAR = 20
HEIGHT = 300
MARGIN = 50
COLOURS = ["#777777", "#1f6fb2", "#c8553d", "#5b8c3a", "#8a5aa8", "#b8860b"]


@dataclass
class Bar:
    label: str
    value: str
    width: float
    y: int
    colour: str


@dataclass
class Bars:
    title: str
    bars: list[Bar]
    height: int
    kind: str = "bars"


@dataclass
class Line:
    label: str
    colour: str
    points: list[tuple[float, float]]  # in pixels
    label_y: int

    def path(self) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass
class Tick:
    at: float
    text: str


@dataclass
class Lines:
    title: str
    x_label: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    kind: str = "lines"


@dataclass
class Series:
    label: str
    points: list[tuple[float, float]] = field(default_factory=list)


def bars(title: str, values: Sequence[tuple[str, float, str]]) -> Bars:
    """Horizontal bars: (label, value, value in words)."""
    top = max((value for _, value, _ in values), default=0.0) or 1.0
    space = WIDTH - LABELS - 110
    made = [
        Bar(label, shown, space * value / top, index * (BAR + 6), COLOURS[index % len(COLOURS)])
        for index, (label, value, shown) in enumerate(values)
    ]
    return Bars(title, made, max(1, len(made)) * (BAR + 6))


def lines(title: str, x_label: str, series: Sequence[Series]) -> Lines:
    """Lines over the same x, both axes from nought."""
    points = [point for one in series for point in one.points]
    right = max((x for x, _ in points), default=0.0) or 1.0
    top = max((y for _, y in points), default=0.0) or 1.0
    across, up = WIDTH - MARGIN - 210, HEIGHT - 2 * MARGIN

    def place(x: float, y: float) -> tuple[float, float]:
        return MARGIN + across * x / right, HEIGHT - MARGIN - up * y / top

    drawn = [
        Line(one.label, COLOURS[index % len(COLOURS)], [place(x, y) for x, y in sorted(one.points)], 40 + 20 * index)
        for index, one in enumerate(series)
    ]
    x_ticks = [Tick(place(x, 0)[0], f"{x:g}") for x in sorted({x for x, _ in points})]
    y_ticks = [Tick(place(0, top * n / 4)[1], f"{top * n / 4:.3g}") for n in range(5)]
    return Lines(title, x_label, drawn, x_ticks, y_ticks)


# ---- one or two per part ---------------------------------------------------------------------------------------


def _bar(label: str, times: Mapping[str, Sequence[float]], kind: str) -> tuple[str, float, str]:
    seconds = statistics.median(times[kind])
    return label, seconds, f"{seconds:.2f} s, {ratio_by_round(times, kind):.2f}"


def overhead_plots(results: Sequence[Overhead]) -> list[Bars]:
    plots = []
    for r in results:
        values = [_bar(kind, r.times, kind) for kind in r.times]
        ratio = r.with_start_s / statistics.median(r.times["plain make"])
        values.append(("termite-make with start-up", r.with_start_s, f"{r.with_start_s:.2f} s, {ratio:.2f}"))
        values += [_bar(f"termite-make, {kind}", r.first, kind) for kind in FIRST_BUILDS]
        plots.append(bars(f"{r.project}: seconds with -j2, and the ratio to plain make", values))
    return plots


def dispatch_plots(results: Sequence[Dispatch]) -> list[Bars | Lines]:
    rates = [(f"{r.system} -j{r.jobs}", r.per_second, f"{r.per_second:.0f}") for r in results if r.system != "plain"]
    latencies = []
    for r in results:
        if r.system != "plain":
            ms = percentile(r.each_s, 0.5) * 1e3
            latencies.append((f"{r.system} -j{r.jobs}", ms, f"{ms:.1f} ms"))
    return [bars("commands that do nothing, per second", rates), bars("latency of one, median", latencies)]


def scale_plots(results: Sequence[Scale]) -> list[Bars | Lines]:
    plots: list[Bars | Lines] = []
    for wanted in sorted({r.wanted_round_trip_s for r in results}):
        for command in dict.fromkeys(r.command for r in results):
            shown = [r for r in results if r.wanted_round_trip_s == wanted and r.command == command]
            title = f"speed-up over the master alone: {command}, round trip {wanted * 1e3:g} ms"
            if len({r.workers for r in shown}) > 1:
                plots.append(_rising(title, shown))
            elif shown:
                values = [(f"ideal, {shown[0].workers} workers", shown[0].ideal(), f"{shown[0].ideal():.2f}")]
                values += [(r.system, r.speed_up(), f"{r.speed_up():.2f}") for r in shown]
                plots.append(bars(title, values))
    return plots


def _rising(title: str, results: Sequence[Scale]) -> Lines:
    series: dict[str, Series] = {"ideal": Series("ideal")}
    for r in results:
        series.setdefault(r.system, Series(r.system)).points.append((r.workers, r.speed_up()))
    series["ideal"].points = sorted({(float(r.workers), r.ideal()) for r in results})
    return lines(title, "workers", list(series.values()))
