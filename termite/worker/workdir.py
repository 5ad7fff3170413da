"""The worker's directory under `-tmpdir`, and what a killed predecessor left there.

Each worker holds a lock on its own directory for as long as it lives, so a directory whose lock is
free is rubbish, and only such a one is ever cleared.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import shutil
import tempfile

from termite.errors import UsageError

log = logging.getLogger(__name__)

PREFIX = "termite-worker-"
_LOCK = "lock"


class WorkDir:
    """`path` exists, mode 0755, until `remove`."""

    def __init__(self, tmpdir: str) -> None:
        """UsageError if `tmpdir` is missing or cannot be written."""
        if not os.path.isdir(tmpdir):
            raise UsageError(f"-tmpdir {tmpdir}: no such directory; create it or name another one")
        try:
            self.path = tempfile.mkdtemp(prefix=PREFIX, dir=tmpdir)
            os.chmod(self.path, 0o755)
            self._lock = os.open(os.path.join(self.path, _LOCK), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise UsageError(f"-tmpdir {tmpdir}: {e.strerror}; name a directory that this user may write") from e
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def clear_leftovers(tmpdir: str) -> list[str]:
    """Unmounts and removes the directories of workers that no longer live; returns their paths."""
    cleared = []
    try:
        names = [n for n in os.listdir(tmpdir) if n.startswith(PREFIX)]
    except OSError:
        return []
    for name in names:
        path = os.path.join(tmpdir, name)
        try:
            lock = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # being made or removed by its owner, or not ours to touch
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _unmount_below(path)
            shutil.rmtree(path, ignore_errors=True)
            cleared.append(path)
            log.info("cleared %s, left by a worker that was killed", path)
        except BlockingIOError:
            continue  # its worker lives
        finally:
            os.close(lock)
    return cleared


def _unmount_below(path: str) -> None:
    """Detaches every mount below the directory, innermost first."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/mountinfo", "rb") as table:
        points = [line.split(b" ")[4].replace(b"\\040", b" ") for line in table]
    for point in sorted(points, key=len, reverse=True):
        if point.startswith(os.fsencode(path) + b"/"):
            libc.umount2(point, 2)  # MNT_DETACH
