"""Which workers live, and which masters want to know: the coordinator's whole memory.

A plain object: no sockets, no clock.  A connection is any hashable thing that stands for one; what
it registered lives until `drop`.  Times are seconds, from whatever clock the caller uses.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import msgspec

from termite.errors import Refused
from termite.wire.messages import WorkerInfo, WorkerReport

MAX_TEXT = 255
"""Bytes of a name, host, architecture or version."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One entry of the list."""

    info: WorkerInfo
    wanted_name: str  # as it called itself; `info.name` is unique
    since: float
    report: WorkerReport | None = None  # the latest; None: none yet
    reported: float = 0.0  # when that came


@dataclass(frozen=True, slots=True)
class Master:
    """One that gets the list."""

    name: str
    host: str
    since: float


class Registry:
    """Workers and masters by connection."""

    def __init__(self) -> None:
        self._workers: dict[Hashable, Worker] = {}
        self._masters: dict[Hashable, Master] = {}

    def register(self, connection: Hashable, info: WorkerInfo, now: float) -> WorkerInfo:
        """Puts a worker on the list and returns its entry; Refused if it makes no sense.

        Registering again on the same connection replaces what was said before.  A worker at the same
        host and port is the same worker come back, whose old connection has not been missed yet: the
        new connection takes its place.
        """
        _check_info(info)
        before = self._workers.pop(connection, None)
        for other, worker in list(self._workers.items()):
            if (worker.info.host, worker.info.port) == (info.host, info.port):
                del self._workers[other]
        listed = msgspec.structs.replace(info, name=self._unique(info.name))
        self._workers[connection] = (
            replace(before, info=listed, wanted_name=info.name) if before else Worker(listed, info.name, now)
        )
        return listed

    def report(self, connection: Hashable, report: WorkerReport, now: float) -> None:
        """Notes how a worker is; nothing if it is not, or no longer, on the list."""
        worker = self._workers.get(connection)
        if worker is not None:
            self._workers[connection] = replace(worker, report=report, reported=now)

    def subscribe(self, connection: Hashable, master: str, host: str, now: float) -> None:
        """Notes a master that wants the list; Refused if its name makes no sense."""
        _check_text("master's name", master, may_be_empty=False)
        self._masters[connection] = Master(master, host, now)

    def drop(self, connection: Hashable) -> Worker | Master | None:
        """Forgets what this connection stood for, and says what that was."""
        return self._workers.pop(connection, None) or self._masters.pop(connection, None)

    def knows(self, connection: Hashable) -> bool:
        return connection in self._workers or connection in self._masters

    def workers(self) -> list[WorkerInfo]:
        """The list, by name."""
        return sorted((worker.info for worker in self._workers.values()), key=lambda info: info.name)

    def subscribers(self) -> list[Hashable]:
        return list(self._masters)

    def listing(self) -> list[Worker]:
        """All that is known of the workers, by name."""
        return sorted(self._workers.values(), key=lambda worker: worker.info.name)

    def masters(self) -> list[Master]:
        """By name."""
        return sorted(self._masters.values(), key=lambda master: master.name)

    def connections(self, name: str) -> list[Hashable]:
        """Of the worker that is listed under this name, or of all of them if it is empty."""
        return [connection for connection, worker in self._workers.items() if name in ("", worker.info.name)]

    def check(self) -> None:
        """Asserts what must always hold."""
        infos = [worker.info for worker in self._workers.values()]
        names = [info.name for info in infos]
        assert len(set(names)) == len(names), f"two workers of one name: {sorted(names)}"
        places = [(info.host, info.port) for info in infos]
        assert len(set(places)) == len(places), f"two workers at one address: {sorted(places)}"
        assert all(info.host for info in infos), "a worker that nobody can dial"
        assert not self._workers.keys() & self._masters.keys(), "a connection that is worker and master"

    def _unique(self, name: str) -> str:
        taken = {worker.info.name for worker in self._workers.values()}
        number, unique = 1, name
        while unique in taken:
            number += 1
            unique = f"{name}#{number}"
        return unique


def _check_info(info: WorkerInfo) -> None:
    _check_text("worker's name", info.name, may_be_empty=False)
    _check_text("worker's host", info.host, may_be_empty=False)
    _check_text("worker's architecture", info.arch)
    _check_text("worker's version", info.version)
    for what, number, low, high in (
        ("port", info.port, 1, 65535),
        ("web port", info.web_port, 0, 65535),
        ("number of jobs", info.jobs, 0, 1 << 20),
    ):
        if not low <= number <= high:
            raise Refused(f"a worker's {what} must be {low} to {high}, not {number}")


def _check_text(what: str, text: str, may_be_empty: bool = True) -> None:
    if not (text or may_be_empty) or len(text) > MAX_TEXT or not text.isprintable():
        raise Refused(f"a {what} must be one printable line of at most {MAX_TEXT} letters, not {text[:40]!r}")
