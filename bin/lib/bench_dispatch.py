"""What one command costs: commands that do nothing, on a worker; and the same question to distcc and icecc.

Commands per second are make's.  Latency, and the CPU of the wrapper, are those of single processes that a driver
starts, so many at once; it starts them without a shell and does nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench_common import Costs, Skipped, environment, farm, say, timed, wrapped
from bench_hosts import Namespace
from bench_memory import noop_makefile
from bench_peers import Peer, Place, distcc, icecc

from termite.errors import TermiteError

JOBS = (1, 8, 64)


@dataclass
class Lives:
    """Of the processes that a driver started."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    each_s: list[float] = field(default_factory=list)


def drive(command: Sequence[str], directory: Path, env: Mapping[str, str], count: int, at_once: int) -> Lives:
    """Runs a command many times, some at once, "%" in it being a number; TermiteError if one fails."""
    lives = Lives()
    began: dict[int, float] = {}
    before = os.getcwd()
    os.chdir(directory)  # posix_spawn starts everything where we are
    started = time.monotonic()
    failed = 0
    try:
        for number in range(count + at_once):
            if number >= at_once or number >= count:
                if not began:
                    break
                pid, status, usage = os.wait3(0)
                lives.each_s.append(time.monotonic() - began.pop(pid))
                lives.cpu_s += usage.ru_utime + usage.ru_stime
                failed = status or failed
            if number < count and not failed:
                numbered = [word.replace("%", str(number)) for word in command]
                now = time.monotonic()
                began[os.posix_spawnp(command[0], numbered, env)] = now
    finally:
        os.chdir(before)
    lives.wall_s = time.monotonic() - started
    if failed:
        raise TermiteError(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(failed)}")
    return lives


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of all values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@dataclass
class Dispatch:
    """CPU is in milliseconds per command."""

    system: str  # "termite", "distcc", "icecc", "plain"
    jobs: int
    commands: int
    per_second: float
    each_s: list[float]
    cpu_ms: dict[str, float]  # by process; for termite "command" is what the command takes without termite


def dispatch(work: Path, commands: int) -> list[Dispatch]:
    root = work / "dispatch"
    root.mkdir()
    (root / "Makefile").write_text(noop_makefile(commands))
    (root / "empty.c").write_text("")
    env = environment(TERMITE_SOCKET=str(root / ".termite-socket"))
    noop = wrapped("sleep", "0")
    results: list[Dispatch] = []
    with farm(root, 2) as daemons:
        timed(["termite-make", "-j8"], root)
        for jobs in JOBS:
            plain_wall, _ = timed(["make", f"-j{jobs}"], root)
            plain = drive(["sleep", "0"], root, env, commands, jobs)
            wall, _ = timed(["termite-make", f"-j{jobs}"], root)
            costs = Costs(daemons)
            lives = drive(noop, root, env, commands, jobs)
            spent = {"wrapper": lives.cpu_s, **costs.so_far(), "command": plain.cpu_s}
            own = {"command": plain.cpu_s * 1e3 / commands}
            results.append(Dispatch("plain", jobs, commands, commands / plain_wall, plain.each_s, own))
            cpu_ms = {name: s * 1e3 / commands for name, s in spent.items()}
            results.append(Dispatch("termite", jobs, commands, commands / wall, lives.each_s, cpu_ms))
            say(
                f"dispatch -j{jobs}: {commands / wall:.0f} commands/s, p50 {percentile(lives.each_s, 0.5) * 1e3:.1f} ms"
            )
    results += _peers(work, root, commands)
    shutil.rmtree(root)
    return results


def _peers(work: Path, root: Path, commands: int) -> list[Dispatch]:
    """`gcc -c` of an empty file through each of the others that works here."""
    results = []
    for start in (distcc, icecc):
        try:
            with contextlib.ExitStack() as stack:
                namespace = stack.enter_context(contextlib.closing(Namespace()))
                client = Place("127.0.0.1", namespace.wrap, "client")
                server = Place("127.0.0.1", namespace.wrap, "server")
                peer = stack.enter_context(start(work, client, [server], 2, max(JOBS)))
                results += namespace.inside(lambda peer=peer: _through(peer, root, commands))  # type: ignore[misc]
        except Skipped as reason:
            say(f"dispatch: without {start.__name__}: {reason}")
    return results


def _through(peer: Peer, root: Path, commands: int) -> list[Dispatch]:
    results = []
    env = peer.settings[peer.name]
    for jobs in JOBS:
        command = [peer.name, "gcc", "-c", "empty.c", "-o", "%.o"]
        lives = drive(command, root, env, commands, jobs)
        cpu = {"client": lives.cpu_s * 1e3 / commands}
        results.append(Dispatch(peer.name, jobs, commands, commands / lives.wall_s, lives.each_s, cpu))
        say(f"dispatch {peer.name} -j{jobs}: {commands / lives.wall_s:.0f} commands/s")
    return results
