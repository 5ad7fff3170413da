"""How long the master takes to find out what was changed behind its back, and how long that holds up its event loop.

A worker has been told of all files before.  Time and blocks are measured in refreshes of their own, because watching
the loop costs a little.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench_client import ask, timed_refresh
from bench_common import environment, run, say, timed, tree_of, wait_until, wrapped
from bench_watched import BLOCK_FILE

from termite.cli.session import Daemon, OwnDaemons
from termite.errors import TermiteError
from termite.master.local import Kind

IDLE_S = 0.5
SETTLE_S = 2.0
"""The kernel frees what the command has looked at once its box has gone, which holds up everything for milliseconds."""


@dataclass
class Refresh:
    """All times in seconds."""

    files: int
    changed: int
    refresh_s: list[float] = field(default_factory=list)
    next_command_s: list[float] = field(default_factory=list)  # a no-op right after it
    block_s: list[float] = field(default_factory=list)  # the longest of the loop, in another refresh
    idle_block_s: list[float] = field(default_factory=list)  # the same while nothing runs: what this machine adds


def refresh(work: Path, files: int, rounds: int) -> list[Refresh]:
    """Nothing, one file and a hundredth of all files changed, in turn."""
    root = tree_of(work, files)
    names = sorted(root.glob("d*/f*"))
    results = [Refresh(files, changed) for changed in (0, 1, files // 100)]
    env = environment(TERMITE_SOCKET=str(root / ".termite-socket"))
    with _watched_farm(root) as longest_block:
        say(f"refresh: a worker looks at {files:,} files")
        run(wrapped("find", ".", "-type", "f", "-size", "-1"), root, env)
        time.sleep(SETTLE_S)
        for number in range(rounds):
            for result in results:
                _change(names, result.changed, number)
                result.refresh_s.append(timed_refresh(root))
                result.next_command_s.append(timed(wrapped("sleep", "0"), root, env)[0])
                _change(names, result.changed, number + rounds)
                result.block_s.append(longest_block(lambda: timed_refresh(root)))
                result.idle_block_s.append(longest_block(lambda: time.sleep(IDLE_S)))
            shown = ", ".join(f"{r.changed:,} changed {r.refresh_s[-1]:.2f} s" for r in results)
            say(f"refresh of {files:,} files: {shown}")
    return results


def _change(names: list[Path], count: int, number: int) -> None:
    """Writes that many files anew, spread over the tree, other ones for each number."""
    for index in range(count):
        path = names[(index * len(names) // count + number) % len(names)]
        path.write_text(f"changed {number} {os.getpid()}\n")


@contextmanager
def _watched_farm(root: Path) -> Iterator[Callable[[Callable[[], object]], float]]:
    """A farm whose master tells how long its loop was blocked while something was done."""
    daemons = OwnDaemons()
    told = daemons.dir / "block"
    os.environ[BLOCK_FILE] = str(told)
    try:
        daemons.start_coordinator()
        daemons.start_worker(2)
        args = [*daemons.secret, "-coordinator", daemons.coordinator_address, "-port", "off", "-fallback=fail"]
        script = str(Path(__file__).with_name("bench_watched.py"))
        master = Daemon(sys.executable, [script, *args], daemons.dir / "master.log", root)
        daemons.daemons.append(master)
        master.wait_until("answer", lambda: _answers(root))

        def longest_block(action: Callable[[], object]) -> float:
            told.unlink(missing_ok=True)
            master.process.send_signal(signal.SIGUSR1)
            ask(root, Kind.INSPECT, ["."])  # it watches by now
            action()
            master.process.send_signal(signal.SIGUSR2)
            wait_until("answer of the watched master", told.exists)
            return float(told.read_text())

        yield longest_block
    finally:
        daemons.stop()
        os.environ.pop(BLOCK_FILE, None)


def _answers(root: Path) -> bool:
    try:
        ask(root, Kind.INSPECT, ["."])
    except TermiteError:
        return False
    return True
