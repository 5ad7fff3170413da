"""The end of this process's log, for people who look at it from elsewhere."""

from __future__ import annotations

import logging
import os
from collections import deque

from termite.web.status import LogStatus

TAIL_BYTES = 64 << 10


class LogRing(logging.Handler):
    """Remembers the latest lines; used where the log goes to no file of ours.  Any thread."""

    def __init__(self, limit: int = TAIL_BYTES) -> None:
        super().__init__()
        self._limit = limit
        self._lines: deque[str] = deque()
        self._held = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)[-self._limit :]
        except Exception:
            self.handleError(record)
            return
        self._lines.append(line)
        self._held += len(line) + 1
        while self._held > self._limit and len(self._lines) > 1:
            self._held -= len(self._lines.popleft()) + 1

    def text(self) -> str:
        self.acquire()
        try:
            return "".join(f"{line}\n" for line in self._lines)
        finally:
            self.release()


def end_of_file(path: str, limit: int = TAIL_BYTES) -> str:
    """The last whole lines of a file, `limit` bytes at most; a line about it if it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - limit))
            tail = file.read(limit)
    except OSError as error:
        return f"{path}: {error.strerror}\n"
    if size > limit:
        tail = tail.partition(b"\n")[2] or tail
    return tail.decode("utf-8", "backslashreplace")


class LogTail:
    """`start` once logging is set up; `status` at any time.  `path` empty: what is logged is kept in memory too."""

    def __init__(self, path: str = "") -> None:
        self._path = path
        self._ring = LogRing()

    def start(self) -> None:
        """Listens in on the log, in the form that its first handler gives it."""
        root = logging.getLogger()
        if not self._path:
            if root.handlers:
                self._ring.setFormatter(root.handlers[0].formatter)
            root.addHandler(self._ring)

    def stop(self) -> None:
        logging.getLogger().removeHandler(self._ring)

    def status(self, name: str) -> LogStatus:
        text = end_of_file(self._path) if self._path else self._ring.text()
        return LogStatus(name, self._path, text)
