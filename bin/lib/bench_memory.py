"""What master, worker and mirror hold in memory after a build in a large tree, and after many commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bench_common import Costs, console, environment, farm, memory_mb, run, say, tree_of, wrapped

OBJECTS = 100
"""Compiled in the large tree, besides looking at all of its files and reading a tenth of them."""


@dataclass
class Memory:
    """Megabytes of resident memory by process, after each step; in `peak` at most so far."""

    files: int
    commands: int
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)


def noop_makefile(commands: int) -> str:
    """A makefile of that many commands that do nothing, on a worker."""
    targets = " ".join(f"t{n}" for n in range(commands))
    return f"noops: {targets}\n{targets}:\n\t@/bin/sleep 0\n.PHONY: noops {targets}\n"


def memory(work: Path, files: int, commands: int) -> Memory:
    root = tree_of(work, files)
    result = Memory(files, commands)
    sources = root / "sources"
    sources.mkdir(exist_ok=True)
    objects = " ".join(f"o{n}.o" for n in range(OBJECTS))
    for number in range(OBJECTS):
        (sources / f"o{number}.c").write_text(f"#include <stdio.h>\nint f{number}(void) {{ return puts(__FILE__); }}\n")
    (sources / "Makefile").write_text(f"all: {objects}\n{noop_makefile(commands)}")
    env = environment(TERMITE_SOCKET=str(root / ".termite-socket"))
    with farm(root, 2) as daemons:
        say(f"memory: looking at {files:,} files, reading a tenth of them, compiling {OBJECTS}")
        run(wrapped("find", ".", "-type", "f", "-size", "-1"), root, env)
        run(wrapped("sh", "-c", "cat d*0/* >sources/all"), root, env)
        run(["termite-make", "-j4", "all"], sources)
        costs = Costs(daemons)
        pids = {"master": costs.master, "worker": costs.worker, "mirror": costs.mirror}

        def note(when: str) -> None:
            result.after[when] = {name: memory_mb(pid) for name, pid in pids.items()}
            shown = ", ".join(f"{name} {mb:.0f} MB" for name, mb in result.after[when].items())
            console.print(f"memory after {when}: {shown}", highlight=False, style="dim")

        note("the build")
        run(["termite-make", "-j8", "noops"], sources)
        note("the commands")
        result.peak = {name: memory_mb(pid, "VmHWM") for name, pid in pids.items()}
    for path in sources.iterdir():
        path.unlink()
    sources.rmdir()
    return result
