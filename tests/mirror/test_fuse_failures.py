"""A mount that fails, whose master fails, or that is stopped in the middle."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from termite.attr.cache import Stale, What
from termite.errors import MountError, PeerLost, PrivateError, Refused
from termite.mirror import fuse
from termite.mirror.fuse import Mount
from tests.mirror.mounting import Mounted, error_of, fuse_threads, mounted, mounts_below
from tests.mirror.told import FakeMaster

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="/dev/fuse is missing: modprobe fuse")


# -- failures -------------------------------------------------------------------------------------------


def test_every_failure_has_an_errno() -> None:
    assert fuse.errno_of(PrivateError("")) == errno.EACCES
    assert fuse.errno_of(PeerLost("")) == errno.EIO
    assert fuse.errno_of(Refused("")) == errno.EIO
    assert fuse.errno_of(OSError(errno.ESTALE, "")) == errno.ESTALE
    assert fuse.errno_of(OSError("without a number")) == errno.EIO
    assert fuse.errno_of(ZeroDivisionError()) == errno.EIO


def test_a_view_that_raises_gives_an_error_and_the_mount_lives(
    mirror: Mounted, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    view = mirror.master.view
    whole = (view.look, view.readdir, view.readlink, view.read_into)
    mirror.stat(b"d/f")
    mirror.stat(b"l")
    view.look = view.readdir = view.readlink = view.read_into = broken  # type: ignore[method-assign, assignment]
    for call in (
        lambda: mirror.stat(b"d/sub"),
        lambda: os.listdir(mirror.root),
        lambda: mirror.readlink(b"l"),
        lambda: mirror.read(b"d/f"),
    ):
        assert error_of(call) == errno.EIO
    assert "ZeroDivisionError" in caplog.text
    view.look, view.readdir, view.readlink, view.read_into = whole  # type: ignore[method-assign, assignment]
    assert mirror.read(b"l") == b"contents\n", "failures are not kept"


def test_a_master_that_is_gone_gives_io_errors(mirror: Mounted) -> None:
    def lost(path: bytes) -> None:
        raise PeerLost("the master went away")

    mirror.master.before_dir = lost
    assert error_of(lambda: mirror.stat(b"d/f")) == errno.EIO


def test_stopping_ends_it_whoever_still_uses_it(mirror: Mounted, tmp_path: Path) -> None:
    fd = os.open(mirror.path(b"d"), os.O_RDONLY)
    try:
        mirror.mount.stop()
        assert mounts_below(tmp_path) == []
        assert fuse_threads() == []
        assert error_of(lambda: os.stat(b"f", dir_fd=fd)) in (errno.ENOTCONN, errno.ECONNABORTED)
        mirror.mount.forget([Stale(b"d/f", What.GONE)])  # too late, and harmless
        mirror.mount.stop()
    finally:
        os.close(fd)


def test_stopping_does_not_wait_for_ever_for_a_question(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    master = FakeMaster()
    asked, go = threading.Event(), threading.Event()

    def slow(path: bytes) -> None:
        asked.set()
        go.wait(20)

    master.before_dir = slow
    (tmp_path / "mnt").mkdir()
    mirror = Mounted(master, os.fsencode(tmp_path / "mnt"))
    mirror.mount.start()
    threads = list(mirror.mount._threads)
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(mirror.exists, b"f")
        assert asked.wait(20)
        mirror.mount.stop(limit_s=0.1)
        assert "still busy" in caplog.text
        assert looking.result(20) is False, "whoever hung in the mount is free"
        assert mounts_below(tmp_path) == []
        go.set()
    for thread in threads:
        thread.join(20)
    assert fuse_threads() == []


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        master = FakeMaster()
        master.file(b"f", b"x")
        with mounted(master, tmp_path) as mirror:
            mirror.read(b"f")
        (tmp_path / "mnt").rmdir()
    assert os.listdir("/proc/self/fd") == before


def test_a_missing_device_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuse, "DEVICE", str(tmp_path / "no-such-device"))
    with pytest.raises(MountError, match="modprobe fuse"):
        Mount(FakeMaster().view, os.fsencode(tmp_path)).start()


def test_a_missing_mount_point_is_named(tmp_path: Path) -> None:
    with pytest.raises(MountError, match=r"gone.*No such file"):
        Mount(FakeMaster().view, os.fsencode(tmp_path / "gone")).start()
    assert fuse_threads() == []


def test_libfuse_that_refuses_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuse, "FOR_EVER_S", "soon")
    with pytest.raises(MountError, match="refused"):
        Mount(FakeMaster().view, os.fsencode(tmp_path)).start()
    assert mounts_below(tmp_path) == []


def run_start(tmp_path: Path, prelude: str, **options: object) -> str:
    """The error of a mount in a fresh process."""
    script = f"{prelude}; from termite.mirror.fuse import Mount; Mount(None, {os.fsencode(tmp_path)!r}).start()"
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, **options)  # type: ignore[call-overload]
    lines: list[str] = ran.stderr.splitlines()
    return lines[-1]


def test_a_missing_libfuse_names_the_package(tmp_path: Path) -> None:
    message = run_start(tmp_path, "import os; os.environ['FUSE_LIBRARY_PATH'] = '/nowhere/libfuse.so.2'")
    assert "MountError" in message and "apt-get install libfuse2" in message


def test_no_permission_names_what_is_needed(tmp_path: Path) -> None:
    # As an ordinary user, after the imports (the interpreter may lie where only root may look).
    message = run_start(tmp_path, "import os, fuse, termite.mirror.fuse; os.setgid(65534); os.setuid(65534)")
    assert "MountError" in message and "root or with CAP_SYS_ADMIN" in message
