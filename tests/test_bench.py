"""The benchmark's own parts: flags, tables and page from recorded figures, the wire that delays, the driver."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from xml.etree import ElementTree

import bench
import pytest
from bench_client import request
from bench_dispatch import Dispatch, drive, percentile
from bench_floor import Floor
from bench_growth import Growth
from bench_memory import Memory
from bench_overhead import Overhead
from bench_page import PartOfPage, page
from bench_plots import dispatch_plots, overhead_plots, scale_plots
from bench_refresh import Refresh
from bench_report import (
    Table,
    dispatch_table,
    floor_table,
    growth_table,
    memory_table,
    overhead_table,
    refresh_table,
    scale_table,
    show,
)
from bench_scale import Scale
from bench_wire import Wire
from rich.console import Console

from termite.errors import TermiteError
from termite.master.local import Kind, decode_request

TIMES = {
    "plain make": [10.0, 20.0, 9.0],
    "termite-make": [10.5, 20.0, 11.7],
    "distcc": [15.0, 30.0, 13.5],
    "icecc": [10.1, 20.2, 9.0],
}
FIRST = {"plain make": [10.0], "first build": [14.0], "first build, all sent": [15.0]}
OVERHEAD = [Overhead("lua", TIMES, FIRST, with_start_s=16.0)]
CPU = {"wrapper": 0.8, "master": 1.0, "worker": 1.5, "mkbox": 3.0, "command": 1.2}
DISPATCH = [
    Dispatch("plain", 8, 3, 900.0, [0.001] * 3, {"command": 1.2}),
    Dispatch("termite", 8, 3, 250.0, [0.004, 0.005, 0.02], CPU),
    Dispatch("distcc", 8, 3, 30.0, [0.04] * 3, {"client": 20.0}),
]
SCALE = [
    Scale("termite", "fixed CPU", 8, 0.0005, 0.0006, 64, 16.5, 0.5, 5.0, 3.0),
    Scale("termite", "fixed CPU", 8, 0.02, 0.021, 64, 30.0, 0.5, 5.0, 3.0),
    Scale("termite", "fixed CPU", 4, 0.02, 0.021, 32, 30.0, 0.5, 5.0, 3.0),
    Scale("icecc", "compile", 8, 0.02, 0.021, 64, 40.0, 0.5, 9.0, served={"worker1": 64}),
]


FLOOR = [
    Floor("plain", [50.0, 52.0, 90.0], {"command": [45.0, 46.0, 47.0]}),
    Floor("termite", [60.0, 61.0, 62.0], {"wrapper": [0.5, 0.6, 0.7], "mkbox": [48.0, 49.0, 50.0]}),
]


def rows(table: Table) -> list[list[str]]:
    return [[*cells, "" if reach is None else "yes" if reach.reached else "no"] for cells, reach in table.rows]


def test_an_unknown_part_is_one_line_that_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["dispatch", "luna"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "no part luna" in told and "coreutils" in told


def test_a_file_that_cannot_be_written_is_told_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["-json", "/nowhere/at/all.json"]) == 2
    assert "/nowhere/at/all.json" in capsys.readouterr().err


def test_the_help_names_parts_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["-h"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ["-quick", "-json FILE", "-html FILE", "refresh", "memory"])


def test_a_build_is_compared_with_plain_make_of_the_same_round() -> None:
    table = rows(overhead_table(OVERHEAD))
    assert ["lua", "termite-make", "11.70", "1.05", "yes"] in table
    assert ["lua", "distcc", "15.00", "1.50", "yes"] in table
    assert ["lua", "icecc", "10.10", "1.01", "no"] in table
    assert ["lua", "termite-make, first build", "14.00", "1.40", "no"] in table


def test_what_the_command_itself_takes_is_not_mkbox_s() -> None:
    table = rows(dispatch_table(DISPATCH))
    assert ["termite", "8", "CPU, mkbox", "1.80 ms", ""] in table
    assert ["termite", "8", "CPU, wrapper and master", "1.80 ms", "yes"] in table
    assert ["termite", "8", "CPU, worker and mkbox", "3.30 ms", "no"] in table
    assert ["termite", "8", "commands per second", "250", "no"] in table


def test_the_ideal_speed_up_is_the_cores_of_the_workers_over_the_master_s() -> None:
    assert SCALE[0].ideal() == pytest.approx(2.0)
    table = rows(scale_table(SCALE))
    assert [row[-1] for row in table] == ["yes", "no", "", ""]
    assert table[0][6] == "97%"


def test_targets_for_large_projects_hold_for_large_projects_only() -> None:
    slow = Refresh(100_000, 0, [0.5], [0.01], [0.02], [0.001])
    assert [row[-1] for row in rows(refresh_table([slow]))] == ["no", "", "no", ""]
    small = Refresh(1_000, 0, [0.5], [0.01], [0.02], [0.001])
    assert not refresh_table([small]).has_targets()
    held = Memory(100_000, 10, {"the build": {"master": 100.0, "mirror": 160.0}}, {"master": 201.0})
    assert [row[-1] for row in rows(memory_table(held))] == ["yes", "no", "no"]
    grown = [Growth(1_000, 0, 10, 1.0), Growth(1_000, 10_000, 10, 1.5), Growth(100_000, 0, 10, 1.05)]
    assert [row[-1] for row in rows(growth_table(grown))] == ["", "", "yes"]


def test_a_missed_target_stands_out_in_the_table() -> None:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    try:
        show(console, overhead_table(OVERHEAD))
    finally:
        console.file.close()
    shown = console.export_text()
    assert "≤ 1.06" in shown and "NO" in shown


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    parts = [
        PartOfPage("overhead", [overhead_table(OVERHEAD)], overhead_plots(OVERHEAD)),
        PartOfPage("dispatch", [dispatch_table(DISPATCH)], dispatch_plots(DISPATCH)),
        PartOfPage("scale", [scale_table(SCALE)], scale_plots(SCALE)),
    ]
    html = page({"cores": 2}, parts)
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    assert html.count("<svg") == 1 + 2 + 3
    assert not re.search(r"<script|https?://|url\(", html)


def test_every_value_on_the_page_is_escaped() -> None:
    evil = "<b>&\"'"
    named = Overhead(evil, {**TIMES, evil: [1.0, 1.0, 1.0]}, FIRST, 1.0)
    html = page({evil: evil}, [PartOfPage(evil, [overhead_table([named])], overhead_plots([named]))])
    assert "<b>" not in html and "&lt;b&gt;" in html


def packet(destination: str, text: bytes) -> bytes:
    """An IPv4 header with nothing in it but where it goes."""
    return bytes(16) + socket.inet_aton(destination) + text


def test_the_wire_delays_and_keeps_the_order() -> None:
    a, a_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    b, b_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with a, a_end, b, b_end:
        for end in (a_end, b_end, b):
            end.setblocking(False)
        ends = {socket.inet_aton("10.0.0.1"): a_end.fileno(), socket.inet_aton("10.0.0.2"): b_end.fileno()}
        wire = Wire(ends, delay_s=0.05)
        started = time.monotonic()
        texts = [b"one", b"two", b"three"]
        for text in texts:
            a.send(packet("10.0.0.2", text))
        a.send(packet("10.0.0.9", b"to nobody"))
        received: list[bytes] = []
        while len(received) < len(texts):
            wire.carry(0.5)
            try:
                while True:
                    received.append(b.recv(100))
                    assert time.monotonic() - started >= 0.05
            except BlockingIOError:
                pass
        assert received == [packet("10.0.0.2", text) for text in texts]


def test_a_packet_to_a_host_that_is_gone_is_lost() -> None:
    a, a_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    b, b_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with a, a_end, b, b_end:
        a_end.setblocking(False)
        b.close()
        ends = {socket.inet_aton("10.0.0.1"): a_end.fileno(), socket.inet_aton("10.0.0.2"): b_end.fileno()}
        wire = Wire(ends, delay_s=0.0)
        a.send(packet("10.0.0.2", b"x"))
        wire.carry(0.1)
        wire.carry(0.0)


def test_the_driver_runs_each_command_once_and_keeps_its_time(tmp_path: Path) -> None:
    lives = drive(["touch", "f%"], tmp_path, dict(os.environ), count=5, at_once=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"f{n}" for n in range(5)]
    assert len(lives.each_s) == 5 and all(s > 0 for s in lives.each_s)
    assert Path.cwd() != tmp_path


def test_the_driver_names_a_command_that_failed(tmp_path: Path) -> None:
    with pytest.raises(TermiteError, match="false failed with status 1"):
        drive(["false"], tmp_path, dict(os.environ), count=3, at_once=2)


def test_percentiles() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (51.0, 100.0)
    assert percentile([3.0], 0.99) == 3.0


def test_what_the_client_sends_is_a_wrapper_s_request(tmp_path: Path) -> None:
    sent = request(Kind.INSPECT, tmp_path, ["a", "b"])
    decoded = decode_request(sent[8:])
    assert (decoded.kind, decoded.cwd, decoded.argv) == (Kind.INSPECT, os.fsencode(tmp_path), [b"a", b"b"])


def test_the_floor_shows_medians_by_way_and_process() -> None:
    assert rows(floor_table(FLOOR)) == [
        ["plain", "wall", "52.0", ""],
        ["plain", "CPU, command", "46.00", ""],
        ["termite", "wall", "61.0", ""],
        ["termite", "wall, longer than plain", "9.0", ""],
        ["termite", "CPU, wrapper", "0.60", ""],
        ["termite", "CPU, mkbox", "49.00", ""],
    ]
