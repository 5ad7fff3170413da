"""Whole builds on one machine: plain make, termite, distcc and icecc in turn, in one directory from the same state."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench_common import Skipped, Wrap, environment, farm, here, say, timed
from bench_hosts import Namespace
from bench_peers import Peer, Place, distcc, icecc, install
from projects import CPP_PROJECTS, PROJECTS, Project, copy_tree, reset, unpack

JOBS = 2
ALL_PROJECTS = {**PROJECTS, **CPP_PROJECTS}


@dataclass
class Overhead:
    """Wall seconds; `times` by what built: "plain make", "termite-make", "distcc", "icecc", ..."""

    project: str
    times: dict[str, list[float]] = field(default_factory=dict)
    first_s: float = 0.0  # termite-make on a worker that has seen nothing; large files it has itself, as equal machines
    first_sent_s: float = 0.0  # the same on one that has nothing itself, either
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
    reset(root, pristine)
    with contextlib.ExitStack() as stack:
        ways = {"plain make": plain, "termite-make": termite}
        for peer in _peers(work, stack):
            ways.update({setting: _Way("make", env, peer.wrap) for setting, env in peer.settings.items()})
        with farm(root, JOBS, "-own-files=false"):
            result.first_sent_s = termite.build(root, project)
        reset(root, pristine)
        with farm(root, JOBS):
            result.first_s = termite.build(root, project)
            for number in range(rounds):
                for kind in _turned(list(ways), number):
                    reset(root, pristine)
                    result.times.setdefault(kind, []).append(ways[kind].build(root, project))
                say(f"{name}: " + ", ".join(f"{kind} {times[-1]:.2f} s" for kind, times in result.times.items()))
    reset(root, pristine)
    result.with_start_s = termite.build(root, project)
    for directory in (pristine, root):
        shutil.rmtree(directory)
    return result


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
