from __future__ import annotations

import logging
import stat

import pytest

from termite.attr.cache import AttrCache
from termite.attr.fileattr import FileAttr
from termite.wire.messages import Checked
from termite.worker.paranoia import Paranoia

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
