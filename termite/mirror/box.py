"""The box a task runs in, as a command line for mkbox.

A mirror makes a *template* when it starts: a mount namespace whose root is a small tmpfs with the
mirror's top-level directories bound into it and its top-level symlinks made natively (fewer walks
through FUSE: /bin, /lib, /lib64 stand in front of nearly every path).  Private directories are made
natively too: the kernel asks FUSE anew each time it denies somebody the way into one, and a search
path that begins with /root/bin leads there several times per command.  A task joins a copy of it and
adds what must be its own: the overlay on the writable root, /tmp, /var/tmp, /proc.  Only mkbox mounts
anything; nothing here touches the file system beyond the template's directory.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
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
class BoxPlan:
    """What all boxes of one mirror have in common."""

    mkbox: bytes  # the program
    mountpoint: bytes  # of the mirror
    box_dir: bytes  # an empty directory to build templates on
    root: bytes  # the writable root, relative to the box's /
    uid: int  # of the tasks
    gid: int
    host: str  # the host name that they see
    net_fd: int  # their network namespace
    sources: tuple[bytes, ...] = ()  # other directories that must be visible, as `root`

    def template_argv(self, top: Mapping[bytes, FileAttr]) -> list[bytes]:
        """mkbox's arguments to build and hold a template for this top-level listing."""
        argv = [self.mkbox, b"-q", b"-s", self.box_dir, b"--tmpfs-root"]
        for name, attr in sorted(top.items()):
            if name in OWN_TOP_LEVEL:
                continue
            if attr.is_symlink():
                argv += [b"--from", attr.target, b"-L", name]
            elif attr.is_dir() and attr.is_private():
                argv += [b"--closed", name]
            elif attr.is_dir() or attr.is_regular():
                argv += [b"--from", os.path.join(self.mountpoint, name), b"-b", name]
        for name in OWN_TOP_LEVEL:
            argv += [b"-D", name]
        return [*argv, b"--dev", b"/dev", b"--hold"]

    def task_argv(self, first_fd: int) -> list[bytes]:
        """mkbox's arguments for a task, but for what differs from task to task.

        Descriptors from `first_fd` on, in this order: environment, status pipe, error pipe, task directory,
        then those of the template (`Template.fds`).
        """
        env, status, error, task_dir, mnt, net, lower = (b"%d" % (first_fd + i) for i in range(7))
        argv = [
            *(b"termite-mkbox", b"-q", b"--mnt-ns", mnt, b"--net-ns", net, b"--lower-fd", lower),
            *(b"--upper", b"/proc/self/fd/" + task_dir + b"/u", b"--work", b"/proc/self/fd/" + task_dir + b"/w"),
            *(b"-t", b"/tmp", b"-t", b"/var/tmp", b"--pts", b"/dev/pts"),
        ]
        for fresh, branch in kept_branches(self.root, self.sources):
            argv += [b"--from", os.path.join(self.mountpoint, fresh, branch), b"-b", paths.join(fresh, branch)]
        return [
            *argv,
            *(b"--writable", paths.absolute(self.root), b"--proc", b"/proc"),
            *(b"-u", b"%d" % self.uid, b"-g", b"%d" % self.gid, b"--hostname", self.host.encode()),
            *(b"--env-fd", env, b"--status-fd", status, b"--error-fd", error),
        ]

    def build(self, top: Mapping[bytes, FileAttr]) -> Template:
        """A template; blocks and asks the mirror, so not on the event loop."""
        process = subprocess.Popen(
            self.template_argv(top), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}
        )
        assert process.stdout is not None and process.stderr is not None and process.stdin is not None
        try:
            if _read_line(process.stdout.fileno(), _TEMPLATE_LIMIT_S) != b"ready\n":
                process.kill()
                reason = process.stderr.read().decode("utf-8", "replace").strip()
                raise BoxError(f"the box template cannot be made: {reason}")
            mnt_fd = os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            try:
                lower = os.path.join(self.mountpoint, self.root)
                lower_fd = os.open(lower, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except BaseException:
                os.close(mnt_fd)
                raise
            return Template(mnt_fd, self.net_fd, lower_fd)
        finally:
            process.stdin.close()
            process.wait(_TEMPLATE_LIMIT_S)
            process.stdout.close()
            process.stderr.close()


class Template:
    """The static part of boxes, held by descriptors for as long as anyone holds this object."""

    def __init__(self, mnt_fd: int, net_fd: int, lower_fd: int) -> None:
        self.lower_fd = lower_fd  # the writable root as the mirror shows it, O_PATH
        self.fds = (mnt_fd, net_fd, lower_fd)
        self._own = (mnt_fd, lower_fd)

    def __del__(self) -> None:
        for fd in self._own:
            os.close(fd)


def kept_branches(root: bytes, sources: Sequence[bytes] = ()) -> list[tuple[bytes, bytes]]:
    """What must be bound into fresh directories: (that directory, the branch in it to keep visible).

    The fresh /tmp hides the mirror's, but the branches that lead to the writable root and to other
    directories of the project stay.  A writable root that is a branch itself gets there by its overlay.
    """
    found: dict[tuple[bytes, bytes], None] = {}
    for path in (root, *sources):
        for fresh in FRESH:
            if paths.is_inside(path, fresh) and path != fresh:
                branch = path[len(fresh) + 1 :].split(b"/", 1)[0]
                if paths.join(fresh, branch) != root:
                    found[fresh, branch] = None
    return list(found)


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
    kept = [e for e in env if b"=" in e]
    tmpdir = next((e for e in kept if e.startswith(b"TMPDIR=")), None)
    if tmpdir is not None and not _has_tmpdir(tmpdir[7:], root):
        kept = [e for e in kept if not e.startswith(b"TMPDIR=")]
    kept.append(b"")
    return b"\0".join(kept)


def _has_tmpdir(directory: bytes, root: bytes) -> bool:
    path = paths.relative(directory)
    return path in FRESH or paths.is_inside(path, root)
