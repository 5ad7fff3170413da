"""CPU quotas for emulated hosts, with either version of the kernel's control groups."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from bench_common import Skipped

PERIOD_US = 20_000
"""How often a quota is given anew: short, so that a host is slow and not fast by turns."""
_END_S = 5.0


class CpuGroup:
    """One group; its processes together get `set_quota` cores of CPU."""

    def __init__(self, directory: Path, is_v2: bool) -> None:
        self.directory = directory
        self._is_v2 = is_v2
        try:
            directory.mkdir()
        except OSError as e:
            raise Skipped(f"cannot make the control group {directory}: {e.strerror}; run as root") from e

    @property
    def procs(self) -> Path:
        """Writing a pid to this file puts the process into the group."""
        return self.directory / "cgroup.procs"

    def set_quota(self, cores: float | None) -> None:
        """None: no bound."""
        quota = round(cores * PERIOD_US) if cores is not None else None
        try:
            if self._is_v2:
                (self.directory / "cpu.max").write_text(f"{quota or 'max'} {PERIOD_US}")
            else:
                (self.directory / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (self.directory / "cpu.cfs_quota_us").write_text(str(quota or -1))
        except OSError as e:
            raise Skipped(f"cannot bound the CPU of the control group {self.directory}: {e.strerror}") from e

    def let_below(self) -> None:
        """Version 2: groups below this one may have quotas of their own."""
        try:
            (self.directory / "cgroup.subtree_control").write_text("+cpu")
        except OSError as e:
            raise Skipped(f"cannot bound the CPU of groups below {self.directory}: {e.strerror}") from e

    def close(self) -> None:
        """Ends what is left in the group, which we all started, and removes it."""
        until = time.monotonic() + _END_S
        while time.monotonic() < until:
            for pid in self.procs.read_text().split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            try:
                self.directory.rmdir()
                return
            except OSError:
                time.sleep(0.02)


def cpu_controller() -> tuple[Path, bool]:
    """(where groups with CPU quotas can be made, is it version 2?); Skipped if nowhere."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, directory, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            return Path(directory), False
    for line in Path("/proc/mounts").read_text().splitlines():
        _, directory, kind, *_ = line.split()
        controllers = Path(directory) / "cgroup.controllers"
        if kind == "cgroup2" and "cpu" in controllers.read_text().split():
            try:
                (Path(directory) / "cgroup.subtree_control").write_text("+cpu")
            except OSError as e:
                raise Skipped(f"cannot bound CPU below {directory}: {e.strerror}; run outside of a container") from e
            return Path(directory), True
    raise Skipped("this machine has no control group for CPU; mount one at /sys/fs/cgroup")
