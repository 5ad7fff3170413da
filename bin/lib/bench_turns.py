"""Builds that take turns several times a second, so that each of them meets the same machine.

A machine that is shared with others is a tenth faster now and a tenth slower in half a minute: builds that run
one after the other cannot be told apart by less.  Here all are under way at once, each in a control group that
stands still while another one's runs.  A build's time is the sum of its turns.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench_common import Skipped
from projects import LIMIT_S

from termite.errors import TermiteError

TURN_S = 0.5
"""What daemons do every second they do in every turn: a shorter one would count that more than once."""
_IDLE_TURN_S = 0.005
"""For what has nothing to build any more: daemons that stood still for a minute would take each other for dead."""
_FREEZE_S = 0.1


class Lane:
    """A control group of version 2 that can be made to stand still with all that was started in it."""

    def __init__(self, name: str) -> None:
        """Skipped if this machine does not let us make one."""
        top = _unified()
        self._home = top / Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        self._group = top / f"termite-bench-{os.getpid()}-{name}"
        if not os.access(self._home / "cgroup.procs", os.W_OK):
            raise Skipped(f"processes cannot be moved between {self._home} and other control groups")
        try:
            self._group.mkdir()
        except OSError as e:
            raise Skipped(f"cannot make the control group {self._group}: {e.strerror}") from e

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What this process starts meanwhile belongs to the lane, which must not stand still."""
        (self._group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self._home / "cgroup.procs").write_text(str(os.getpid()))

    def thaw(self) -> None:
        (self._group / "cgroup.freeze").write_text("0")

    def freeze(self) -> None:
        """Until nothing runs any more, but only for a moment: what waits for a file system does not stop, nor run."""
        (self._group / "cgroup.freeze").write_text("1")
        until = time.monotonic() + _FREEZE_S
        while "frozen 1" not in (self._group / "cgroup.events").read_text() and time.monotonic() < until:
            time.sleep(0.0005)

    def close(self) -> None:
        """To be called once everything in it has ended; a group that is not empty is left to the system."""
        self.thaw()
        until = time.monotonic() + 5.0
        while self._group.exists() and time.monotonic() < until:
            try:
                self._group.rmdir()
            except OSError:
                time.sleep(0.02)


@dataclass(frozen=True)
class Build:
    """A command that is timed; without a lane it runs to its end in one turn."""

    command: Sequence[str]
    directory: Path
    env: Mapping[str, str]
    lane: Lane | None


def take_turns(builds: Mapping[str, Build], turn_s: float = TURN_S) -> dict[str, float]:
    """Wall seconds of each, without those in which it stood still; TermiteError if one fails.

    Each time the turns come in another order: what ran before leaves the machine's caches in one state or
    another.  All lanes stand still afterwards.
    """
    with ExitStack() as stack:
        running = {name: stack.enter_context(_running(build)) for name, build in builds.items()}
        under_way = True
        while under_way:
            under_way = False
            for each in random.sample(list(running.values()), len(running)):
                each.turn(turn_s)
                under_way |= not each.ended
    return {name: each.spent_s for name, each in running.items()}


class _Running:
    def __init__(self, build: Build) -> None:
        self.build = build
        self.spent_s = 0.0
        self.ended = False
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1

    def turn(self, seconds: float) -> None:
        """Runs for so long, or until it has ended."""
        lane = self.build.lane
        if self.ended:
            if lane is not None:
                lane.thaw()
                time.sleep(_IDLE_TURN_S)
                lane.freeze()
            return
        started = time.monotonic()
        if lane is not None:
            lane.thaw()
        if self._process is None:
            self._start()
        left = LIMIT_S - self.spent_s
        self.ended = bool(select.select([self._pidfd], [], [], min(seconds, left) if lane is not None else left)[0])
        self.spent_s += time.monotonic() - started
        if lane is not None:
            lane.freeze()
        if self.ended:
            self._check()
        elif self.spent_s >= LIMIT_S:
            raise TermiteError(f"{' '.join(self.build.command)} did not end within {LIMIT_S:.0f} s")

    def _start(self) -> None:
        with self.build.lane.entered() if self.build.lane is not None else ExitStack():
            try:
                self._process = subprocess.Popen(
                    self.build.command, cwd=self.build.directory, env=dict(self.build.env), stdin=subprocess.DEVNULL,
                    stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as e:
                raise TermiteError(f"{self.build.command[0]}: {e.strerror}") from e
        self._pidfd = os.pidfd_open(self._process.pid)

    def _check(self) -> None:
        assert self._process is not None
        if self._process.wait():
            self._output.seek(0)
            said = self._output.read().decode(errors="replace")[-2000:]
            raise TermiteError(f"{' '.join(self.build.command)} failed:\n{said}")

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            if self.build.lane is not None:
                self.build.lane.thaw()
            for number in (signal.SIGTERM, signal.SIGKILL):
                os.killpg(self._process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)
                    break
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._output.close()


@contextmanager
def _running(build: Build) -> Iterator[_Running]:
    running = _Running(build)
    try:
        yield running
    finally:
        running.close()


def _unified() -> Path:
    """Where version 2 of the control groups is mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, directory, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(directory)
    raise Skipped("this machine has no control groups of version 2")
