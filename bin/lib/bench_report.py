"""The tables: what was measured, what is to be reached, and whether it was.

Everything here works on recorded figures alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench_dispatch import Dispatch, percentile
from bench_floor import Floor
from bench_growth import Growth
from bench_memory import Memory
from bench_overhead import FIRST_BUILDS, Overhead, ratio_by_round
from bench_refresh import Refresh
from bench_scale import MASTER_CORES, WORKER_CORES, Scale
from rich.console import Console
from rich.table import Table as RichTable

WARM = {"coreutils": 1.12, "make": 1.08, "lua": 1.06, "re2": 1.02, "fmt": 1.02}
FIRST = {"coreutils": 1.25, "make": 1.35, "lua": 1.3, "re2": 1.06}
WRAPPER_AND_MASTER_MS = 2.0
WORKER_AND_MKBOX_MS = 3.0
PER_SECOND = 300.0  # at -j8
LATENCY_MS = (5.0, 15.0)  # p50, p99
EFFICIENCY = {0.0005: 0.9, 0.02: 0.7}  # by round trip, at 8 workers
EFFICIENCY_WORKERS = 8
GROWTH_RATIO = 1.1
REFRESH_S = 0.3
BLOCK_MS = 5.0
MASTER_MB, MIRROR_MB = 200.0, 150.0
FULL_SIZE = 100_000
"""Targets for large projects hold for this many files."""


@dataclass(frozen=True)
class Reach:
    """What is to be reached, in words, and whether it was."""

    wanted: str
    reached: bool


def at_most(value: float, limit: float, unit: str = "") -> Reach:
    return Reach(f"≤ {limit:g}{unit}", value <= limit)


def at_least(value: float, limit: float, unit: str = "") -> Reach:
    return Reach(f"≥ {limit:g}{unit}", value >= limit)


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[tuple[list[str], Reach | None]] = field(default_factory=list)
    note: str = ""

    def add(self, *cells: str, reach: Reach | None = None) -> None:
        assert len(cells) == len(self.columns), cells
        self.rows.append((list(cells), reach))

    def has_targets(self) -> bool:
        return any(reach for _, reach in self.rows)


def show(console: Console, table: Table) -> None:
    targets = ["reach", "reached"] if table.has_targets() else []
    drawn = RichTable(*table.columns, *targets, title=table.title, caption=table.note or None)
    for cells, reach in table.rows:
        ends = [reach.wanted, "yes" if reach.reached else "NO"] if reach else [""] * len(targets)
        drawn.add_row(*cells, *(ends if targets else []))
    console.print(drawn)


# ---- one table per part ----------------------------------------------------------------------------------------


def overhead_table(results: Sequence[Overhead]) -> Table:
    table = Table(
        "builds with -j2 on one machine, medians",
        ["project", "build", "seconds", "ratio"],
        note="ratio: the median of those to the plain build of the same round; termite-make with its refresh; "
        "first build: on an empty worker; start-up: its own daemons, and their end",
    )
    for r in results:
        own = ratio_by_round(r.times, "termite-make")
        for kind, times in r.times.items():
            reach = None
            ratio = ratio_by_round(r.times, kind)
            if kind == "termite-make" and r.project in WARM:
                reach = at_most(own, WARM[r.project])
            elif kind not in ("plain make", "termite-make"):
                reach = Reach("> termite-make", own < ratio)
            table.add(r.project, kind, f"{statistics.median(times):.2f}", f"{ratio:.2f}", reach=reach)
        for kind in FIRST_BUILDS:
            ratio = ratio_by_round(r.first, kind)
            reach = at_most(ratio, FIRST[r.project]) if r.project in FIRST else None
            seconds = statistics.median(r.first[kind])
            table.add(r.project, f"termite-make, {kind}", f"{seconds:.2f}", f"{ratio:.2f}", reach=reach)
        ratio = r.with_start_s / statistics.median(r.times["plain make"])
        table.add(r.project, "termite-make with start-up", f"{r.with_start_s:.2f}", f"{ratio:.2f}")
    return table


def floor_table(results: Sequence[Floor]) -> Table:
    table = Table(
        "one small compile at a time, medians",
        ["way", "what", "ms"],
        note="bare box: made by the same mkbox, of this machine's own files, without a mirror or any daemon; longer: "
        "the median over all rounds, each of a few seconds",
    )
    for r in results:
        table.add(r.way, "wall", f"{statistics.median(r.wall_ms):.1f}")
        if r is not results[0]:
            table.add(r.way, "wall, longer than plain", f"{r.beyond_ms(results[0]):.1f}")
        for process, spent in r.cpu_ms.items():
            table.add(r.way, f"CPU, {process}", f"{statistics.median(spent):.2f}")
    return table


def dispatch_table(results: Sequence[Dispatch]) -> Table:
    table = Table(
        "one command that does nothing (distcc, icecc: gcc -c of an empty file)",
        ["system", "-j", "what", "figure"],
        note="mkbox: without what the command itself takes, which is the row of plain make",
    )
    for r in results:
        jobs = str(r.jobs)
        target = r.system == "termite"
        reach = at_least(r.per_second, PER_SECOND) if target and r.jobs == 8 else None
        table.add(r.system, jobs, "commands per second", f"{r.per_second:.0f}", reach=reach)
        for share, limit in zip((0.5, 0.99), LATENCY_MS, strict=True):
            ms = percentile(r.each_s, share) * 1e3
            reach = at_most(ms, limit, " ms") if target and r.jobs == 1 else None
            table.add(r.system, jobs, f"latency p{share * 100:g}", f"{ms:.1f} ms", reach=reach)
        cpu = dict(r.cpu_ms)
        if target:
            cpu["mkbox"] = max(0.0, cpu["mkbox"] - cpu.pop("command"))
        for process, ms in cpu.items():
            table.add(r.system, jobs, f"CPU, {process}", f"{ms:.2f} ms")
        if target:
            here, there = cpu["wrapper"] + cpu["master"], cpu["worker"] + cpu["mkbox"]
            table.add(
                r.system, jobs, "CPU, wrapper and master", f"{here:.2f} ms",
                reach=at_most(here, WRAPPER_AND_MASTER_MS, " ms"),
            )  # fmt: skip
            table.add(
                r.system, jobs, "CPU, worker and mkbox", f"{there:.2f} ms",
                reach=at_most(there, WORKER_AND_MKBOX_MS, " ms"),
            )  # fmt: skip
    return table


def scale_table(results: Sequence[Scale]) -> Table:
    table = Table(
        f"emulated hosts: a master with {MASTER_CORES:g} cores, workers with {WORKER_CORES:g} each",
        ["system", "command", "round trip", "workers", "speed-up", "ideal", "of ideal", "master, CPU per command"],
        note="over plain make on the master's host alone; its CPU is with make and clients; icecc compiles there too",
    )
    for r in results:
        share = r.speed_up() / r.ideal()
        limit = EFFICIENCY.get(r.wanted_round_trip_s)
        reach = None
        if r.system == "termite" and r.command == "fixed CPU" and r.workers == EFFICIENCY_WORKERS and limit:
            reach = Reach(f"≥ {limit:.0%} of ideal", share >= limit)
        table.add(
            r.system, r.command, f"{r.wanted_round_trip_s * 1e3:g} ms", str(r.workers), f"{r.speed_up():.2f}",
            f"{r.ideal():.2f}", f"{share:.0%}", f"{r.master_ms:.1f} ms", reach=reach,
        )  # fmt: skip
    return table


def growth_table(results: Sequence[Growth]) -> Table:
    table = Table(
        "CPU of the master per command, as things grow", ["files", "commands before", "CPU of the master", "ratio"]
    )
    first = results[0]
    for r in results:
        ratio = r.master_ms / first.master_ms if first.master_ms else 1.0
        large = r.files >= 100 * first.files
        reach = at_most(ratio, GROWTH_RATIO) if large else None
        table.add(f"{r.files:,}", f"{r.before:,}", f"{r.master_ms:.2f} ms", f"{ratio:.2f}", reach=reach)
    return table


def refresh_table(results: Sequence[Refresh]) -> Table:
    table = Table(
        "refresh: the master looks for changes in all that it told a worker",
        ["files", "changed", "what", "figure"],
        note="block: how late the event loop came back to a task that wants to run every millisecond; the longest",
    )
    for r in results:
        full = r.files >= FULL_SIZE
        files, changed = f"{r.files:,}", f"{r.changed:,}"
        took, block = statistics.median(r.refresh_s), max(r.block_s) * 1e3
        table.add(
            files, changed, "refresh, median", f"{took:.2f} s", reach=at_most(took, REFRESH_S, " s") if full else None
        )
        table.add(files, changed, "the next command", f"{statistics.median(r.next_command_s) * 1e3:.1f} ms")
        table.add(
            files, changed, "longest block of the loop", f"{block:.1f} ms",
            reach=at_most(block, BLOCK_MS, " ms") if full else None,
        )  # fmt: skip
        table.add(files, changed, "the same without a refresh", f"{max(r.idle_block_s) * 1e3:.1f} ms")
    return table


def memory_table(r: Memory) -> Table:
    table = Table(
        f"resident memory; a project of {r.files:,} files, then {r.commands:,} commands",
        ["after", "process", "memory"],
    )
    limits = {"master": MASTER_MB, "mirror": MIRROR_MB} if r.files >= FULL_SIZE else {}
    for after, processes in [*r.after.items(), ("all, at most", r.peak)]:
        for process, mb in processes.items():
            reach = at_most(mb, limits[process], " MB") if process in limits else None
            table.add(after, process, f"{mb:.0f} MB", reach=reach)
    return table
