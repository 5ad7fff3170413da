"""How this machine is doing: processor, memory, disks, as the kernel tells it.

`Machine.sample` is called once a second and takes a fraction of a millisecond.  What a container does
not let us read counts as nothing.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

_SECTOR = 512
_NOT_DISKS = ("loop", "ram", "zram", "dm-", "md", "sr", "fd", "nbd")
"""Memory, or other disks seen a second time."""


@dataclass(frozen=True)
class Sample:
    cpu: float = 0.0  # percent of all cores, since the sample before
    io_wait: float = 0.0  # percent: idle with something to read or write under way
    load: float = 0.0  # over one minute
    memory_used: int = 0
    memory_total: int = 0
    disk_read: int = 0  # bytes since boot
    disk_written: int = 0


class Machine:
    def __init__(self, proc: str = "/proc", block: str = "/sys/block") -> None:
        self._proc = proc
        self._block = block
        self._before: list[int] = self._cpu_times()
        self.latest = Sample()

    def sample(self) -> Sample:
        cpu, io_wait = self._cpu()
        used, total = self._memory()
        read, written = self._disks()
        self.latest = Sample(cpu, io_wait, self._load(), used, total, read, written)
        return self.latest

    def _read(self, name: str) -> list[str]:
        with contextlib.suppress(OSError), open(f"{self._proc}/{name}") as file:
            return file.readlines()
        return []

    def _cpu_times(self) -> list[int]:
        """user nice system idle iowait irq softirq steal, in ticks; the two after them are parts of the first two."""
        lines = self._read("stat")
        return [int(word) for word in lines[0].split()[1:9]] if lines else []

    def _cpu(self) -> tuple[float, float]:
        before, self._before = self._before, self._cpu_times()
        spent = [max(0, now - then) for now, then in zip(self._before, before, strict=False)]
        total = sum(spent)
        if not total or len(spent) < 5:
            return self.latest.cpu, self.latest.io_wait
        return 100 * (total - spent[3] - spent[4]) / total, 100 * spent[4] / total

    def _memory(self) -> tuple[int, int]:
        parts = (line.partition(":") for line in self._read("meminfo"))
        found = {name: int(rest.split()[0]) << 10 for name, _, rest in parts}
        total = found.get("MemTotal", 0)
        return total - found.get("MemAvailable", total), total

    def _disks(self) -> tuple[int, int]:
        """Bytes read and written, over all whole disks."""
        read = written = 0
        with contextlib.suppress(OSError):
            disks = {name for name in os.listdir(self._block) if not name.startswith(_NOT_DISKS)}
            for words in (line.split() for line in self._read("diskstats")):
                if words[2] in disks:
                    read += int(words[5]) * _SECTOR
                    written += int(words[9]) * _SECTOR
        return read, written

    def _load(self) -> float:
        with contextlib.suppress(OSError):
            return round(os.getloadavg()[0], 2)
        return 0.0
