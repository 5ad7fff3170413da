"""What one command costs the master as the project grows and as commands have been run.

Commands are handed to the masters by a driver that does nothing else, so no refresh and no make is in the figures.  All
of them serve at once and are measured in turn: a machine that gets slower or faster meanwhile favours none.
"""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass
from pathlib import Path

from bench_common import Costs, environment, farm, run, say, tree_of, wrapped
from bench_dispatch import drive

AT_ONCE = 8
ROUNDS = 5


@dataclass
class Growth:
    files: int  # in the project, all of which a worker has been told of
    before: int  # commands that had been run before the measurement
    commands: int  # in each of ROUNDS
    master_ms: float  # CPU per command, median of the rounds


class _Subject:
    """A project with daemons of its own; its commands bring something back, as in a build."""

    def __init__(self, root: Path, files: int, before: int, stack: contextlib.ExitStack) -> None:
        self.root, self.files, self.before = root, files, before
        self.master_ms: list[float] = []
        self._env = environment(TERMITE_SOCKET=str(root / ".termite-socket"))
        self._daemons = stack.enter_context(farm(root, 2))
        run(wrapped("find", ".", "-type", "f", "-size", "-1"), root, self._env)
        self._drive(before)

    def measure(self, commands: int) -> None:
        costs = Costs(self._daemons)
        self._drive(commands)
        self.master_ms.append(costs.so_far()["master"] * 1e3 / commands)

    def _drive(self, commands: int) -> None:
        drive(wrapped("cp", "d00000/f1", "d00000/copy%"), self.root, self._env, commands, AT_ONCE)


def growth(work: Path, sizes: list[int], commands: int, many: int) -> list[Growth]:
    """Each size with `commands` before; a second project of the smallest with `many`."""
    with contextlib.ExitStack() as stack:
        subjects = []
        for place, files, before in [
            (work, sizes[0], commands),
            (work / "aged", sizes[0], many),
            *((work, files, commands) for files in sizes[1:]),
        ]:
            root = tree_of(place, files)
            say(f"growth: {files:,} files, {before:,} commands before it is measured")
            subjects.append(_Subject(root, files, before, stack))
        for _ in range(ROUNDS):
            for subject in subjects:
                subject.measure(commands)
            say("growth: " + ", ".join(f"{each.master_ms[-1]:.2f} ms" for each in subjects) + " of the masters each")
    for subject in subjects:
        for path in subject.root.glob("d00000/copy*"):
            path.unlink()
    return [Growth(each.files, each.before, commands, statistics.median(each.master_ms)) for each in subjects]
