"""While a thread is at the tree, the master knows it; afterwards, whatever became of it, that is over."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import time
from pathlib import Path
from typing import cast

import pytest

from termite.attr.fileattr import FileAttr
from termite.errors import ReplayError
from termite.master.export import Export
from termite.master.local import Caller, Kind, LocalRequest
from termite.master.replay import Content, Contents, Replayed, Replayer, Span
from termite.master.results import INLINE_REPLAY_FILES, Results
from termite.master.task import Task
from termite.wire.messages import Done, FileResult


class Watched(Replayer):
    """Notes what `results` says of itself during each replay; fails if told to."""

    results: Results
    fails = False

    def apply(self, files: list[FileResult], contents: Contents, clock: Span) -> Replayed:
        self.seen = self.results.replays_aside
        if self.fails:
            raise ReplayError("no room")
        return super().apply(files, contents, clock)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("files", [1, INLINE_REPLAY_FILES + 1])
def test_a_large_result_is_put_into_the_tree_aside_and_nobody_else_may(files: int, fails: bool, tmp_path: Path) -> None:
    root = os.fsencode(tmp_path)
    replayer = Watched(root)
    replayer.results = results = Results(replayer, Export(root[1:]))
    replayer.fails = fails
    request = LocalRequest(Kind.RUN, 0, 0o22, root, b"", b"", [b"make"], [])
    task = Task(1, request, cast(Caller, None))
    now = time.time_ns()
    span = Span(now, now, now, now, 0)
    names = [root[1:] + b"/%d" % number for number in range(files)]
    done = Done(
        0,
        [
            FileResult(name, FileAttr(stat.S_IFREG | 0o644, 1, now, hash=hashlib.sha256(b"x").digest()), inline_at=0)
            for name in names
        ],
    )
    contents: dict[bytes, Content] = dict.fromkeys(names, b"x")
    try:
        asyncio.run(results._replay_in_turn(task, done, contents, span, lambda changes: None))
    except ReplayError:
        assert fails
    assert replayer.seen is (files > INLINE_REPLAY_FILES)
    assert not results.replays_aside
    assert len(os.listdir(root)) == (0 if fails else files)
