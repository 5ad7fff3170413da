"""What daemons count for their pages: how long, how large, how much per second.

Plain objects without clock or I/O, cheap enough to be fed from every task.  Loop only.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

from termite.web.status import Bucket, Histogram, Line, Phase, Plot

KEPT = 300
"""Values of each curve: five minutes at one per second."""


class Timings:
    """How often each phase was gone through, and how long it took."""

    def __init__(self) -> None:
        self._phases: dict[str, Phase] = {}

    def add(self, phase: str, seconds: float) -> None:
        self.merge([Phase(phase, 1, seconds, seconds)])

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Counts the block under it, also one that fails."""
        started = perf_counter()
        try:
            yield
        finally:
            self.add(phase, perf_counter() - started)

    def merge(self, phases: Iterable[Phase]) -> None:
        for new in phases:
            old = self._phases.get(new.phase, Phase(new.phase, 0, 0.0, 0.0))
            self._phases[new.phase] = Phase(
                new.phase, old.count + new.count, old.total_s + new.total_s, max(old.max_s, new.max_s)
            )

    def phases(self) -> list[Phase]:
        return list(self._phases.values())


class Sizes:
    """A histogram of file sizes by powers of four."""

    def __init__(self) -> None:
        self.files = 0
        self.bytes = 0
        self._files: Counter[int] = Counter()  # the least power of four that is not below the size -> files
        self._bytes: Counter[int] = Counter()

    def add(self, size: int) -> None:
        self.files += 1
        self.bytes += size
        power = (max(0, size - 1).bit_length() + 1) // 2
        self._files[power] += 1
        self._bytes[power] += size

    def histogram(self) -> Histogram:
        powers = range(min(self._files), max(self._files) + 1) if self._files else ()
        buckets = [Bucket(4**power, self._files[power], self._bytes[power]) for power in powers]
        return Histogram(self.files, self.bytes, buckets)


class History:
    """The last values of several curves, fed in step: one `add` of everything per second."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._curves: dict[str, deque[float]] = {}
        self._totals: dict[str, tuple[float, float]] = {}  # curve -> the running total last seen, and when

    def add(self, curve: str, value: float) -> None:
        self._curves.setdefault(curve, deque(maxlen=self._kept)).append(round(value, 2))

    def add_total(self, curve: str, total: float, now: float) -> None:
        """For what only ever grows: the curve shows how much per second."""
        before, then = self._totals.get(curve, (total, now))
        self._totals[curve] = total, now
        self.add(curve, max(0.0, total - before) / (now - then) if now > then else 0.0)

    def latest(self, curve: str) -> float:
        values = self._curves.get(curve)
        return values[-1] if values else 0.0

    def plot(self, title: str, unit: str, curves: Sequence[str], top: float = 0.0) -> Plot:
        return Plot(title, unit, top, [Line(name, list(self._curves.get(name, ()))) for name in curves])
