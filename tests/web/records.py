"""Records with everything in them, and with texts that want to be markup."""

from __future__ import annotations

import msgspec

from termite.web.counting import Sizes, Timings
from termite.web.status import (
    Amount,
    CoordinatorStatus,
    FailedTask,
    Line,
    ListedMaster,
    ListedWorker,
    Load,
    LogStatus,
    MasterStatus,
    MasterUse,
    MasterWorker,
    MirrorStatus,
    Plot,
    RunningTask,
    WorkerStatus,
)

NASTY = """<script>alert("x")</script>&'"\x1b[31m\\ {{ 7*7 }} \N{RIGHT-TO-LEFT OVERRIDE}"""
TASK = RunningTask(7, f"cc {NASTY}", 1.5, master=NASTY, worker=NASTY)
PLOT = Plot("CPU", "%", 100.0, [Line("busy", [1.0, 250.0, -3.0]), Line("disk wait", [0.0, 1.0, 2.0])])
EMPTY_PLOT = Plot("Nothing", "B/s", 0.0, [Line("read", [])])


def phases() -> Timings:
    timings = Timings()
    timings.add("run", 0.5)
    timings.add("run", 1.5)
    return timings


def sizes() -> Sizes:
    sizes = Sizes()
    for size in (0, 1, 5, 70_000):
        sizes.add(size)
    return sizes


def load() -> Load:
    return Load(0.5, NASTY, 1.5, 50.0, 1 << 30, 4 << 30, 1, 9, [MasterUse(NASTY, 4, 1)], [TASK])


def listed(name: str = NASTY, host: str = "10.0.0.7", web_port: int = 1332) -> ListedWorker:
    return ListedWorker(name, host, 1232, 4, "x86_64", "1", web_port, 60.0, load())


def coordinator() -> CoordinatorStatus:
    new = msgspec.structs.replace(listed("new", web_port=0), load=None)
    masters = [ListedMaster(NASTY, "10.0.0.8", 5.0, 4, 1)]
    return CoordinatorStatus("1", 90_000.0, 8, 1, [listed(), new], masters, [NASTY], True)


def worker() -> WorkerStatus:
    return WorkerStatus(
        name=NASTY, version="1", arch="x86_64", state=NASTY, up_s=1.0, jobs=4, cores=2, load=0.5, memory_used=1,
        memory_total=2, cache_bytes=3, cache_limit=4, disk_free=5, coordinators=[NASTY],
        mirrors=[MirrorStatus(NASTY, 4, 4, 1, 0, 9)], tasks=[TASK], counts={NASTY: 3, "bytes of results": 4096},
        file_system={"read": 5}, phases=phases().phases(), plots=[PLOT, EMPTY_PLOT],
    )  # fmt: skip


def master() -> MasterStatus:
    return MasterStatus(
        name=NASTY, version="1", up_s=1.0, jobs=4, running=1, waiting=0, wanted=4, granted=4, counts={"remote": 3},
        results=Amount(2, 4096), hashed={"files": 1, "bytes": 2},
        workers={NASTY: MasterWorker("open", 4, 4, 4, 1, 2, 1)},
        tasks=[TASK], failed=[FailedTask(3, NASTY, "exit 1", NASTY, 0.0)], conflicts=[NASTY], breaches=[NASTY],
        phases=phases().phases(), told=sizes().histogram(), served=Sizes().histogram(), plots=[PLOT, EMPTY_PLOT],
    )  # fmt: skip


def log() -> LogStatus:
    return LogStatus(NASTY, NASTY, f"one line\n{NASTY}\n")
