"""What daemons count for their pages: how long, how large, how much per second.

Plain objects without clock or I/O, cheap enough to be fed from every task.  Loop only.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from time import perf_counter

from termite.web.status import Bucket, Histogram, Line, Phase, Plot

KEPT = 300
"""Values of each curve: five minutes at one per second."""


class Timings:
    """How often each phase was gone through, and how long it took."""

    def __init__(self) -> None:
        self._phases: dict[str, list[float]] = {}  # how often, seconds in all, seconds at most

    def add(self, phase: str, seconds: float, count: int = 1, longest: float = 0.0) -> None:
        known = self._phases.get(phase)
        if known is None:
            known = self._phases[phase] = [0, 0.0, 0.0]
        known[0] += count
        known[1] += seconds
        known[2] = max(known[2], longest or seconds)

    def measure(self, phase: str) -> _Measure:
        """Counts the block under it, also one that fails."""
        return _Measure(self, phase)

    def merge(self, phases: Iterable[Phase]) -> None:
        for phase in phases:
            self.add(phase.phase, phase.total_s, phase.count, phase.max_s)

    def phases(self) -> list[Phase]:
        return [Phase(name, int(count), total, longest) for name, (count, total, longest) in self._phases.items()]


class _Measure:
    __slots__ = ("_phase", "_started", "_timings")

    def __init__(self, timings: Timings, phase: str) -> None:
        self._timings = timings
        self._phase = phase

    def __enter__(self) -> None:
        self._started = perf_counter()

    def __exit__(self, *failure: object) -> None:
        self._timings.add(self._phase, perf_counter() - self._started)


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
