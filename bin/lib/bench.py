"""Times builds and no-op commands through termite beside the same with plain make, interleaved, on this machine.

Medians and ratios; this machine runs coordinator, one worker with two jobs, and master.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from projects import LIMIT_S, PROJECTS, clean_environment, copy_tree, reset, unpack
from rich.console import Console
from rich.table import Table

from termite.cli.flags import Flags, HelpWanted
from termite.cli.session import OwnDaemons, program
from termite.errors import TermiteError

console = Console()
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@contextmanager
def farm(root: Path, jobs: int) -> Iterator[OwnDaemons]:
    daemons = OwnDaemons()
    try:
        daemons.start_coordinator()
        daemons.start_worker(jobs)
        daemons.start_master(root, jobs, "-fallback=fail")
        yield daemons
    finally:
        daemons.stop()


def timed(command: list[str], directory: Path) -> tuple[float, float]:
    """(wall seconds, CPU seconds of the command and its children) of one build."""
    environment = clean_environment()
    environment["PATH"] += f":{Path(program('termite-make')).parent}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise TermiteError(f"{' '.join(command)} failed:\n{done.stdout.decode(errors='replace')[-2000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@dataclass
class Overhead:
    project: str
    plain_s: list[float]
    termite_s: list[float]
    first_s: float  # the first build, on an empty worker

    def ratio(self) -> float:
        return statistics.median(self.termite_s) / statistics.median(self.plain_s)


def overhead(name: str, work: Path, rounds: int) -> Overhead:
    """One project, built again and again in one directory from the same state: plain and through termite in turn."""
    project = PROJECTS[name]
    root, pristine = work / name, work / f"{name}-pristine"
    unpack(project, root)  # where it is built: configure notes the path
    copy_tree(root, pristine)
    result = Overhead(name, [], [], 0.0)
    timed(["make", "-j2", *project.make], root)  # warms the page cache
    reset(root, pristine)
    with farm(root, 2):
        result.first_s, _ = timed(["termite-make", "-j2", *project.make], root)
        for number in range(rounds):
            kinds = [("make", result.plain_s), ("termite-make", result.termite_s)]
            for make, times in kinds if number % 2 == 0 else kinds[::-1]:
                reset(root, pristine)
                wall, _ = timed([make, "-j2", *project.make], root)
                times.append(wall)
            console.print(
                f"{name}: plain {result.plain_s[-1]:.2f} s, termite {result.termite_s[-1]:.2f} s", highlight=False
            )
    for directory in (pristine, root):
        shutil.rmtree(directory)
    return result


@dataclass
class Dispatch:
    """No-op commands; CPU is in milliseconds per command."""

    jobs: int
    per_second: float
    plain_per_second: float
    wrapper_ms: float  # with make's own work for one command
    master_ms: float
    worker_ms: float  # daemon and mirror
    mkbox_ms: float  # with the command itself
    plain_ms: float  # make and the command, without termite


def cpu_s(pid: int, children: bool = False) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[13:15] if children else fields[11:13])) * _TICK_S


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def dispatch(work: Path, commands: int) -> list[Dispatch]:
    root = work / "dispatch"
    root.mkdir()
    targets = " ".join(f"t{n}" for n in range(commands))
    (root / "Makefile").write_text(f"all: {targets}\n{targets}:\n\t@/bin/sleep 0\n.PHONY: all {targets}\n")
    results = []
    with farm(root, 2) as daemons:
        _, worker, master = daemons.daemons
        timed(["termite-make", "-j8"], root)
        mirror = children_of(worker.process.pid)[0]
        server = children_of(mirror)[0]  # mkbox, whose children are the boxes
        for jobs in (1, 8):
            plain_wall, plain_cpu = timed(["make", f"-j{jobs}"], root)
            pids = {"master": master.process.pid, "worker": worker.process.pid, "mirror": mirror}
            before = {name: cpu_s(pid) for name, pid in pids.items()}
            boxes = cpu_s(server) + cpu_s(server, children=True)
            wall, cpu = timed(["termite-make", f"-j{jobs}"], root)
            spent = {name: (cpu_s(pid) - before[name]) * 1e3 / commands for name, pid in pids.items()}
            results.append(
                Dispatch(
                    jobs=jobs,
                    per_second=commands / wall,
                    plain_per_second=commands / plain_wall,
                    wrapper_ms=cpu * 1e3 / commands,
                    master_ms=spent["master"],
                    worker_ms=spent["worker"] + spent["mirror"],
                    mkbox_ms=(cpu_s(server) + cpu_s(server, children=True) - boxes) * 1e3 / commands,
                    plain_ms=plain_cpu * 1e3 / commands,
                )
            )
    shutil.rmtree(root)
    return results


def show_overhead(results: list[Overhead]) -> None:
    table = Table(
        "project", "plain make -j2", "termite-make -j2", "ratio", "first build", title="one machine, warm, medians"
    )
    for r in results:
        plain = statistics.median(r.plain_s)
        table.add_row(
            r.project, f"{plain:.2f} s", f"{statistics.median(r.termite_s):.2f} s", f"{r.ratio():.2f}",
            f"{r.first_s / plain:.2f}",
        )  # fmt: skip
    console.print(table)


def show_dispatch(results: list[Dispatch]) -> None:
    table = Table(
        "-j", "commands/s", "plain", "make + wrapper", "master", "worker", "mkbox, command", "plain: make, command",
        title="no-op commands; CPU in ms per command",
    )  # fmt: skip
    for r in results:
        cpu = [r.wrapper_ms, r.master_ms, r.worker_ms, r.mkbox_ms, r.plain_ms]
        table.add_row(str(r.jobs), f"{r.per_second:.0f}", f"{r.plain_per_second:.0f}", *(f"{ms:.2f}" for ms in cpu))
    console.print(table)


PARTS = [*PROJECTS, "dispatch"]


def main() -> int:
    flags = Flags("bin/bench", f"Benchmarks on this machine.  Parts: {', '.join(PARTS)}; all without any.", "[PART...]")
    rounds = flags.integer("rounds", 5, "builds of each kind and project", 1, 100)
    commands = flags.integer("commands", 500, "no-op commands for dispatch", 10, 100000)
    quick = flags.switch("quick", False, "fewer rounds, and no coreutils")
    output = flags.text("json", "", "write the figures to this file", "FILE")
    try:
        parts = flags.parse(sys.argv[1:]) or [p for p in PARTS if not (quick.value and p == "coreutils")]
        unknown = [p for p in parts if p not in PARTS]
        if unknown:
            raise TermiteError(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
    except HelpWanted as wanted:
        print(wanted)
        return 0
    except TermiteError as e:
        print(f"bench: {e}", file=sys.stderr)
        return 2
    work = Path(tempfile.mkdtemp(prefix="termite-bench-", dir="/srv" if os.access("/srv", os.W_OK) else None))
    work.chmod(0o755)
    figures: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "kernel": os.uname().release,
    }
    try:
        builds = [overhead(p, work, 2 if quick.value else rounds.value) for p in parts if p in PROJECTS]
        if builds:
            show_overhead(builds)
            figures["overhead"] = [{**vars(b), "ratio": b.ratio()} for b in builds]
        if "dispatch" in parts:
            noops = dispatch(work, commands.value)
            show_dispatch(noops)
            figures["dispatch"] = [vars(d) for d in noops]
    except TermiteError as e:
        print(f"bench: {e}", file=sys.stderr)
        return e.exit_status
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if output.value:
        Path(output.value).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
