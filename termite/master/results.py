"""What a task brought back: contents fetched, the tree changed, everyone told.

A result is fetched whole before the first file is touched, so a worker that dies half-way leaves no
trace.  Results are replayed one task at a time: the tree is always as some serial order left it.
"""

from __future__ import annotations

import asyncio
import logging
import stat
import time
from collections.abc import Callable, Sequence

from termite import paths
from termite.errors import PathError, ReplayError
from termite.master.conflicts import Command, Conflicts
from termite.master.export import Export
from termite.master.link import MirrorLink
from termite.master.replay import Content, Replayed, Replayer, Span, Staged
from termite.master.task import Task
from termite.web.counting import Timings
from termite.wire.messages import Change, Done, FileResult

log = logging.getLogger(__name__)

INLINE_REPLAY_FILES = 64
INLINE_REPLAY_BYTES = 1 << 20
"""A result up to this size is replayed on the event loop (well under 5 ms); larger ones on a thread."""

Contents = dict[bytes, Content]
Tell = Callable[[list[Change]], None]

MOST_NAMES = 50
"""Of the files that a command changed, in the log."""


class Results:
    def __init__(self, replayer: Replayer, export: Export) -> None:
        self._replayer = replayer
        self._export = export
        self._lock = asyncio.Lock()
        self.replays_aside = False  # a thread is at the tree, and no one else may be
        self.conflicts = Conflicts()
        self.files = 0
        self.bytes = 0
        self.timings = Timings()

    def report_conflicts(self, task: Task, files: dict[bytes, bytes | None]) -> None:
        """Says so when a command that ran at the same time has changed one of these files as well."""
        for conflict in self.conflicts.changed(Command(task.id, task.label()), files, time.monotonic_ns()):
            task.conflicts += 1
            log.warning("task %d: %s", task.id, conflict)
            task.caller.message(str(conflict))

    async def take(self, task: Task, link: MirrorLink, done: Done, body: bytes, tell: Tell) -> None:
        """Puts a task's results into the tree and tells the mirrors; PeerLost or StoreError if contents cannot be had.

        From the first change on it runs to its end, whatever happens to the caller.
        """
        if not done.files:
            return
        contents: Contents = {}
        try:
            for result in done.files:
                if _needs_contents(result):
                    contents[result.path] = await self._contents(task, link, result, body)
            span = Span(task.sent_ns, task.received_ns, done.started_ns, done.ended_ns, link.offset_ns)
            arguments = task, done, contents, span, tell
            if self._lock.locked() or not _is_small(done.files, contents):
                await asyncio.shield(self._replay_in_turn(*arguments))
            else:
                self._replay_at_once(*arguments)
        finally:
            for content in contents.values():
                if isinstance(content, Staged):
                    content.close()

    async def _contents(self, task: Task, link: MirrorLink, result: FileResult, body: bytes) -> Content:
        size = result.attr.size
        self.bytes += size
        task.brought_bytes += size
        if result.inline_at >= 0:
            if result.inline_at + size > len(body):
                raise PathError(f"the result for {result.path!r} is cut short")
            return memoryview(body)[result.inline_at : result.inline_at + size]
        staged = self._replayer.stage(size, result.attr.hash)
        try:
            with self.timings.measure("fetch"):
                await link.fetch(result.attr.hash, result.path, staged.write)
                staged.finish()
        except BaseException:
            staged.close()
            raise
        return staged

    def _replay_at_once(self, task: Task, done: Done, contents: Contents, span: Span, tell: Tell) -> None:
        started = time.monotonic()
        try:
            replayed = self._replayer.apply(done.files, contents, span)
        except ReplayError:
            self._failed(done, tell)
            raise
        self._replayed(task, done, replayed, started, tell)

    async def _replay_in_turn(self, task: Task, done: Done, contents: Contents, span: Span, tell: Tell) -> None:
        async with self._lock:
            if _is_small(done.files, contents):
                self._replay_at_once(task, done, contents, span, tell)
                return
            started = time.monotonic()
            self.replays_aside = True
            try:
                replayed = await asyncio.to_thread(self._replayer.apply, done.files, contents, span)
            except ReplayError:
                self._failed(done, tell)
                raise
            finally:
                self.replays_aside = False
            self._replayed(task, done, replayed, started, tell)

    def _failed(self, done: Done, tell: Tell) -> None:
        """Some of it may be new, some old."""
        tell(self._export.note([r.path for r in done.files], {}))

    def _replayed(self, task: Task, done: Done, replayed: Replayed, started: float, tell: Tell) -> None:
        hashes = {r.path: r.attr.hash for r in done.files if r.attr.hash}
        tell(self._export.note(replayed.changed, hashes))
        self.timings.add("replay", time.monotonic() - started)
        self.report_conflicts(task, _written(done.files))
        self.files += len(done.files)
        for note in replayed.notes:
            log.info("task %d: %s", task.id, note)


def names_of(files: Sequence[FileResult]) -> str:
    """What a command changed, for the log."""
    shown = [("-" if file.attr.mode == 0 else "") + paths.for_people(paths.absolute(file.path)) for file in files]
    more = [f"and {len(shown) - MOST_NAMES} more"] if len(shown) > MOST_NAMES else []
    return ", ".join([*shown[:MOST_NAMES], *more]) or "nothing"


def _written(files: list[FileResult]) -> dict[bytes, bytes | None]:
    """The names that were written or removed, with what they stand for now; not directories."""
    return {
        result.path: (result.attr.hash or result.attr.target) if result.attr.mode else None
        for result in files
        if not result.attr.is_dir() and not result.kept
    }


def _is_small(files: list[FileResult], contents: Contents) -> bool:
    """Is so little to be done that the event loop can do it?"""
    inline = sum(len(c) for c in contents.values() if not isinstance(c, Staged))
    inline += sum(r.attr.size for r in files if r.moved_from)  # are read once more
    return len(files) <= INLINE_REPLAY_FILES and inline <= INLINE_REPLAY_BYTES


def _needs_contents(result: FileResult) -> bool:
    return stat.S_ISREG(result.attr.mode) and not result.link_to and not result.kept
