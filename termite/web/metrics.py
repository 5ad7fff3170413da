"""Records as Prometheus sees them; each daemon has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from termite.web.status import (
    CoordinatorStatus,
    Histogram,
    MasterStatus,
    Phase,
    Record,
    WorkerStatus,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Exposition(Collector):
    """A registry over a daemon's `status`."""

    def __init__(self, status: Callable[[], Record]) -> None:
        self._status = status
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering asks for nothing

    def collect(self) -> Iterator[Metric]:
        match self._status():
            case CoordinatorStatus() as status:
                yield from _coordinator(status)
            case WorkerStatus() as status:
                yield from _worker(status)
            case MasterStatus() as status:
                yield from _master(status)

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(f"termite_{name}", help, value=value)


def _gauges(name: str, help: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
    family = GaugeMetricFamily(f"termite_{name}", help, labels=[label])
    for of, value in values:
        family.add_metric([of], value)
    return family


def _counts(name: str, help: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
    family = CounterMetricFamily(f"termite_{name}", help, labels=[label])
    for of, value in values:
        family.add_metric([of], value)
    return family


def _phases(daemon: str, phases: list[Phase]) -> Iterator[Metric]:
    took = SummaryMetricFamily(f"termite_{daemon}_phase_seconds", "Time spent in each phase", labels=["phase"])
    for phase in phases:
        took.add_metric([phase.phase], phase.count, phase.total_s)
    yield took
    longest = [(phase.phase, phase.max_s) for phase in phases]
    yield _gauges(f"{daemon}_phase_seconds_max", "Longest time spent in each phase", "phase", longest)


def _sizes(name: str, help: str, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(f"termite_{name}", help)
    so_far = 0
    buckets: list[tuple[str, float]] = []
    for bucket in histogram.buckets:
        so_far += bucket.files
        buckets.append((str(float(bucket.up_to)), so_far))
    family.add_metric([], [*buckets, ("+Inf", histogram.files)], histogram.bytes)
    return family


def _coordinator(status: CoordinatorStatus) -> Iterator[Metric]:
    yield _gauge("coordinator_up_seconds", "Time since the start", status.up_s)
    yield _gauge("coordinator_workers", "Workers listed", len(status.workers))
    yield _gauge("coordinator_masters", "Masters connected", len(status.masters))
    yield _gauge("coordinator_slots", "Job slots of all workers", status.jobs)
    yield _gauge("coordinator_running", "Commands running on all workers", status.running)
    heard = [(worker.name, worker.load) for worker in status.workers if worker.load is not None]
    slots = [(worker.name, float(worker.jobs)) for worker in status.workers]
    yield _gauges("coordinator_worker_slots", "Job slots", "worker", slots)
    yield _gauges("coordinator_worker_running", "Commands running", "worker", [(n, r.running) for n, r in heard])
    yield _gauges("coordinator_worker_load1", "Load over one minute", "worker", [(n, r.load) for n, r in heard])
    cpu = [(n, r.cpu / 100) for n, r in heard]
    yield _gauges("coordinator_worker_cpu_ratio", "Share of the cores in use", "worker", cpu)


def _worker(status: WorkerStatus) -> Iterator[Metric]:
    yield _gauge("worker_up_seconds", "Time since the start", status.up_s)
    yield _gauge("worker_slots", "Job slots", status.jobs)
    yield _gauge("worker_running", "Commands running", sum(mirror.running for mirror in status.mirrors))
    yield _gauge("worker_waiting", "Commands waiting for a slot", sum(mirror.waiting for mirror in status.mirrors))
    yield _gauge("worker_mirrors", "Masters served", len(status.mirrors))
    yield _gauge("worker_load1", "Load over one minute", status.load)
    yield _gauge("worker_memory_used_bytes", "Memory in use on the machine", status.memory_used)
    yield _gauge("worker_memory_total_bytes", "Memory of the machine", status.memory_total)
    yield _gauge("worker_cache_bytes", "Size of the content store", status.cache_bytes)
    yield _gauge("worker_cache_limit_bytes", "Bound of the content store", status.cache_limit)
    yield _counts("worker_events", "What happened, and how often", "event", status.counts.items())
    yield _counts("worker_file_system_calls", "Calls of the kernel", "call", status.file_system.items())
    yield from _phases("worker", status.phases)


def _master(status: MasterStatus) -> Iterator[Metric]:
    yield _gauge("master_up_seconds", "Time since the start", status.up_s)
    yield _gauge("master_slots_wanted", "Slots asked for", status.wanted)
    yield _gauge("master_slots_granted", "Slots given by workers", status.granted)
    yield _gauge("master_running", "Commands on workers", status.running)
    yield _gauge("master_waiting", "Commands waiting for a worker", status.waiting)
    yield _counts("master_commands", "Commands, by what became of them", "outcome", status.counts.items())
    done = [(name, float(worker.done)) for name, worker in status.workers.items()]
    yield _counts("master_worker_commands", "Commands answered by each worker", "worker", done)
    yield _counts("master_result_files", "Files that commands changed", "kind", [("replayed", status.results.files)])
    yield _counts("master_result_bytes", "Bytes in them", "kind", [("replayed", status.results.bytes)])
    yield _counts("master_hashes", "Files and bytes hashed, hashes kept in xattrs", "what", status.hashed.items())
    yield _sizes("master_told_file_bytes", "Sizes of the files that workers were told of", status.told)
    yield _sizes("master_served_file_bytes", "Sizes of the contents that workers were sent", status.served)
    yield from _phases("master", status.phases)
