"""What each build came to: one line at its end.

A build is one topmost termite-make or termite-run: it announces itself (a REFRESH request), and every
command below it carries its token in the environment.  Its end is seen through a pidfd by the daemon;
before that, make itself asks for the line (SUMMARY) in order to print it.  Pure; times are seconds of any
one clock.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

VARIABLE = b"TERMITE_BUILD="
"""In the environment of everything below one topmost make: its process id."""

KEPT = 20
"""Builds that have ended and are remembered."""

REMOTE = "remote"
ANSWERED = "answered by the master"
LOCAL = "local"
"""Counts that begin so: commands that ran here; the reason follows after a comma or colon."""


@dataclass
class Build:
    token: bytes  # empty: commands that belong to no build
    pid: int
    started: float
    served_before: int  # bytes that had been sent to workers when it began
    counts: Counter[str] = field(default_factory=Counter)
    workers: set[str] = field(default_factory=set)  # that ran a command of it
    received: int = 0  # bytes of contents that came back
    conflicts: int = 0
    seconds: float = 0.0  # set at its end
    served: int = 0  # bytes sent to workers meanwhile; set at its end

    def commands(self) -> int:
        return sum(self.counts.values())

    def summary(self) -> str:
        """One line; the parts that are nothing are left out."""
        here = {name: n for name, n in self.counts.items() if name.startswith(LOCAL)}
        failed = {name: n for name, n in self.counts.items() if name.startswith(("failed", "cancelled"))}
        parts = []
        if n := self.counts[REMOTE]:
            parts.append(f"{n} on {_number(len(self.workers), 'worker')}")
        if n := self.counts[ANSWERED]:
            parts.append(f"{n} answered by the master")
        if here:
            reasons = ", ".join(f"{n} {name.removeprefix(LOCAL).lstrip(', ')}" for name, n in sorted(here.items()))
            parts.append(f"{sum(here.values())} here ({reasons})")
        parts += [f"{n} {name}" for name, n in sorted(failed.items())]
        if self.conflicts:
            parts.append(_number(self.conflicts, "conflict"))
        counted = f"{_number(self.commands(), 'command')}: {', '.join(parts)}" if parts else "no commands"
        return f"{counted}; {_size(self.served)} sent, {_size(self.received)} received, {self.seconds:.1f} s"

    def as_dict(self) -> dict[str, object]:
        return {
            "pid": self.pid,
            "counts": dict(self.counts),
            "workers": sorted(self.workers),
            "sent_bytes": self.served,
            "received_bytes": self.received,
            "seconds": round(self.seconds, 3),
            "conflicts": self.conflicts,
            "summary": self.summary(),
        }


class Builds:
    def __init__(self) -> None:
        self.ended: deque[Build] = deque(maxlen=KEPT)
        self.total = Build(b"", 0, 0.0, 0)  # everything, also what belongs to no build
        self._running: dict[bytes, Build] = {}

    def begin(self, token: bytes, pid: int, now: float, served: int) -> None:
        """A topmost make has announced itself; once more if it refreshes again."""
        if token:
            self._running.setdefault(token, Build(token, pid, now, served))

    def of(self, env: Iterable[bytes]) -> Build:
        """The build that a command with this environment belongs to; `total` if none."""
        return self._running.get(token_in(env), self.total)

    def count(self, build: Build, what: str) -> None:
        self.total.counts[what] += 1
        if build is not self.total:
            build.counts[what] += 1

    def so_far(self, token: bytes, now: float, served: int) -> Build | None:
        """A running build with its figures up to now."""
        build = self._running.get(token)
        if build is not None:
            build.seconds = now - build.started
            build.served = served - build.served_before
        return build

    def end(self, token: bytes, now: float, served: int) -> Build | None:
        """Its process has ended; None if it was none or has been ended before."""
        build = self.so_far(token, now, served)
        if build is not None:
            del self._running[token]
            self.ended.append(build)
        return build

    @property
    def running(self) -> int:
        return len(self._running)


def token_in(env: Iterable[bytes]) -> bytes:
    """The build's token in an environment; empty if there is none."""
    for variable in env:
        if variable.startswith(VARIABLE):
            return variable[len(VARIABLE) :]
    return b""


def _number(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
