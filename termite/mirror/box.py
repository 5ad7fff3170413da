"""The box a task runs in, as a command line for mkbox.

A mirror makes one *template* when it starts: a mount namespace whose root is a small tmpfs with the
mirror's top-level directories bound into it and its top-level symlinks made natively (the kernel asks
us for every symlink inside a FUSE mount, and /bin, /lib, /lib64 stand in front of nearly every path).
A task joins a copy of it and adds what must be its own: the overlay on the writable root, /tmp,
/var/tmp, /proc.  Only mkbox mounts anything; nothing here touches the file system beyond the
template's directory.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

from termite import paths
from termite.attr.fileattr import FileAttr
from termite.errors import BoxError

OWN_TOP_LEVEL = (b"proc", b"sys", b"dev", b"tmp")
"""Top-level names that are never the mirror's."""

FRESH = (b"tmp", b"var/tmp")
"""Directories that every task gets new and empty."""

_TEMPLATE_LIMIT_S = 60.0


@dataclass(frozen=True)
class BoxUser:
    uid: int
    gid: int


def fresh_branch(root: bytes) -> tuple[bytes, bytes] | None:
    """For a writable root below a fresh directory: (that directory, the branch in it to keep visible).

    The fresh /tmp hides the mirror's, but the branch that leads to the writable root stays.  None if the
    writable root lies elsewhere, or is the branch itself.
    """
    for fresh in FRESH:
        if paths.is_inside(root, fresh) and root != fresh:
            branch = root[len(fresh) + 1 :].split(b"/", 1)[0]
            return (fresh, branch) if paths.join(fresh, branch) != root else None
    return None


class Template:
    """The static part of all boxes of one mirror: a mount namespace, and the network namespace `net_fd`."""

    def __init__(
        self, mkbox: bytes, mountpoint: bytes, box_dir: bytes, root: bytes, user: BoxUser, host: str, net_fd: int
    ) -> None:
        self._mkbox = mkbox
        self._mountpoint = mountpoint
        self._box_dir = box_dir
        self._root = root
        self._user = user
        self._host = host
        self._net_fd = net_fd
        self._mnt_fd = -1
        self._lower_fd = -1

    @property
    def lower_fd(self) -> int:
        """The writable root as the mirror shows it, O_PATH."""
        return self._lower_fd

    def build(self, top: Mapping[bytes, FileAttr]) -> None:
        """(Re)makes the template for this top-level listing; blocks, asks the mirror: not on the event loop."""
        argv = self.template_argv(top)
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, close_fds=True
        )
        assert process.stdout is not None and process.stderr is not None and process.stdin is not None
        try:
            if _read_line(process.stdout.fileno(), _TEMPLATE_LIMIT_S) != b"ready\n":
                process.kill()
                reason = process.stderr.read().decode("utf-8", "replace").strip()
                raise BoxError(f"the box template cannot be made: {reason}")
            mnt_fd = os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            lower_fd = os.open(os.path.join(self._mountpoint, self._root), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            process.stdin.close()
            process.wait(_TEMPLATE_LIMIT_S)
            process.stdout.close()
            process.stderr.close()
        self.close()
        self._mnt_fd, self._lower_fd = mnt_fd, lower_fd
        for fd in (mnt_fd, lower_fd, self._net_fd):
            os.set_inheritable(fd, True)  # mkbox is the only program that this process starts

    def template_argv(self, top: Mapping[bytes, FileAttr]) -> list[bytes]:
        argv = [self._mkbox, b"-q", b"-s", self._box_dir, b"--tmpfs-root"]
        for name, attr in sorted(top.items()):
            if name in OWN_TOP_LEVEL:
                continue
            if attr.is_symlink():
                argv += [b"--from", attr.target, b"-L", name]
            elif attr.is_dir() or attr.is_regular():
                argv += [b"--from", os.path.join(self._mountpoint, name), b"-b", name]
        for name in OWN_TOP_LEVEL:
            argv += [b"-D", name]
        return [*argv, b"--dev", b"/dev", b"--hold"]

    def task_argv(
        self, *, task_dir_fd: int, env_fd: int, status_fd: int, error_fd: int, cwd: bytes, umask: int, program: bytes
    ) -> list[bytes]:
        """mkbox's arguments for one task, up to and including `--`; the command's argv follows."""
        argv = [
            *(b"termite-mkbox", b"-q"),
            *(b"--mnt-ns", b"%d" % self._mnt_fd, b"--net-ns", b"%d" % self._net_fd),
            *(b"--lower-fd", b"%d" % self._lower_fd),
            *(b"--upper", b"/proc/self/fd/%d/u" % task_dir_fd, b"--work", b"/proc/self/fd/%d/w" % task_dir_fd),
            *(b"-t", b"/tmp", b"-t", b"/var/tmp", b"--pts", b"/dev/pts"),
        ]
        branch = fresh_branch(self._root)
        if branch is not None:
            argv += [b"--from", os.path.join(self._mountpoint, *branch), b"-b", paths.join(*branch)]
        argv += [
            *(b"--writable", paths.absolute(self._root), b"--proc", b"/proc"),
            *(b"-u", b"%d" % self._user.uid, b"-g", b"%d" % self._user.gid),
            *(b"--umask", b"%o" % umask, b"-d", paths.absolute(cwd), b"--hostname", self._host.encode()),
            *(b"--env-fd", b"%d" % env_fd, b"--status-fd", b"%d" % status_fd, b"--error-fd", b"%d" % error_fd),
        ]
        if program:
            argv += [b"-B", program]
        return [*argv, b"--"]

    def close(self) -> None:
        for fd in (self._mnt_fd, self._lower_fd):
            if fd >= 0:
                os.close(fd)
        self._mnt_fd = self._lower_fd = -1


def _read_line(fd: int, limit_s: float) -> bytes:
    """One line from a pipe, or what came before its end or the time limit."""
    line = b""
    until = time.monotonic() + limit_s
    while not line.endswith(b"\n"):
        left = until - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            break
        piece = os.read(fd, 1)
        if not piece:
            break
        line += piece
    return line


def box_environment(env: list[bytes], root: bytes) -> bytes:
    """The command's environment as mkbox reads it: NUL-terminated, without a TMPDIR that the box does not have."""
    kept = [e for e in env if b"=" in e and not (e.startswith(b"TMPDIR=") and not _has_tmpdir(e[7:], root))]
    return b"".join(e + b"\0" for e in kept)


def _has_tmpdir(directory: bytes, root: bytes) -> bool:
    path = paths.relative(directory)
    return path in FRESH or paths.is_inside(path, root)
