from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from termite.attr.cache import AttrCache
from termite.attr.fileattr import FileAttr
from termite.mirror.fuse import Mount
from termite.wire.messages import Checked, DirListing
from termite.worker.paranoia import Paranoia
from tests.mirror.told import FakeMaster

GOOD = FileAttr(mode=stat.S_IFREG | 0o644, size=3, mtime_ns=5, hash=b"h" * 32)


def breaches(mine: FileAttr, checked: Checked, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.set_level(logging.ERROR)
    Paranoia(AttrCache()).compare(b"src/a.c", mine, b"h" * 32, checked)
    return [record.getMessage() for record in caplog.records]


def changed(**values: object) -> FileAttr:
    return FileAttr(**{**{name: getattr(GOOD, name) for name in GOOD.__struct_fields__}, **values})


def test_what_agrees_is_no_breach(caplog: pytest.LogCaptureFixture) -> None:
    assert breaches(GOOD, Checked(GOOD, GOOD, True), caplog) == []
    assert breaches(changed(hash=b""), Checked(GOOD, GOOD, True), caplog) == []


def test_a_breach_names_the_path_and_both_values(caplog: pytest.LogCaptureFixture) -> None:
    assert breaches(changed(size=4), Checked(GOOD, GOOD, True), caplog) == [
        "paranoia: /src/a.c: size is 4 here, but 3 was told"
    ]


def test_a_disk_that_differs_from_what_was_told_is_a_breach(caplog: pytest.LogCaptureFixture) -> None:
    assert breaches(GOOD, Checked(changed(mtime_ns=6), GOOD, True), caplog) == [
        "paranoia: /src/a.c: mtime_ns is 5 here, but 6 on the master's disk"
    ]


def test_other_contents_on_the_disk_are_a_breach(caplog: pytest.LogCaptureFixture) -> None:
    (text,) = breaches(GOOD, Checked(changed(hash=b"x" * 32), GOOD, True), caplog)
    assert "/src/a.c" in text and (b"h" * 32).hex() in text and (b"x" * 32).hex() in text


def test_a_file_that_changed_since_it_was_opened_is_none(caplog: pytest.LogCaptureFixture) -> None:
    news = changed(hash=b"x" * 32)
    assert breaches(news, Checked(news, news, True), caplog) == []


def test_an_inconsistent_cache_is_a_breach(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.ERROR)
    cache = AttrCache()
    paranoia = Paranoia(cache)
    paranoia.after_change("nothing")
    assert paranoia.breaches == 0

    def broken() -> None:
        raise AssertionError("src leads nowhere")

    monkeypatch.setattr(cache, "check", broken)
    paranoia.after_change("3 changes")
    assert "after 3 changes: src leads nowhere" in caplog.text


# -- what a box sees ----------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[tuple[FakeMaster, Mount]]:
    """d/f and l in a real mount, all of it in the kernel's caches."""
    if not os.path.exists("/dev/fuse"):
        pytest.skip("/dev/fuse is missing")
    master = FakeMaster()
    master.directory(b"d")
    master.file(b"d/f", b"contents\n")
    master.link(b"l", b"d/f")
    (tmp_path / "mnt").mkdir()
    mount = Mount(master.view, os.fsencode(tmp_path / "mnt"))
    mount.start()
    try:
        (tmp_path / "mnt" / "l").read_bytes()
        yield master, mount
    finally:
        mount.stop()


def look(master: FakeMaster, mount: Mount, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.set_level(logging.ERROR)
    paranoia = Paranoia(master.view.cache)
    asyncio.run(paranoia.look_through(mount.mountpoint, [b"d", b"d/f", b"l", b"d/none"]))
    assert paranoia.checked == 4
    return [record.getMessage() for record in caplog.records]


def test_a_box_that_sees_what_was_told_is_no_breach(
    mounted: tuple[FakeMaster, Mount], caplog: pytest.LogCaptureFixture
) -> None:
    master, mount = mounted
    assert look(master, mount, caplog) == []
    master.file(b"d/f", b"other contents\n")
    master.file(b"d/none", b"")
    mount.forget(master.tell(b"d/f", b"d/none"))
    assert look(master, mount, caplog) == []


def test_news_that_the_kernel_did_not_hear_are_a_breach_that_names_path_and_both_values(
    mounted: tuple[FakeMaster, Mount], caplog: pytest.LogCaptureFixture
) -> None:
    master, mount = mounted
    master.file(b"d/f", b"other contents\n")
    master.tell(b"d/f")
    found = look(master, mount, caplog)
    assert "paranoia: /d/f: size is 9 in a box, but 15 was told" in found
    assert all("/d/f" in text for text in found)


def test_contents_that_a_box_sees_and_nobody_told_are_a_breach(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    (tmp_path / "f").write_bytes(b"seen")
    st = (tmp_path / "f").stat()
    told, seen = (hashlib.sha256(data).digest() for data in (b"told", b"seen"))
    cache = AttrCache()
    attr = FileAttr(st.st_mode, st.st_size, st.st_mtime_ns, hash=told)
    cache.put_listing(b"", DirListing(True, FileAttr(stat.S_IFDIR | 0o755), {b"f": attr}))
    paranoia = Paranoia(cache)
    assert paranoia.sample() == [b"f"]
    asyncio.run(paranoia.look_through(os.fsencode(tmp_path), [b"f"]))
    assert caplog.messages == [f"paranoia: /f: contents are {seen.hex()} in a box, but {told.hex()} was told"]
