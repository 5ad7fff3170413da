"""Times termite beside plain make, distcc and icecc, interleaved on this machine, and says what is to be reached.

Each part is a module of its own (`bench_overhead.py`, ...) that returns plain figures; `bench_report.py` makes tables
of them, `bench_plots.py` plots.  A part that this machine does not permit is left out with a line that says why.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_report as report
from bench_common import Skipped, children_of, console, cpu_s, farm, say, timed
from bench_dispatch import dispatch
from bench_floor import floor
from bench_growth import growth
from bench_memory import memory
from bench_overhead import ALL_PROJECTS, overhead
from bench_page import PartOfPage, page
from bench_peers import version_of
from bench_plots import dispatch_plots, overhead_plots, scale_plots
from bench_refresh import refresh
from bench_scale import scale

from termite import __version__
from termite.cli.flags import Flags, HelpWanted
from termite.errors import TermiteError, UsageError

__all__ = ["children_of", "cpu_s", "farm", "main", "timed"]

PARTS = ["overhead", "dispatch", "floor", "scale", "refresh", "memory"]
_ENDED = 130


@dataclass(frozen=True)
class Sizes:
    """How much of everything is run."""

    projects: tuple[str, ...]
    rounds: int  # builds of each kind, and refreshes
    commands: int  # that do nothing
    workers: tuple[int, ...]
    compiling_workers: tuple[int, ...]
    per_worker: int  # commands for each of them
    files: int  # of a large project
    many_commands: int
    growing: tuple[int, ...]  # files


FULL = Sizes(
    tuple(ALL_PROJECTS), 3, 2000, (1, 2, 4, 8, 16), (8,), 8, 100_000, 10_000, (1_000, 10_000, 100_000)
)  # fmt: skip
QUICK = Sizes(("lua",), 1, 100, (4,), (2,), 2, 10_000, 300, (1_000, 10_000))


def main(argv: Sequence[str] | None = None) -> int:
    names = [*PARTS, *ALL_PROJECTS]
    flags = Flags(
        "bin/bench",
        f"Benchmarks on this machine; needs root.  Parts: {', '.join(PARTS)}; of overhead, the projects "
        f"{', '.join(ALL_PROJECTS)}.  Without any, all of them: more than an hour.",
        "[PART...]",
        flags_anywhere=True,
    )
    rounds = flags.integer("rounds", FULL.rounds, "builds of each kind and project, and refreshes", 1, 100)
    commands = flags.integer("commands", FULL.commands, "commands that do nothing, for dispatch", 10, 100000)
    quick = flags.switch("quick", False, "an abridged run of less than five minutes; not for comparing with targets")
    as_json = flags.text("json", "", "write all figures to this file", "FILE")
    as_html = flags.text("html", "", "write a page with plots to this file", "FILE")
    try:
        parts = flags.parse(sys.argv[1:] if argv is None else argv) or PARTS
        unknown = [part for part in parts if part not in names]
        if unknown:
            raise UsageError(f"no part {unknown[0]}; there are {', '.join(names)}")
        for file in (as_json.value, as_html.value):
            _check_writable(file)
    except HelpWanted as wanted:
        print(wanted)
        return 0
    except TermiteError as e:
        print(f"bench: {e}", file=sys.stderr)
        return e.exit_status
    sizes = QUICK if quick.value else FULL
    sizes = Sizes(**{
        **vars(sizes),
        "rounds": rounds.value if rounds.is_given else sizes.rounds,
        "commands": commands.value if commands.is_given else sizes.commands,
    })  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: everything is taken down
    run = Run(parts, sizes)
    try:
        status = run.all()
    except KeyboardInterrupt:
        print("bench: ended early; everything that it started has been taken down", file=sys.stderr)
        return _ENDED
    if as_json.value:
        Path(as_json.value).write_text(json.dumps({**run.facts, "parts": run.figures}, indent=1) + "\n")
    if as_html.value:
        Path(as_html.value).write_text(page(run.facts, run.pages))
    return status


def _check_writable(file: str) -> None:
    """UsageError now rather than after an hour."""
    if file and not os.access(Path(file).absolute().parent, os.W_OK):
        raise UsageError(f"{file}: its directory is not there or cannot be written to")


class Run:
    """What was asked for, and the figures so far."""

    def __init__(self, parts: Sequence[str], sizes: Sizes) -> None:
        self.parts = parts
        self.sizes = sizes
        self.facts: dict[str, object] = facts()
        self.figures: dict[str, object] = {}
        self.pages: list[PartOfPage] = []

    def all(self) -> int:
        """Runs the parts; the exit status."""
        work = Path(tempfile.mkdtemp(prefix="termite-bench-", dir="/srv" if os.access("/srv", os.W_OK) else None))
        work.chmod(0o755)
        ways: dict[str, Callable[[Path], PartOfPage]] = {
            "dispatch": self._dispatch,
            "floor": self._floor,
            "scale": self._scale,
            "refresh": self._refresh,
            "memory": self._memory,
        }
        status = 0
        try:
            for name, way in {"overhead": self._overhead, **ways}.items():
                if name not in self.parts and not (name == "overhead" and set(self.parts) & set(ALL_PROJECTS)):
                    continue
                try:
                    part = way(work)
                except Skipped as reason:
                    console.print(f"{name}: left out: {reason}", highlight=False, markup=False)
                    self.figures[name] = {"left out": str(reason)}
                    continue
                except TermiteError as e:
                    print(f"bench: {name}: {e}", file=sys.stderr)
                    status = e.exit_status
                    continue
                for table in part.tables:
                    report.show(console, table)
                self.pages.append(part)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return status

    def _note(self, name: str, results: Sequence[Any]) -> None:
        self.figures[name] = [asdict(result) for result in results]

    def _overhead(self, work: Path) -> PartOfPage:
        wanted = self.sizes.projects if "overhead" in self.parts else [p for p in ALL_PROJECTS if p in self.parts]
        results = [overhead(name, work, self.sizes.rounds) for name in wanted]
        self._note("overhead", results)
        return PartOfPage("overhead", [report.overhead_table(results)], overhead_plots(results))

    def _dispatch(self, work: Path) -> PartOfPage:
        results = dispatch(work, self.sizes.commands)
        self._note("dispatch", results)
        return PartOfPage("dispatch", [report.dispatch_table(results)], dispatch_plots(results))

    def _floor(self, work: Path) -> PartOfPage:
        results = floor(work, max(3, self.sizes.commands // 40))
        self._note("floor", results)
        return PartOfPage("floor", [report.floor_table(results)])

    def _scale(self, work: Path) -> PartOfPage:
        tables, plots = [], []
        try:
            results = scale(work, self.sizes.workers, self.sizes.compiling_workers, self.sizes.per_worker)
            self._note("scale", results)
            tables, plots = [report.scale_table(results)], scale_plots(results)
        except Skipped as reason:
            say(f"scale: without emulated hosts: {reason}")
            self.figures["scale"] = {"left out": str(reason)}
        grown = growth(work, list(self.sizes.growing), self.sizes.commands // 4, self.sizes.many_commands)
        self._note("growth", grown)
        return PartOfPage("scale", [*tables, report.growth_table(grown)], plots)

    def _refresh(self, work: Path) -> PartOfPage:
        results = refresh(work, self.sizes.files, self.sizes.rounds)
        self._note("refresh", results)
        return PartOfPage("refresh", [report.refresh_table(results)])

    def _memory(self, work: Path) -> PartOfPage:
        result = memory(work, self.sizes.files, self.sizes.many_commands)
        self._note("memory", [result])
        return PartOfPage("memory", [report.memory_table(result)])


def facts() -> dict[str, object]:
    """Of this machine and of what is compared."""
    versions = {
        "make": version_of("make", "--version"),
        "gcc": version_of("gcc", "--version"),
        "distcc": version_of("distcc", "--version"),
        "icecc": version_of("icecc", "--version"),
    }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "kernel": os.uname().release,
        "termite": __version__,
        **{name: version for name, version in versions.items() if version},
    }


if __name__ == "__main__":
    sys.exit(main())
