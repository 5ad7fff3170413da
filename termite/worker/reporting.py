"""What a mirror process tells its daemon for the pages: once a second, and only what has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

import msgspec

from termite import paths
from termite.command.shell import command_text
from termite.errors import WireError
from termite.web.status import SHOWN_TASKS, Phase
from termite.worker import control
from termite.worker.task import TaskRun

REPORT_EVERY_S = 1.0
MAX_LABEL = 200


class TaskReport(msgspec.Struct, frozen=True):
    id: int
    label: str
    started: float  # on the machine's monotonic clock, which is the same in every process


class MirrorReport(msgspec.Struct, frozen=True):
    """Everything since the mirror's start."""

    granted: int
    running: int
    waiting: int
    done: int
    tasks: list[TaskReport]
    phases: list[Phase]
    counts: dict[str, int]
    file_system: dict[str, int]


FROM_MASTERS = "bytes from masters"
RESULTS = "bytes of results"


def mirror_counts(cached: int, asked: int, result_bytes: int, contents: Mapping[str, int]) -> dict[str, int]:
    """A mirror's counters under the names that pages show: `contents` are bytes by where they came from."""
    return {
        "files opened from the cache": cached,
        "files asked of masters": asked,
        "bytes from the cache": contents.get("from_store", 0),
        "bytes from this machine's own files": contents.get("from_own", 0),
        "bytes from other workers": contents.get("from_peers", 0),
        FROM_MASTERS: contents.get("from_master", 0),
        RESULTS: result_bytes,
    }


_decoder = msgspec.json.Decoder(MirrorReport)


def decode_report(report: control.Report) -> MirrorReport:
    try:
        decoded: MirrorReport = _decoder.decode(report.json)
        return decoded
    except msgspec.MsgspecError as e:
        raise WireError(f"a mirror's report: {e}") from None


def task_reports(tasks: Iterable[tuple[int, TaskRun]]) -> list[TaskReport]:
    """Those that run for longest, as people want to read of them."""
    oldest = sorted(tasks, key=lambda item: item[1].started)[:SHOWN_TASKS]
    return [TaskReport(number, _label(task), task.started) for number, task in oldest]


def _label(task: TaskRun) -> str:
    text = paths.for_people(command_text(task.request.program, task.request.argv))
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 3]}..."


class Reporter:
    """`start`, then `stop`."""

    def __init__(self, look: Callable[[], MirrorReport], send: Callable[[control.ControlMessage], None]) -> None:
        self._look = look
        self._send = send
        self._told = b""
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(REPORT_EVERY_S, self._beat)

    def stop(self) -> None:
        """The last word: what happened since the last one counts too."""
        if self._timer is not None:
            self._timer.cancel()
        self._tell()

    def _beat(self) -> None:
        self._tell()
        self.start()

    def _tell(self) -> None:
        report = self._look()
        data = msgspec.json.encode(report)
        if data != self._told:
            self._told = data
            self._send(control.Report(report.running, report.done, data))
