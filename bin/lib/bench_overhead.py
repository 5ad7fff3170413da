"""Whole builds on one machine: plain make, termite, distcc and icecc, each in a tree of its own from the same state.

All build at the same time, in turns (`bench_turns.py`), so that a machine that is faster now and slower then is so
for all of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from bench_common import Skipped, Wrap, environment, farm, here, say
from bench_hosts import Namespace
from bench_peers import Place, distcc, icecc, install
from bench_turns import Build, Lane, take_turns
from projects import CPP_PROJECTS, PROJECTS, Project, copy_tree, reset, unpack

JOBS = 2
ALL_PROJECTS = {**PROJECTS, **CPP_PROJECTS}
FIRST_BUILDS = {"first build": (), "first build, all sent": ("-own-files=false",)}
"""Its flags, on a worker that has seen nothing: it has large files itself, as equal machines do, or nothing at all."""
MOST_FIRST = 3
PEERS = {"distcc": distcc, "icecc": icecc, "icecc, ICECC_REMOTE_CPP=0": icecc}
"""By the name of the setting that is measured."""
SETTLE_S = 20.0
"""A worker that has had nothing to do for 15 s puts results on its disk: not while it builds again."""


T = TypeVar("T")


@dataclass
class Overhead:
    """Wall seconds; `times` by what built: "plain make", "termite-make", "distcc", "icecc", ..."""

    project: str
    times: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, list[float]] = field(default_factory=dict)  # by FIRST_BUILDS, and "plain make" between them
    with_start_s: float = 0.0  # termite-make that starts its own coordinator, worker and master, and ends them


@dataclass
class _Way:
    """One way to build, in its own tree and lane."""

    project: Project
    root: Path
    pristine: Path
    lane: Lane | None
    make: str = "make"
    env: Mapping[str, str] = field(default_factory=environment)
    wrap: Wrap = here

    def build(self) -> Build:
        return Build(self.wrap([self.make, f"-j{JOBS}", *self.project.make]), self.root, self.env, self.lane)

    def wake(self) -> None:
        if self.lane is not None:
            self.lane.thaw()

    @contextlib.contextmanager
    def with_daemons(self, daemons: contextlib.AbstractContextManager[T]) -> Iterator[T]:
        """They run, and stand still, with the builds of this way."""
        with contextlib.ExitStack() as stack:
            with self.lane.entered() if self.lane is not None else contextlib.nullcontext():
                started = stack.enter_context(daemons)
            stack.callback(self.wake)  # so that they can be told to end
            yield started


def overhead(name: str, work: Path, rounds: int) -> Overhead:
    """One project; the peers that work here are part of it."""
    project = ALL_PROJECTS[name]
    install(*project.needs)
    result = Overhead(name)
    with contextlib.ExitStack() as stack:
        ways = _ways(project, work, stack)
        plain, termite, *others = ways
        for _ in range(min(rounds, MOST_FIRST)):
            _first_builds(ways, result)
        measured = {"plain make": plain, "termite-make": termite}
        with contextlib.ExitStack() as daemons:
            termite.make = "termite-make"
            daemons.enter_context(termite.with_daemons(farm(termite.root, JOBS)))
            for kind, way in zip(PEERS, others, strict=True):
                if _join(way, kind, daemons):
                    measured[kind] = way
            _round({"termite-make": termite})
            for number in range(rounds):
                if number and result.times["termite-make"][-1] > SETTLE_S / 2:
                    termite.wake()
                    time.sleep(SETTLE_S)
                for kind, took in _round(measured).items():
                    result.times.setdefault(kind, []).append(took)
                _tell(name, result.times)
        result.with_start_s = _round({"with start-up": termite})["with start-up"]
    return result


def _ways(project: Project, work: Path, stack: contextlib.ExitStack) -> list[_Way]:
    """In directories of their own, several at a time: configure uses one processor.  The first fetches the sources."""
    first, *others = [work / str(number) for number in range(2 + len(PEERS))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [_way(project, first, stack), *pool.map(lambda directory: _way(project, directory, stack), others)]


def _way(project: Project, directory: Path, stack: contextlib.ExitStack) -> _Way:
    """Unpacked and configured where it is built, for configure notes the path; plain make until told otherwise."""
    say(f"{project.package}: unpacking and configuring, {directory.name}")
    lane = None
    try:
        lane = Lane(directory.name)
        stack.callback(lane.close)
    except Skipped as reason:
        say(f"overhead: one build after the other: {reason}")
    directory.mkdir()
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    way = _Way(project, directory / "tree", directory / "pristine", lane)
    unpack(project, way.root)
    copy_tree(way.root, way.pristine)
    return way


def _first_builds(ways: Sequence[_Way], result: Overhead) -> None:
    """Each on a worker of its own that has seen nothing, beside a plain build."""
    plain, *others = ways
    building = {"plain make": plain}
    with contextlib.ExitStack() as farms:
        for (kind, flags), way in zip(FIRST_BUILDS.items(), others, strict=False):
            farms.enter_context(way.with_daemons(farm(way.root, JOBS, *flags)))
            building[kind] = replace(way, make="termite-make")
        for kind, took in _round(building).items():
            result.first.setdefault(kind, []).append(took)
    _tell(result.project, result.first)


def _join(way: _Way, kind: str, stack: contextlib.ExitStack) -> bool:
    """Has it build with a peer: one server, alone with loopback in a network namespace; False if that does not work."""
    try:
        namespace = stack.enter_context(contextlib.closing(Namespace()))
        places = [Place("127.0.0.1", namespace.wrap, name) for name in ("client", "server")]
        start = PEERS[kind]
        peer = stack.enter_context(way.with_daemons(start(way.root.parent, places[0], places[1:], JOBS, JOBS)))
    except Skipped as reason:
        say(f"overhead: without {kind}: {reason}")
        return False
    way.env, way.wrap = peer.settings[kind], peer.wrap
    return True


def _round(ways: Mapping[str, _Way]) -> dict[str, float]:
    """Wall seconds of one build of each."""
    for way in ways.values():
        way.wake()  # a master may serve the tree
        reset(way.root, way.pristine)
    for way in ways.values():
        if way.lane is not None:
            way.lane.freeze()
    return take_turns({kind: way.build() for kind, way in ways.items()})


def ratio_by_round(times: Mapping[str, Sequence[float]], kind: str) -> float:
    """Of this way to plain make: the median over all rounds, so that a machine that is slow for minutes counts less."""
    return statistics.median(own / plain for own, plain in zip(times[kind], times["plain make"], strict=True))


def _tell(name: str, times: Mapping[str, Sequence[float]]) -> None:
    say(f"{name}: " + ", ".join(f"{kind} {each[-1]:.2f} s" for kind, each in times.items()))
