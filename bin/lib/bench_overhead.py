"""Whole builds on one machine: plain make, termite, distcc and icecc in turn, in one directory from the same state."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench_common import Skipped, Wrap, environment, farm, here, say, timed
from bench_hosts import Namespace
from bench_peers import Peer, Place, distcc, icecc, install
from projects import CPP_PROJECTS, PROJECTS, Project, copy_tree, reset, unpack

JOBS = 2
ALL_PROJECTS = {**PROJECTS, **CPP_PROJECTS}
FIRST_BUILDS = {"first build": (), "first build, all sent": ("-own-files=false",)}
"""Its flags, on a worker that has seen nothing: it has large files itself, as equal machines do, or nothing at all."""
MOST_FIRST = 3
SETTLE_S = 20.0
"""A worker that has had nothing to do for 15 s puts results on its disk: not while another way builds."""


@dataclass
class Overhead:
    """Wall seconds; `times` by what built: "plain make", "termite-make", "distcc", "icecc", ..."""

    project: str
    times: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, list[float]] = field(default_factory=dict)  # by FIRST_BUILDS, and "plain make" between them
    with_start_s: float = 0.0  # termite-make that starts its own coordinator, worker and master, and ends them


@dataclass(frozen=True)
class _Way:
    """One way to build: the program in place of make, and what it runs in."""

    make: str
    env: Mapping[str, str]
    wrap: Wrap = here

    def build(self, root: Path, project: Project) -> float:
        return timed(self.wrap([self.make, f"-j{JOBS}", *project.make]), root, self.env)[0]


def overhead(name: str, work: Path, rounds: int) -> Overhead:
    """One project; the peers that work here are part of it."""
    project = ALL_PROJECTS[name]
    root, pristine = work / name, work / f"{name}-pristine"
    install(*project.needs)
    say(f"{name}: unpacking and configuring")
    unpack(project, root)  # where it is built: configure notes the path
    copy_tree(root, pristine)
    result = Overhead(name)
    plain, termite = _Way("make", environment()), _Way("termite-make", environment())
    plain.build(root, project)  # warms the page cache
    with contextlib.ExitStack() as stack:
        ways = {"plain make": plain, "termite-make": termite}
        for peer in _peers(work, stack):
            ways.update({setting: _Way("make", env, peer.wrap) for setting, env in peer.settings.items()})
        for _ in range(min(rounds, MOST_FIRST)):
            reset(root, pristine)
            result.first.setdefault("plain make", []).append(plain.build(root, project))
            for kind, flags in FIRST_BUILDS.items():
                reset(root, pristine)
                with farm(root, JOBS, *flags):
                    result.first.setdefault(kind, []).append(termite.build(root, project))
            _tell(name, result.first)
        reset(root, pristine)
        with farm(root, JOBS):
            termite.build(root, project)
            for number in range(rounds):
                for kind in _turned(list(ways), number):
                    reset(root, pristine)
                    took = ways[kind].build(root, project)
                    result.times.setdefault(kind, []).append(took)
                    if kind == "termite-make" and took > SETTLE_S / 2:
                        time.sleep(SETTLE_S)
                _tell(name, result.times)
    reset(root, pristine)
    result.with_start_s = termite.build(root, project)
    for directory in (pristine, root):
        shutil.rmtree(directory)
    return result


def ratio_by_round(times: Mapping[str, Sequence[float]], kind: str) -> float:
    """Of this way to plain make: the median over all rounds, so that a machine that is slow for minutes counts less."""
    return statistics.median(own / plain for own, plain in zip(times[kind], times["plain make"], strict=True))


def _tell(name: str, times: Mapping[str, Sequence[float]]) -> None:
    say(f"{name}: " + ", ".join(f"{kind} {each[-1]:.2f} s" for kind, each in times.items()))


def _turned(kinds: Sequence[str], number: int) -> Sequence[str]:
    """Another order in each round, so that none is always after the same."""
    return kinds if number % 2 == 0 else kinds[::-1]


def _peers(work: Path, stack: contextlib.ExitStack) -> list[Peer]:
    """distcc and icecc with one server each, alone with loopback in a network namespace."""
    peers = []
    for start in (distcc, icecc):
        try:
            namespace = stack.enter_context(contextlib.closing(Namespace()))
            places = [Place("127.0.0.1", namespace.wrap, name) for name in ("client", "server")]
            peers.append(stack.enter_context(start(work, places[0], places[1:], JOBS, JOBS)))
        except Skipped as reason:
            say(f"overhead: without {start.__name__}: {reason}")
    return peers
