"""Builds that take turns: only one runs at any moment, and each one's time is its own."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_common import Skipped
from bench_turns import Build, Lane, take_turns

from termite.errors import TermiteError

STEPS = """
import sys, time
with open(sys.argv[1], "a") as log:
    until = time.process_time() + 0.4
    while time.process_time() < until:
        for _ in range(1000): pass
        log.write(f"{time.monotonic_ns()}\\n")
"""


@pytest.fixture
def lanes() -> Iterator[list[Lane]]:
    with contextlib.ExitStack() as stack:
        made: list[Lane] = []
        for name in "ab":
            try:
                made.append(Lane(name))
            except Skipped as reason:
                pytest.skip(str(reason))
            stack.callback(made[-1].close)
        yield made


def steps(log: Path, lane: Lane | None) -> Build:
    """A shell and its child, as make and a compiler."""
    command = ["sh", "-c", '"$@"; true', "sh", sys.executable, "-c", STEPS, str(log)]
    return Build(command, log.parent, os.environ, lane)


def test_only_one_runs_at_any_moment(tmp_path: Path, lanes: list[Lane]) -> None:
    logs = [tmp_path / "a", tmp_path / "b"]
    took = take_turns({log.name: steps(log, lane) for log, lane in zip(logs, lanes, strict=True)}, turn_s=0.05)
    order = sorted((int(line), log.name) for log in logs for line in log.read_text().splitlines())
    names = [name for _, name in order]
    turns = [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]
    assert len(turns) > 4, "they were under way at the same time"
    assert len(turns) < len(order) / 20, "they ran at the same time"
    assert all(seconds >= 0.4 for seconds in took.values())
    span = (order[-1][0] - order[0][0]) / 1e9
    assert sum(took.values()) < span + 4  # but for their starts


def test_what_this_process_starts_belongs_to_a_lane_only_while_it_is_entered(lanes: list[Lane]) -> None:
    home = Path("/proc/self/cgroup").read_text()
    with lanes[1].entered():
        assert Path("/proc/self/cgroup").read_text().rstrip().endswith("-b")
    assert Path("/proc/self/cgroup").read_text() == home


def test_without_lanes_each_runs_to_its_end(tmp_path: Path) -> None:
    logs = [tmp_path / "a", tmp_path / "b"]
    take_turns({log.name: steps(log, None) for log in logs}, turn_s=0.01)
    first, second = sorted([int(line) for line in log.read_text().splitlines()] for log in logs)
    assert first[-1] < second[0]


def test_a_build_that_fails_says_what_it_said(tmp_path: Path, lanes: list[Lane]) -> None:
    failing = Build(["sh", "-c", "echo no such luck; exit 3"], tmp_path, os.environ, lanes[0])
    endless = Build(["sleep", "600"], tmp_path, os.environ, lanes[1])
    with pytest.raises(TermiteError, match="no such luck"):
        take_turns({"endless": endless, "failing": failing}, turn_s=0.01)
    with pytest.raises(TermiteError, match="nowhere"):
        take_turns({"nowhere": Build(["/nowhere"], tmp_path, os.environ, lanes[0])})
