"""The master as its pages show it: what runs and waits, what was served and brought back, what failed.

Samples once a second.  Loop only.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Mapping

from termite import __version__
from termite.master.dispatch import Dispatcher
from termite.master.export import Export
from termite.master.pool import Member, Pool
from termite.master.results import Results
from termite.master.task import Task
from termite.web.counting import History
from termite.web.pages import Page, Site
from termite.web.status import (
    SHOWN_TASKS,
    Amount,
    FailedTask,
    MasterStatus,
    MasterWorker,
    Plot,
    RunningTask,
)

SAMPLE_EVERY_S = 1.0
KEPT_FAILURES = 20


class Overview:
    def __init__(
        self,
        name: str,
        pool: Pool,
        dispatcher: Dispatcher,
        results: Results,
        export: Export,
        counts: Mapping[str, int],
    ) -> None:
        self._name = name
        self._pool = pool
        self._dispatcher = dispatcher
        self._results = results
        self._export = export
        self._counts = counts
        self._started = time.monotonic()
        self._history = History()
        self._failed: deque[FailedTask] = deque(maxlen=KEPT_FAILURES)

    def ended(self, task: Task, status: int) -> None:
        """A command has ended on a worker, with this status as waitpid() gives it."""
        if status:
            self._failed.appendleft(FailedTask(task.id, task.label(), _in_words(status), task.worker, time.time()))

    async def watch(self) -> None:
        """Samples until cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(SAMPLE_EVERY_S)

    def sample(self) -> None:
        now = time.monotonic()
        history = self._history
        history.add("running", self._dispatcher.running)
        history.add("waiting", self._dispatcher.waiting)
        history.add_total("done", sum(self._counts.values()), now)
        history.add_total("out", self._dispatcher.served_bytes, now)
        history.add_total("in", self._results.bytes, now)

    def _plots(self) -> list[Plot]:
        plot = self._history.plot
        return [
            plot("Commands", "", ["running", "waiting"]),
            plot("Commands done", "/s", ["done"]),
            plot("Throughput", "B/s", ["out", "in"]),
        ]

    def _tasks(self) -> list[RunningTask]:
        now = time.time_ns()
        tasks = [
            RunningTask(task.id, task.label(), round(max(0, now - task.sent_ns) / 1e9, 1), worker=link.name)
            for link in self._dispatcher.links.values()
            for task in link.tasks.values()
        ]
        return sorted(tasks, key=lambda task: -task.for_s)[:SHOWN_TASKS]

    def status(self, breaches: list[str] | None = None) -> MasterStatus:
        members, hashes = self._pool.members, self._export.hashes
        return MasterStatus(
            name=self._name,
            version=__version__,
            up_s=round(time.monotonic() - self._started, 1),
            jobs=self._pool.jobs,
            running=self._dispatcher.running,
            waiting=self._dispatcher.waiting,
            wanted=sum(member.wanted for member in members.values()),
            granted=sum(member.granted for member in members.values()),
            counts=dict(self._counts),
            results=Amount(self._results.files, self._results.bytes),
            hashed=hashes.status(),
            workers={name: _worker(member) for name, member in sorted(members.items())},
            tasks=self._tasks(),
            failed=list(self._failed),
            conflicts=[str(conflict) for conflict in self._results.conflicts.recent],
            breaches=breaches,
            phases=self._results.timings.phases(),
            told=self._export.told.histogram(),
            served=self._export.served.histogram(),
            plots=self._plots(),
        )

    def site(self, status: Callable[[], MasterStatus]) -> Site:
        return Site("master", {"/": Page("master.html", lambda _: status())})


def _worker(member: Member) -> MasterWorker:
    return MasterWorker(
        state="leaving" if member.draining else member.state.value,
        jobs=member.info.jobs,
        wanted=member.wanted,
        granted=member.granted,
        running=member.running,
        done=member.done,
        failures=member.failures,
    )


def _in_words(status: int) -> str:
    """A raw wait status."""
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit {os.waitstatus_to_exitcode(status)}"
