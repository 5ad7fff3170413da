"""Which commands changed the same file while both were running.

Such commands depend on each other and do not say so: their order, and with it the result, is chance.
Pure: is told when a task was sent, what its result changed, when it ended; answers with the conflicts
found.  Times are nanoseconds of one clock that does not go back.

A change is remembered only as long as a task runs that was sent before the change was in the tree, for
only that one cannot have seen it.  So a serial build remembers nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from termite import paths

MAX_CHANGES = 50_000
"""Changes remembered; of more, the oldest cannot be part of a conflict any more."""

RECENT = 100
"""Conflicts kept for those who ask later."""


class Command(NamedTuple):
    task: int
    label: str  # the command, as one short line


class Write(NamedTuple):
    """One change of one path."""

    by: Command
    at_ns: int  # when it was in the tree
    contents: bytes  # hash of a file's new contents; empty: unknown, or the path was removed
    removed: bool


@dataclass(frozen=True)
class Conflict:
    """Two commands changed `path`; what `second` did is there now."""

    path: bytes
    first: Command
    second: Command
    first_ns: int
    second_ns: int
    same: bool  # both left the same behind
    more: int = 0  # further paths of the same two commands

    def __str__(self) -> str:
        others = f" and {self.more} more" if self.more else ""
        outcome = "both left the same" if self.same else f"what task {self.second.task} left is there now"
        return (
            f"{paths.for_people(paths.absolute(self.path))}{others} was changed by two commands that ran at the same "
            f"time, {max(0, self.second_ns - self.first_ns) / 1e6:.0f} ms apart: task {self.first.task} "
            f"({self.first.label}) and task {self.second.task} ({self.second.label}); {outcome}"
        )


class Conflicts:
    def __init__(self, max_changes: int = MAX_CHANGES) -> None:
        self.recent: deque[Conflict] = deque(maxlen=RECENT)
        self.found = 0
        self._max = max_changes
        self._running: dict[int, int] = {}  # task -> when it was sent
        self._changes: dict[bytes, Write] = {}  # path -> its latest change; the oldest first

    def sent(self, task: int, now_ns: int) -> None:
        """A task was sent to a worker (or once more to another one)."""
        self._running[task] = now_ns
        self._forget_old()

    def changed(self, command: Command, files: Mapping[bytes, bytes | None], now_ns: int) -> list[Conflict]:
        """The task's changes are in the tree.  `files`: path -> hash of the new contents, None: removed.

        To be called in the order in which results are replayed, before `ended`.  One conflict is returned
        for each other command, however many paths there are.  Directories are no matter of conflict.
        """
        sent_ns = self._running.get(command.task, now_ns)
        others: dict[int, Conflict] = {}
        more: dict[int, int] = {}
        for path, contents in files.items():
            before = self._changes.pop(path, None)
            write = Write(command, now_ns, contents or b"", contents is None)
            self._changes[path] = write
            if before is None or before.by.task == command.task or before.at_ns < sent_ns:
                continue
            task = before.by.task
            same = before.removed == write.removed and before.contents == write.contents
            if task in others:
                more[task] += 1
                if others[task].same and not same:  # the one that matters is the one to name
                    others[task] = self._conflict(path, before, write, same)
            else:
                more[task] = 0
                others[task] = self._conflict(path, before, write, same)
        while len(self._changes) > self._max:
            del self._changes[next(iter(self._changes))]
        self._forget_old()
        found = [Conflict(**{**vars(conflict), "more": more[task]}) for task, conflict in others.items()]
        self.recent.extend(found)
        self.found += len(found)
        return found

    @staticmethod
    def _conflict(path: bytes, before: Write, after: Write, same: bool) -> Conflict:
        return Conflict(path, before.by, after.by, before.at_ns, after.at_ns, same)

    def ended(self, task: int) -> None:
        """The task runs no more, whatever became of it."""
        if self._running.pop(task, None) is not None:
            self._forget_old()

    def _forget_old(self) -> None:
        """Drops the changes that every running task was sent after."""
        if not self._running:
            self._changes.clear()
        if not self._changes:
            return
        oldest = min(self._running.values())
        while self._changes:
            path = next(iter(self._changes))
            if self._changes[path].at_ns >= oldest:
                return
            del self._changes[path]

    def check(self) -> None:
        """Asserts the invariants."""
        assert len(self._changes) <= self._max, len(self._changes)
        assert self._running or not self._changes, "changes are remembered although nothing runs"
        oldest = min(self._running.values(), default=0)
        latest = 0
        for path, write in self._changes.items():
            shown = paths.for_people(path)
            assert write.at_ns >= latest, f"{shown}: changed at {write.at_ns}, listed after {latest}"
            assert write.at_ns >= oldest, f"{shown}: changed at {write.at_ns}, all that runs was sent later: {oldest}"
            latest = write.at_ns
