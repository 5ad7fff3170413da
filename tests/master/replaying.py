"""Projects, and results to be replayed into them."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from pathlib import Path

from termite.attr.fileattr import ABSENT, FileAttr
from termite.master.replay import Content, Replayed, Replayer, Span
from termite.wire.messages import FileResult

OLD = 1_500_000_000 * 10**9
SECOND = 10**9


class Tree:
    """A project and the results to be replayed into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o755)
        self.root = os.fsencode(path)
        self.replayer = Replayer(self.root)
        self.files: list[FileResult] = []
        self.contents: dict[bytes, Content] = {}
        self.begin()

    def begin(self) -> None:
        """What exists now, a command sent from here on can have seen."""
        now = time.time_ns() + 10_000_000  # the kernel's clock ticks coarsely
        self.span = Span(now, now + SECOND, now, now + SECOND, 0)

    def at(self, name: str | bytes) -> bytes:
        return self.root[1:] + b"/" + os.fsencode(name) if name else self.root[1:]

    def file(
        self,
        name: str,
        data: bytes = b"data",
        *,
        mode: int = 0o644,
        mtime: int = 0,
        in_place: bool = False,
        was: str = "",
    ) -> None:
        hash = hashlib.sha256(data).digest()
        attr = FileAttr(stat.S_IFREG | mode, len(data), mtime or self.span.started_ns, hash=hash)
        moved_from = self.at(was) if was else b""
        self.files.append(FileResult(self.at(name), attr, inline_at=0, in_place=in_place, moved_from=moved_from))
        self.contents[self.at(name)] = data

    def directory(self, name: str, *, mode: int = 0o755, mtime: int = 0, opaque: bool = False, was: str = "") -> None:
        attr = FileAttr(stat.S_IFDIR | mode, mtime_ns=mtime or self.span.started_ns)
        moved_from = self.at(was) if was else b""
        self.files.append(FileResult(self.at(name), attr, opaque=opaque, moved_from=moved_from))

    def symlink(self, name: str, target: bytes) -> None:
        attr = FileAttr(stat.S_IFLNK | 0o777, mtime_ns=OLD, target=target)
        self.files.append(FileResult(self.at(name), attr))

    def removed(self, name: str) -> None:
        self.files.append(FileResult(self.at(name), ABSENT))

    def link(self, name: str, to: str) -> None:
        self.files.append(FileResult(self.at(name), FileAttr(stat.S_IFREG | 0o644), link_to=self.at(to)))

    def attributes(self, name: str, mode: int, mtime: int) -> None:
        attr = FileAttr(stat.S_IFREG | mode, mtime_ns=mtime)
        self.files.append(FileResult(self.at(name), attr, kept=True, in_place=True))

    def apply(self) -> Replayed:
        files, self.files = self.files, []
        return self.replayer.apply(files, self.contents, self.span)

    def has(self, name: str, data: str = "x") -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(data)
        return path

    def leftovers(self) -> list[Path]:
        return list(self.path.rglob(".termite-tmp-*"))
