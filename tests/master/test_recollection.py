"""What the next mirror gets before it asks."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import cast

import pytest

from termite.errors import PeerLost
from termite.master import recollection
from termite.master.link import MirrorLink
from termite.master.recollection import Recollection


class Link:
    """As a mirror's link, as far as it is needed here."""

    name = "box"

    def __init__(self, lost_after: int = 1000) -> None:
        self.told: list[list[bytes]] = []
        self._lost_after = lost_after

    async def prefetch(self, wanted: list[bytes]) -> None:
        if len(self.told) == self._lost_after:
            raise PeerLost("the worker went away")
        self.told.append(wanted)


def offered(known: Recollection, link: Link) -> list[bytes]:
    async def scene() -> None:
        known.begin(cast(MirrorLink, link))
        await asyncio.sleep(0.05)
        await known.close()

    asyncio.run(scene())
    return [name for portion in link.told for name in portion]


def rel(path: Path) -> bytes:
    return os.fsencode(path)[1:]


def files(directory: Path, count: int) -> list[bytes]:
    for number in range(count):
        (directory / f"{number}.h").write_bytes(b"")
    return [rel(directory / f"{number}.h") for number in range(count)]


def test_the_next_mirror_is_told_in_the_order_of_the_first(tmp_path: Path) -> None:
    known = Recollection(b"project", b"")
    names = files(tmp_path, 150)
    for name in [*names, *names[:10]]:
        known.asked_for(name)
    link = Link()
    assert offered(known, link) == names
    assert [len(portion) for portion in link.told] == [64, 64, 22]


def test_a_later_master_of_the_same_project_knows_them(tmp_path: Path) -> None:
    names = files(tmp_path, 3)
    cache = os.fsencode(tmp_path / "cache")
    first = Recollection(b"project", cache)
    for name in names:
        first.asked_for(name)
    first.save()
    assert offered(Recollection(b"project", cache), Link()) == names
    assert offered(Recollection(b"another project", cache), Link()) == []


def test_what_is_gone_is_forgotten(tmp_path: Path) -> None:
    names = files(tmp_path, 3)
    cache = os.fsencode(tmp_path / "cache")
    known = Recollection(b"project", cache)
    for name in names:
        known.asked_for(name)
    (tmp_path / "1.h").unlink()
    assert offered(known, Link()) == [names[0], names[2]]
    known.save()
    assert len(Recollection(b"project", cache)) == 2


def test_a_mirror_that_is_lost_is_told_no_more(tmp_path: Path) -> None:
    known = Recollection(b"project", b"")
    for name in files(tmp_path, 200):
        known.asked_for(name)
    link = Link(lost_after=1)
    assert len(offered(known, link)) == 64


def test_only_so_much_is_offered_and_nothing_excluded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recollection, "MOST_BYTES", 10_000)
    names = files(tmp_path, 6)
    for name in names[:5]:
        os.truncate(b"/" + name, 3000)
    os.truncate(b"/" + names[5], 5 << 20)  # only its list of pieces would be sent
    known = Recollection(b"project", b"", lambda path: path == names[1])
    for name in [names[5], *names[:5]]:
        known.asked_for(name)
    assert offered(known, Link()) == [names[5], names[0], names[2]]


def test_there_is_a_bound(tmp_path: Path) -> None:
    known = Recollection(b"project", b"")
    for number in range(recollection.MOST_NAMES + 10):
        known.asked_for(b"usr/include/%d.h" % number)
    assert len(known) == recollection.MOST_NAMES
    assert next(iter(known._names)) == b"usr/include/10.h"


def test_a_damaged_file_or_one_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    known = Recollection(b"project", os.fsencode(cache))
    known.asked_for(b"usr/include/stdio.h")
    known.save()
    (file,) = cache.iterdir()
    file.write_bytes(b"usr/include/a.h\0../../etc/shadow\0/etc/passwd\0usr//b\0\0cut off")
    again = Recollection(b"project", os.fsencode(cache))
    assert len(again) == 1
    file.unlink()
    file.mkdir()
    other = Recollection(b"project", os.fsencode(cache))
    other.asked_for(b"usr/include/stdio.h")
    other.save()
    assert list(cache.iterdir()) == [file]
