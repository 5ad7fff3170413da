"""Records become HTML.

Every value is escaped by jinja's autoescape; the only markup made here is that of the drawings, from
numbers alone.  Never looks at anything but the record it is given.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from termite import __version__
from termite.web.counting import KEPT
from termite.web.status import ListedWorker, Plot

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_PLOT_HEIGHT = 60


def page(template: str, **values: object) -> str:
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("termite.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    for shown in (amount, binary, number, duration, milliseconds, clock, plural):
        environment.filters[shown.__name__] = shown
    for part in (bar, drawing, latest, top, worker_url):
        environment.globals[part.__name__] = part
    environment.globals["version"] = __version__
    return environment


# -- values for people ----------------------------------------------------------------------------


def amount(size: float) -> str:
    """Bytes: 999 B, 1.2 kB, 34 MB."""
    unit = 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size /= 1000
        unit += 1
    return f"{size:.1f} {_UNITS[unit]}" if unit and size < 9.95 else f"{size:.0f} {_UNITS[unit]}"


def binary(size: int) -> str:
    """Powers of two, exactly: 256 B, 1 KiB, 64 MiB."""
    unit = 0
    while size >= 1024 and size % 1024 == 0:
        size //= 1024
        unit += 1
    return f"{size} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[unit]}"


def number(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def duration(seconds: float) -> str:
    """20 ms, 2.3 s, 4 min 5 s, 3 h 20 min, 5 d 2 h."""
    if seconds < 0.1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, below, below_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // below} {below_name}"
    return f"{whole} s"


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else number(value)


def clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def plural(count: int, one: str, many: str = "") -> str:
    return f"{number(count)} {one if count == 1 else many or one + 's'}"


def _with_unit(value: float, unit: str) -> str:
    if unit == "B/s":
        return f"{amount(value)}/s"
    if unit == "%":
        return f"{value:.0f} %"
    return f"{value:.1f} {unit}".rstrip() if unit and value < 100 else f"{value:.0f} {unit}".rstrip()


# -- drawings -------------------------------------------------------------------------------------


def bar(part: float, whole: float) -> Markup:
    """How much of the whole it is."""
    width = 100 * min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0
    return Markup(
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="all" width="100" height="8"/><rect class="part" width="%.1f" height="8"/></svg>'
    ) % (width,)


def _top(plot: Plot) -> float:
    return plot.top or max((max(line.values, default=0.0) for line in plot.lines), default=0.0) or 1.0


def drawing(plot: Plot) -> Markup:
    """The curves of a plot; the newest value is at the right edge."""
    top = _top(plot)
    curves = Markup("").join(_curve(i, line.values, top) for i, line in enumerate(plot.lines))
    return Markup(
        '<svg class="plot" viewBox="0 0 %d %d" preserveAspectRatio="none" aria-hidden="true">'
        '<path class="grid" d="M0 0.5H%d M0 %d H%d M0 %.1fH%d"/>%s</svg>'
    ) % (KEPT - 1, _PLOT_HEIGHT, KEPT, _PLOT_HEIGHT // 2, KEPT, _PLOT_HEIGHT - 0.5, KEPT, curves)


def _curve(index: int, values: list[float], top: float) -> Markup:
    left = KEPT - len(values)
    spots = [
        f"{left + i} {_PLOT_HEIGHT * (1 - min(1.0, max(0.0, value / top))):.1f}" for i, value in enumerate(values)
    ]
    if not spots:
        return Markup("")
    line = "L".join(spots)
    area = f'<path class="area" d="M{left} {_PLOT_HEIGHT}L{line}V{_PLOT_HEIGHT}Z"/>' if index == 0 else ""
    return Markup(f'{area}<path class="line{index}" d="M{line}"/>')


def latest(plot: Plot) -> list[tuple[str, str]]:
    """(curve, its newest value)"""
    return [(line.name, _with_unit(line.values[-1] if line.values else 0.0, plot.unit)) for line in plot.lines]


def top(plot: Plot) -> str:
    """What the upper edge stands for."""
    return _with_unit(_top(plot), plot.unit)


# -- links ----------------------------------------------------------------------------------------


def worker_url(worker: ListedWorker, here: str, path: str = "/") -> str:
    """A worker's own page.  One beside the coordinator is where the browser (`here`) found the coordinator."""
    host = here if worker.host in ("127.0.0.1", "::1", "localhost") else worker.host
    return f"http://{f'[{host}]' if ':' in host else host}:{worker.web_port}{path}"


def error_page(program: str, title: str, text: str) -> str:
    return page("error.html", program=program, title=title, text=text)


def names(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)
