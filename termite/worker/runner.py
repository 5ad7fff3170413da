"""A mirror's commands: each waits for its turn, runs in a box (`task.py`), leaves its results to be fetched.

A command that failed while memory for its files was short runs once more, on disk.
"""

from __future__ import annotations

import asyncio
import logging
import stat
from functools import partial

import msgspec

from termite import paths
from termite.attr.fileattr import FileAttr
from termite.errors import BoxError, Canceled, StoreError, TermiteError
from termite.mirror.overlay import Reaped
from termite.mirror.view import View
from termite.store.recent import RecentStore
from termite.web.counting import Timings
from termite.wire.messages import Done, Run, WantStdin
from termite.wire.rpc import Connection, Reply
from termite.worker.habits import Habits
from termite.worker.results import LargeResults
from termite.worker.scratch import SAMPLE_EVERY_S, Scratch, Sweeper
from termite.worker.slots import Turns
from termite.worker.spilling import Spiller
from termite.worker.task import TaskPlace, TaskRun

log = logging.getLogger(__name__)


class Runner:
    """`run`, `cancel`, `close`.  Loop only, but for `close`."""

    def __init__(
        self,
        conn: Connection,
        view: View,
        scratch: Scratch,
        sweeper: Sweeper,
        store: RecentStore,
        turns: Turns,
        timings: Timings,
    ) -> None:
        self.tasks: dict[int, TaskRun] = {}  # those that run
        self.done = 0
        self.result_bytes = 0
        self.results = LargeResults(store)
        self._conn = conn
        self._view = view
        self._scratch = scratch
        self._sweeper = sweeper
        self._turns = turns
        self._timings = timings
        self._habits = Habits()
        self._spiller = Spiller(store, lambda: self.tasks)
        self._sampler: asyncio.TimerHandle | None = None

    async def run(self, run: Run, place: TaskPlace) -> Reply:
        """The reply that the master waits for; BoxError, Canceled or StoreError if there is none."""
        try:
            with self._timings.measure("wait for a slot"):
                await self._turns.take()
            try:
                reply, reaped = await self._run_in_box(run, place)
            finally:
                self._turns.give_back()
        except (BoxError, Canceled, StoreError) as e:
            log.warning("task %d: %s", run.task, e)
            raise
        assert isinstance(reply.message, Done)
        self.results.keep(reply.message)
        self.result_bytes += sum(
            file.attr.size for file in reply.message.files if file.attr.hash and not file.kept and not file.link_to
        )
        self._habits.note(run.cwd, reaped.directories)
        for note in reaped.notes:
            log.info("task %d: %s", run.task, note)
        if run.debug:
            ms = (reply.message.ended_ns - reply.message.started_ns) / 1e6
            files = len(reply.message.files)
            log.info("task %d: status %d, %.1f ms in its box, %d files", run.task, reply.message.status, ms, files)
        self.done += 1
        return reply

    def cancel(self, number: int) -> None:
        """This task, if it runs."""
        task = self.tasks.get(number)
        if task is not None:
            task.cancel()

    def cancel_all(self, error: TermiteError | None = None) -> None:
        for task in list(self.tasks.values()):
            task.cancel(error)

    def stop(self) -> None:
        """When all tasks have ended: nothing is fetched, and no timer runs, any more."""
        self.results.close()
        self._spiller.stop()
        if self._sampler is not None:
            self._sampler.cancel()

    def close(self) -> None:
        """After `stop`; blocks."""
        self._spiller.close()
        self._sweeper.close()

    async def _run_in_box(self, run: Run, place: TaskPlace) -> tuple[Reply, Reaped]:
        """Runs the command; once more, on disk, if it failed when memory for its files was short."""
        task, on_disk = self._task(run, place, on_disk=False, skip=[0, 0, 0])
        reply, reaped = await self._run_task(task)
        assert isinstance(reply.message, Done)
        if reply.message.status == 0 or on_disk or not self._scratch.was_tight(task.started):
            return reply, reaped
        if task.stdin_read:
            raise BoxError("failed while memory for its files was short, after it had read its stdin")
        log.info("task %d: failed while memory for its files was short; again on disk", run.task)
        task, _ = self._task(run, place, on_disk=True, skip=task.sent)
        return await self._run_task(task)

    def _task(self, run: Run, place: TaskPlace, *, on_disk: bool, skip: list[int]) -> tuple[TaskRun, bool]:
        directory, on_disk = self._scratch.place(on_disk)
        task = TaskRun(
            run,
            place,
            directory,
            _own_root(place),
            self._habits.expected(run.cwd, lambda name: self._view.seen(paths.join(place.root, name))),
            lambda message, body: self._conn.call(message, body=body, timeout_s=None),
            partial(self._ask_stdin, run.task),
            skip,
        )
        return task, on_disk

    async def _run_task(self, task: TaskRun) -> tuple[Reply, Reaped]:
        number = task.request.task
        self.tasks[number] = task
        self._sample_soon()
        try:
            return await task.run()
        finally:
            del self.tasks[number]
            self._sweeper.remove(task.directory)
            self._spiller.soon()

    def _sample_soon(self) -> None:
        if self._sampler is None:
            self._sampler = asyncio.get_running_loop().call_later(SAMPLE_EVERY_S, self._sample)

    def _sample(self) -> None:
        """Watches the memory while tasks run."""
        self._sampler = None
        if self.tasks:
            self._scratch.sample()
            self._sample_soon()

    async def _ask_stdin(self, task: int) -> bytes:
        reply = await self._conn.call(WantStdin(task), timeout_s=None)
        assert isinstance(reply.body, bytes)
        return reply.body


def _own_root(place: TaskPlace) -> FileAttr:
    """How the writable root looks; it belongs to the task."""
    known = place.known(place.root) or FileAttr(mode=stat.S_IFDIR | 0o755)
    return msgspec.structs.replace(known, uid=place.uid, gid=place.gid)
