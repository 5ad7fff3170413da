"""What the pages, their JSON and `/metrics` show: one plain record per daemon.

Each daemon fills its own in `status()`; whoever renders one needs to know nothing else.  Texts are as
the daemons have them, hostile letters included: escaping is the business of `render.py` and
`metrics.py`.  Times ending in `_s` are seconds, `at` is Unix time.
"""

from __future__ import annotations

import msgspec

SHOWN_TASKS = 200
"""How many running tasks a record names at most."""


class Record(msgspec.Struct, frozen=True):
    """Base of all."""


class Line(Record, frozen=True):
    """One curve of a plot: its latest values, oldest first."""

    name: str
    values: list[float]


class Plot(Record, frozen=True):
    """The last minutes of something, one value per second."""

    title: str
    unit: str  # "%", "B/s", "/s" or "" (a count)
    top: float  # the value at the upper edge; 0: whatever the largest is
    lines: list[Line]


class Phase(Record, frozen=True):
    """How long one step of a task took, over all tasks so far."""

    phase: str
    count: int
    total_s: float
    max_s: float

    @property
    def mean_s(self) -> float:
        return self.total_s / self.count if self.count else 0.0


class Bucket(Record, frozen=True):
    """Files of at most so many bytes, and more than the bucket before."""

    up_to: int
    files: int
    bytes: int


class Histogram(Record, frozen=True):
    """How large the files are."""

    files: int
    bytes: int
    buckets: list[Bucket]  # without gaps, from the smallest that holds any to the largest


class RunningTask(Record, frozen=True):
    id: int  # unique per master
    label: str  # the command, as one short line
    for_s: float
    master: str = ""  # on a worker: whose task
    worker: str = ""  # on a master: where it runs


class FailedTask(Record, frozen=True):
    id: int
    label: str
    status: str  # "exit 1", "signal 9"
    worker: str
    at: float


# -- coordinator ----------------------------------------------------------------------------------


class MasterUse(Record, frozen=True):
    """What one master has of one worker."""

    master: str
    granted: int
    running: int


class Load(Record, frozen=True):
    """A worker's own word on how it is, `age_s` old."""

    age_s: float
    state: str  # "running", or what it is about to do
    load: float  # over one minute
    cpu: float  # percent of all cores
    memory_used: int
    memory_total: int
    running: int
    done: int
    uses: list[MasterUse]
    tasks: list[RunningTask]


class ListedWorker(Record, frozen=True):
    name: str
    host: str  # as the coordinator reaches it
    port: int
    jobs: int
    arch: str
    version: str
    web_port: int  # 0: no pages
    for_s: float
    load: Load | None  # None: it has not said yet


class ListedMaster(Record, frozen=True):
    name: str
    host: str
    for_s: float
    granted: int  # over all workers
    running: int


class CoordinatorStatus(Record, frozen=True):
    version: str
    up_s: float
    jobs: int
    running: int
    workers: list[ListedWorker]
    masters: list[ListedMaster]
    notes: list[str]  # the latest commands given, newest first
    takes_commands: bool  # there is a password


# -- worker ---------------------------------------------------------------------------------------


class MirrorStatus(Record, frozen=True):
    master: str
    wanted: int
    granted: int
    running: int
    waiting: int
    done: int


class WorkerStatus(Record, frozen=True):
    name: str
    version: str
    arch: str
    state: str
    up_s: float
    jobs: int
    cores: int
    load: float
    memory_used: int
    memory_total: int
    cache_bytes: int
    cache_limit: int
    disk_free: int  # where the cache lies
    coordinators: list[str]
    mirrors: list[MirrorStatus]
    tasks: list[RunningTask]
    counts: dict[str, int]
    file_system: dict[str, int]  # what commands asked of the mirrors, as far as the kernel did not know
    phases: list[Phase]
    plots: list[Plot]


class LogStatus(Record, frozen=True):
    """The end of a log."""

    name: str
    source: str  # a file's name; empty: memory
    text: str


# -- master ---------------------------------------------------------------------------------------


class MasterWorker(Record, frozen=True):
    """A worker as a master sees it."""

    state: str
    jobs: int
    wanted: int
    granted: int
    running: int
    done: int
    failures: int  # in a row


class Amount(Record, frozen=True):
    files: int
    bytes: int


class MasterStatus(Record, frozen=True):
    name: str
    version: str
    up_s: float
    jobs: int
    running: int
    waiting: int
    wanted: int
    granted: int
    counts: dict[str, int]
    results: Amount
    hashed: dict[str, int]  # files and bytes that were read for it, hashes recalled from and saved to xattrs
    workers: dict[str, MasterWorker]
    tasks: list[RunningTask]
    failed: list[FailedTask]
    conflicts: list[str]  # files that two commands changed at the same time, latest last
    breaches: list[str] | None  # what -paranoia found; None: it does not look
    phases: list[Phase]
    told: Histogram
    served: Histogram
    plots: list[Plot]


Status = CoordinatorStatus | WorkerStatus | MasterStatus
