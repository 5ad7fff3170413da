"""Records as HTML, without a server."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from termite.web import render
from termite.web.status import Line, Plot, Record
from tests.web import records

PAGES: list[tuple[str, Callable[[], Record]]] = [
    ("coordinator.html", records.coordinator),
    ("coordinator_worker.html", records.listed),
    ("worker.html", records.worker),
    ("log.html", records.log),
    ("master.html", records.master),
]


class Seen(HTMLParser):
    """Tags and attributes as a browser would find them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "link", "input", "rect", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(template: str, record: Record) -> str:
    return render.page(template, program="p", status=record, here="build.example", path="/", kinds=("restart", "kill"))


@pytest.mark.parametrize(("template", "record"), PAGES)
def test_whatever_a_record_says_stays_text(template: str, record: Callable[[], Record]) -> None:
    seen = Seen(rendered(template, record()))
    assert seen.tags.count("script") == 1  # ours, by its address
    assert ("src", "/static/live.js") in seen.attributes
    assert records.NASTY in seen.text
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name == "style"]
    assert "\n49 " not in seen.text
    assert seen.open == []


@pytest.mark.parametrize(("template", "record"), PAGES)
def test_nothing_comes_from_elsewhere(template: str, record: Callable[[], Record]) -> None:
    seen = Seen(rendered(template, record()))
    loaded = [value or "" for name, value in seen.attributes if name in ("src", "action")]
    assert loaded and all(value.startswith("/") and not value.startswith("//") for value in loaded)


def test_an_error_page_escapes_what_was_asked_for() -> None:
    seen = Seen(render.error_page("master", "Not Found", f"there is no {records.NASTY}"))
    assert records.NASTY in seen.text and seen.tags.count("script") == 1


def test_a_worker_beside_the_coordinator_is_where_the_browser_found_that() -> None:
    def link(host: str, here: str) -> str:
        return render.worker_url(records.listed(host=host), here, "/log")

    assert link("127.0.0.1", "build.example") == "http://build.example:1332/log"
    assert link("10.0.0.7", "build.example") == "http://10.0.0.7:1332/log"
    assert link("fe80::1", "build.example") == "http://[fe80::1]:1332/log"


def test_the_buttons_are_there_only_when_commands_are_taken() -> None:
    status = records.coordinator()
    assert "<button" in rendered("coordinator.html", status)
    without = render.page("coordinator.html", program="p", status=status, here="h", path="/", kinds=())
    assert "<button" not in without and "password" not in without


def test_values_are_short_and_have_units() -> None:
    assert [render.amount(n) for n in (0, 999, 1000, 1234, 99_500, 5e9)] == [
        *("0 B", "999 B", "1.0 kB", "1.2 kB", "100 kB", "5.0 GB"),
    ]
    assert [render.binary(n) for n in (1, 256, 1024, 1 << 26)] == ["1 B", "256 B", "1 KiB", "64 MiB"]
    assert [render.duration(s) for s in (0.02, 1.25, 61, 3700, 90_000)] == [
        *("20 ms", "1.2 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"),
    ]
    assert render.plural(1, "core") == "1 core" and render.plural(2, "core") == "2 cores"


@given(st.lists(st.floats(allow_nan=False), max_size=300), st.floats(0, 1e12))
def test_a_curve_stays_inside_its_drawing(values: list[float], top: float) -> None:
    svg = render.drawing(Plot("p", "", top, [Line("l", values)]))
    for spot in svg.rpartition(' d="M')[2].partition('"')[0].split("L") if values else []:
        x, y = map(float, spot.split())
        assert 0 <= x <= 300 and 0 <= y <= 60
