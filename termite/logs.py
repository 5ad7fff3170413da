"""How every process writes its log: one line per event, to a file that may be moved away, or to stderr."""

from __future__ import annotations

import logging
import os
import sys
from logging.handlers import WatchedFileHandler

from termite.errors import UsageError


def start_logging(logfile: str = "", debug: bool = False, prefix: str = "") -> None:
    """From now on.  `prefix` stands before each line's place and tells processes with one file apart."""
    handler: logging.Handler
    if logfile:
        try:
            handler = WatchedFileHandler(logfile, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UsageError(f"-logfile {logfile}: {error.strerror}; name a file that can be written") from None
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(prefix))
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old.formatter, LineFormatter):
            root.removeHandler(old)
            old.close()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("termite").setLevel(logging.DEBUG if debug else logging.INFO)
    for talkative in ("asyncio", "paramiko", "aiohttp.access", "pyroute2"):
        logging.getLogger(talkative).setLevel(logging.WARNING)


class LineFormatter(logging.Formatter):
    """`2014-02-03 12:00:00.123 I master.pool: text`; a traceback, and nothing else, takes more lines."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname).1s %(where)s: %(line)s", "%Y-%m-%d %H:%M:%S")
        self._prefix = prefix

    def formatMessage(self, record: logging.LogRecord) -> str:
        place = record.name.removeprefix("termite.")
        record.where = self._prefix + (place if place != "__main__" else "main")
        record.line = one_line(record.message)
        return super().formatMessage(record)


def one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")


def send_stderr_to(path: str) -> None:
    """Whatever this process and those it starts write to stderr goes to the end of this file; also to open it anew."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UsageError(f"-stderr {path}: {error.strerror}; name a file that can be written") from None
    try:
        os.dup2(fd, 2)
    finally:
        os.close(fd)
