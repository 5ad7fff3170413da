"""The worker as its pages, and its coordinators, are told of it.

Gathers what mirrors report (also what those that have ended had reported) and samples the machine
once a second.  Loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from termite import __version__
from termite.web.counting import History, Timings
from termite.web.logtail import LogTail
from termite.web.pages import Page, Site
from termite.web.status import SHOWN_TASKS, MirrorStatus, Plot, RunningTask, WorkerStatus
from termite.wire.messages import RunningCommand, Use, WorkerReport
from termite.worker.machine import Machine
from termite.worker.reporting import FROM_MASTERS, RESULTS, MirrorReport

SAMPLE_EVERY_S = 1.0
TELL_EVERY = 2  # samples, between two reports to the coordinators
TOLD_TASKS = 50


@dataclass(frozen=True)
class MirrorFacts:
    """What the daemon itself knows of a mirror."""

    master: str
    wanted: int
    granted: int


@dataclass(frozen=True)
class WorkerFacts:
    """What the daemon knows and this module does not."""

    name: str
    state: str
    jobs: int
    cache_dir: str
    cache_bytes: int
    cache_limit: int
    coordinators: list[str]
    mirrors: dict[int, MirrorFacts]


class Overview:
    def __init__(self, facts: Callable[[], WorkerFacts], tell: Callable[[WorkerReport], None]) -> None:
        self._facts = facts
        self._tell = tell
        self._machine = Machine()
        self._history = History()
        self._started = time.monotonic()
        self._reports: dict[int, MirrorReport] = {}
        self._past_done = 0  # of mirrors that have ended, as is all past
        self._past_counts: Counter[str] = Counter()
        self._past_calls: Counter[str] = Counter()
        self._past_phases = Timings()

    # -- mirrors -------------------------------------------------------------------------------------

    def reported(self, serial: int, report: MirrorReport) -> None:
        self._reports[serial] = report

    def ended(self, serial: int) -> None:
        report = self._reports.pop(serial, None)
        if report is not None:
            self._past_done += report.done
            self._past_counts.update(report.counts)
            self._past_calls.update(report.file_system)
            self._past_phases.merge(report.phases)

    @property
    def running(self) -> int:
        """Commands, as of a second ago."""
        return sum(report.running for report in self._reports.values())

    def _done(self) -> int:
        return self._past_done + sum(report.done for report in self._reports.values())

    def _counts(self) -> Counter[str]:
        counts = Counter(self._past_counts)
        for report in self._reports.values():
            counts.update(report.counts)
        return counts

    # -- every second --------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Samples, and tells the coordinators, until cancelled."""
        turn = 0
        while True:
            self.sample()
            if turn % TELL_EVERY == 0:
                self._tell(self.report())
            turn += 1
            await asyncio.sleep(SAMPLE_EVERY_S)

    def sample(self) -> None:
        now = time.monotonic()
        machine, history = self._machine.sample(), self._history
        counts = self._counts()
        history.add("busy", machine.cpu)
        history.add("disk wait", machine.io_wait)
        history.add("used", 100 * machine.memory_used / (machine.memory_total or 1))
        history.add_total("read", machine.disk_read, now)
        history.add_total("written", machine.disk_written, now)
        history.add("running", self.running)
        history.add("waiting", sum(report.waiting for report in self._reports.values()))
        history.add_total("done", self._done(), now)
        history.add_total("in", counts[FROM_MASTERS], now)
        history.add_total("out", counts[RESULTS], now)

    def _plots(self) -> list[Plot]:
        plot = self._history.plot
        return [
            plot("CPU", "%", ["busy", "disk wait"], 100.0),
            plot("Memory", "%", ["used"], 100.0),
            plot("Disk", "B/s", ["read", "written"]),
            plot("Commands", "", ["running", "waiting"]),
            plot("Commands done", "/s", ["done"]),
            plot("Throughput", "B/s", ["in", "out"]),
        ]

    # -- records -------------------------------------------------------------------------------------

    def _tasks(self, facts: WorkerFacts) -> list[RunningTask]:
        now = time.monotonic()
        tasks = [
            RunningTask(task.id, task.label, round(now - task.started, 1), master=facts.mirrors[serial].master)
            for serial, report in self._reports.items()
            if serial in facts.mirrors
            for task in report.tasks
        ]
        return sorted(tasks, key=lambda task: -task.for_s)[:SHOWN_TASKS]

    def _mirror(self, serial: int, facts: MirrorFacts) -> MirrorStatus:
        report = self._reports.get(serial)
        running, waiting, done = (report.running, report.waiting, report.done) if report is not None else (0, 0, 0)
        return MirrorStatus(facts.master or "?", facts.wanted, facts.granted, running, waiting, done)

    def status(self) -> WorkerStatus:
        facts, machine = self._facts(), self._machine.latest
        calls = Counter(self._past_calls)
        phases = Timings()
        phases.merge(self._past_phases.phases())
        for report in self._reports.values():
            phases.merge(report.phases)
            calls.update(report.file_system)
        return WorkerStatus(
            name=facts.name,
            version=__version__,
            arch=platform.machine(),
            state=facts.state,
            up_s=round(time.monotonic() - self._started, 1),
            jobs=facts.jobs,
            cores=os.cpu_count() or 1,
            load=machine.load,
            memory_used=machine.memory_used,
            memory_total=machine.memory_total,
            cache_bytes=facts.cache_bytes,
            cache_limit=facts.cache_limit,
            disk_free=_free(facts.cache_dir),
            coordinators=facts.coordinators,
            mirrors=[self._mirror(serial, mirror) for serial, mirror in facts.mirrors.items()],
            tasks=self._tasks(facts),
            counts=dict(sorted(self._counts().items())),
            file_system={name.replace("_", " "): count for name, count in sorted(calls.items())},
            phases=phases.phases(),
            plots=self._plots(),
        )

    def report(self) -> WorkerReport:
        """For the coordinators."""
        facts, machine = self._facts(), self._machine.latest
        mirrors = [self._mirror(serial, mirror) for serial, mirror in facts.mirrors.items()]
        return WorkerReport(
            state=facts.state,
            load=machine.load,
            cpu=round(machine.cpu, 1),
            memory_used=machine.memory_used,
            memory_total=machine.memory_total,
            running=sum(mirror.running for mirror in mirrors),
            done=self._done(),
            uses=[Use(mirror.master, mirror.granted, mirror.running) for mirror in mirrors],
            tasks=[
                RunningCommand(task.id, task.label, task.master, task.for_s) for task in self._tasks(facts)[:TOLD_TASKS]
            ],
        )

    def site(self, log_tail: LogTail) -> Site:
        pages = {
            "/": Page("worker.html", lambda _: self.status()),
            "/log": Page("log.html", lambda _: log_tail.status(self._facts().name)),
        }
        return Site("worker", pages)


def _free(directory: str) -> int:
    """Bytes that could still be written there."""
    with contextlib.suppress(OSError):
        st = os.statvfs(directory)
        return st.f_bavail * st.f_frsize
    return 0
