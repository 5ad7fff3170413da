"""What one command costs the master as the project grows and as commands have been run.

Commands are handed to the master by a driver that does nothing else, so no refresh and no make is in the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench_common import Costs, environment, farm, run, say, tree_of, wrapped
from bench_dispatch import drive

AT_ONCE = 8


@dataclass
class Growth:
    files: int  # in the project, all of which a worker has been told of
    before: int  # commands that had been run before the measurement
    commands: int
    master_ms: float  # CPU per command


def growth(work: Path, sizes: list[int], commands: int, many: int) -> list[Growth]:
    """Each size once with few commands before; the smallest also with `many`."""
    results = []
    for files in sizes:
        root = tree_of(work, files)
        env = environment(TERMITE_SOCKET=str(root / ".termite-socket"))
        copy = wrapped("cp", "d00000/f1", "d00000/copy%")  # something comes back, as in a build
        with farm(root, 2) as daemons:
            run(wrapped("find", ".", "-type", "f", "-size", "-1"), root, env)
            drive(copy, root, env, commands, AT_ONCE)  # warms up
            done = commands
            for before in [commands, many] if files == sizes[0] else [commands]:
                drive(copy, root, env, max(0, before - done), AT_ONCE)
                costs = Costs(daemons)
                drive(copy, root, env, commands, AT_ONCE)
                master_ms = costs.so_far()["master"] * 1e3 / commands
                results.append(Growth(files, max(before, done), commands, master_ms))
                done = max(before, done) + commands
                say(f"growth: {files:,} files, after {before:,} commands: {master_ms:.2f} ms of the master each")
        for path in root.glob("d00000/copy*"):
            path.unlink()
    return results
