"""The registry as the pages show it."""

from __future__ import annotations

from collections.abc import Iterable

from termite.coordinator.registry import Registry, Worker
from termite.web.status import SHOWN_TASKS, ListedMaster, ListedWorker, Load, MasterUse, RunningTask
from termite.wire.messages import WorkerReport

MAX_LABEL = 255
"""Letters of a command or a master's name: what workers say of others is cut there."""


def listed_workers(registry: Registry, now: float) -> list[ListedWorker]:
    return [listed_worker(worker, now) for worker in registry.listing()]


def listed_worker(worker: Worker, now: float) -> ListedWorker:
    info = worker.info
    return ListedWorker(
        name=info.name,
        host=info.host,
        port=info.port,
        jobs=info.jobs,
        arch=info.arch,
        version=info.version,
        web_port=info.web_port,
        for_s=round(now - worker.since, 3),
        load=_load(worker.report, now - worker.reported) if worker.report is not None else None,
    )


def _load(report: WorkerReport, age_s: float) -> Load:
    return Load(
        age_s=round(age_s, 3),
        state=report.state[:MAX_LABEL],
        load=report.load,
        cpu=report.cpu,
        memory_used=report.memory_used,
        memory_total=report.memory_total,
        running=report.running,
        done=report.done,
        uses=[MasterUse(use.master[:MAX_LABEL], use.granted, use.running) for use in report.uses],
        tasks=[
            RunningTask(task.id, task.label[:MAX_LABEL], round(task.for_s + age_s, 1), master=task.master[:MAX_LABEL])
            for task in report.tasks[:SHOWN_TASKS]
        ],
    )


def listed_masters(registry: Registry, workers: Iterable[ListedWorker], now: float) -> list[ListedMaster]:
    """With what the workers say each of them holds."""
    granted: dict[str, int] = {}
    running: dict[str, int] = {}
    for worker in workers:
        for use in worker.load.uses if worker.load is not None else ():
            granted[use.master] = granted.get(use.master, 0) + use.granted
            running[use.master] = running.get(use.master, 0) + use.running
    return [
        ListedMaster(
            name=master.name,
            host=master.host,
            for_s=round(now - master.since, 3),
            granted=granted.get(master.name, 0),
            running=running.get(master.name, 0),
        )
        for master in registry.masters()
    ]
