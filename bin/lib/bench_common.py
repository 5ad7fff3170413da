"""What every part of the benchmark uses: daemons on this machine, and what processes cost in time and memory."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from projects import LIMIT_S, clean_environment
from rich.console import Console

from termite.cli.session import OwnDaemons, program
from termite.errors import TermiteError

console = Console()
_libc = ctypes.CDLL(None)
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
POLL_S = 0.02

Wrap = Callable[[Sequence[str]], list[str]]
"""Makes a command line of another one that runs it somewhere else: in an emulated host, for example."""


class Skipped(TermiteError):
    """This machine does not let us measure that; the message says why.  The benchmark goes on without it."""


def say(text: str) -> None:
    """A line on how far the benchmark is."""
    console.print(text, highlight=False, markup=False, style="dim", soft_wrap=True)


def here(command: Sequence[str]) -> list[str]:
    """The `Wrap` that changes nothing."""
    return list(command)


# ---- daemons ---------------------------------------------------------------------------------------------------


@contextmanager
def farm(root: Path, jobs: int, *worker_flags: str) -> Iterator[OwnDaemons]:
    """A coordinator, a worker and a master for `root`, in this order in its `daemons`."""
    daemons = OwnDaemons()
    try:
        daemons.start_coordinator()
        daemons.start_worker(jobs, None, *worker_flags)
        daemons.start_master(root, jobs, "-fallback=fail")
        yield daemons
    finally:
        daemons.stop()


def wait_until(what: str, condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    """TermiteError naming `what` if the condition does not come true in time."""
    until = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > until:
            raise TermiteError(f"no {what} after {limit_s:.0f} s")
        time.sleep(POLL_S)


# ---- commands --------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    """For what is measured: ours without what would change it, and with the programs of this checkout."""
    own = clean_environment()
    own["PATH"] += f":{Path(program('termite-make')).parent}"
    return {**own, **more}


def run(
    command: Sequence[str], directory: Path, env: Mapping[str, str] | None = None, limit_s: float = LIMIT_S
) -> bytes:
    """What a command wrote; TermiteError with the end of it if it failed."""
    try:
        done = subprocess.run(
            command, cwd=directory, env=dict(env) if env is not None else environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TermiteError(f"{' '.join(command)} did not end within {limit_s:.0f} s") from None
    except OSError as e:
        raise TermiteError(f"{command[0]}: {e.strerror}") from e
    if done.returncode:
        raise TermiteError(f"{' '.join(command)} failed:\n{done.stdout.decode(errors='replace')[-2000:]}")
    return done.stdout


def timed(command: Sequence[str], directory: Path, env: Mapping[str, str] | None = None) -> tuple[float, float]:
    """(wall seconds, CPU seconds of the command and its children) of one build."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    run(command, directory, env)
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def wrapped(*command: str) -> list[str]:
    """A command line that hands `command` to the master, as the interposer in make does."""
    found = shutil.which(command[0])
    if found is None:
        raise TermiteError(f"{command[0]} is not installed")
    return [program("termite-shell-wrapper"), "-exec", "--", found, *command]


# ---- processes -------------------------------------------------------------------------------------------------


def cpu_s(pid: int, children: bool = False) -> float:
    """CPU seconds of a process so far; `children`: of those of its children that have ended, instead."""
    if children:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[13:15])) * _TICK_S
    clock = ctypes.c_int()
    if code := _libc.clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise TermiteError(f"the kernel does not tell the CPU time of process {pid}: {os.strerror(code)}")
    return time.clock_gettime(clock.value)  # in nanoseconds, where /proc has hundredths of seconds


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def memory_mb(pid: int, what: str = "VmRSS") -> float:
    """Megabytes of memory that a process holds now; VmHWM: at most so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise TermiteError(f"the kernel does not tell {what} of process {pid}")


class Costs:
    """CPU seconds of the daemons of one farm since this was made."""

    def __init__(self, daemons: OwnDaemons) -> None:
        _, worker, master = daemons.daemons
        self.master = master.process.pid
        self.worker = worker.process.pid
        self.mirror = children_of(self.worker)[0]
        self.server = children_of(self.mirror)[0]  # mkbox, whose children are the boxes
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        boxes = cpu_s(self.server) + cpu_s(self.server, children=True)
        return {"master": cpu_s(self.master), "worker": cpu_s(self.worker) + cpu_s(self.mirror), "mkbox": boxes}

    def so_far(self) -> dict[str, float]:
        """By "master", "worker" (daemon and mirror) and "mkbox" (with the commands themselves)."""
        return {name: spent - self._before[name] for name, spent in self._now().items()}


# ---- project trees ---------------------------------------------------------------------------------------------

FILES_PER_DIRECTORY = 100


def tree_of(work: Path, files: int) -> Path:
    """A project of that many small files, all different; made once and used by several parts."""
    root = work / f"tree-{files}"
    if root.exists():
        return root
    say(f"making a tree of {files:,} files")
    for start in range(0, files, FILES_PER_DIRECTORY):
        directory = root / f"d{start // FILES_PER_DIRECTORY:05}"
        directory.mkdir(parents=True)
        for number in range(start, min(files, start + FILES_PER_DIRECTORY)):
            (directory / f"f{number}").write_text(f"{number}\n")
    return root
