"""What a directory holds, through a real mount: complete, kept by the kernel, and forgotten when told."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from termite.attr.cache import Stale, What
from termite.attr.fileattr import FileAttr
from termite.mirror.fuse import in_order
from tests.mirror.mounting import Mounted, mounted
from tests.mirror.told import FakeMaster, ids

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="/dev/fuse is missing: modprobe fuse")


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mounted]:
    """many/0 to many/2999, few/a"""
    master = FakeMaster(owner=ids())
    master.directory(b"many")
    for number in range(3000):
        master.file(b"many/%d" % number, b"")
    master.directory(b"few")
    master.file(b"few/a", b"a")
    with mounted(master, tmp_path) as mirror:
        yield mirror


def names(mirror: Mounted, path: bytes) -> list[bytes]:
    listed = os.listdir(mirror.path(path))
    assert len(set(listed)) == len(listed)
    return sorted(listed)


def test_a_large_directory_is_whole(mirror: Mounted) -> None:
    assert names(mirror, b"many") == sorted(b"%d" % number for number in range(3000))


def test_a_directory_that_was_read_is_not_asked_for_again(mirror: Mounted) -> None:
    names(mirror, b"many")
    names(mirror, b"few")
    assert mirror.quiet(lambda: [names(mirror, b"many"), names(mirror, b"few")])


def test_names_nobody_looked_up_come_and_go(mirror: Mounted) -> None:
    assert names(mirror, b"few") == [b"a"]
    mirror.master.file(b"few/b", b"b")
    assert Stale(b"few", What.NAMES) in mirror.tell(b"few/b")
    assert names(mirror, b"few") == [b"a", b"b"]
    mirror.master.remove(b"few/a")
    mirror.tell(b"few/a")
    assert names(mirror, b"few") == [b"b"]


def test_names_that_were_looked_up_come_and_go(mirror: Mounted) -> None:
    assert not mirror.exists(b"few/b")
    assert names(mirror, b"few") == [b"a"]
    mirror.master.file(b"few/b", b"b")
    mirror.tell(b"few/b")
    assert names(mirror, b"few") == [b"a", b"b"]


def test_a_name_that_the_kernel_has_dropped_meanwhile_is_seen_to_go(mirror: Mounted) -> None:
    assert mirror.exists(b"few/a")
    assert names(mirror, b"few") == [b"a"]
    with open(mirror.path(b"few/a")):
        pass
    Path("/proc/sys/vm/drop_caches").write_text("2\n")
    mirror.master.remove(b"few/a")
    mirror.tell(b"few/a")
    assert names(mirror, b"few") == []


def test_a_directory_that_nobody_reads_costs_nothing(mirror: Mounted) -> None:
    mirror.exists(b"few/a")
    mirror.master.file(b"few/b", b"b")
    assert mirror.tell(b"few/b") == []


def test_what_is_read_twice_is_forgotten_once_for_many_news(mirror: Mounted) -> None:
    names(mirror, b"few")
    for name in (b"few/x", b"few/y", b"few/z"):
        mirror.master.file(name, b"")
    assert mirror.tell(b"few/x", b"few/y", b"few/z") == [Stale(b"few", What.NAMES)]
    mirror.master.file(b"few/w", b"")
    assert mirror.tell(b"few/w") == []
    assert names(mirror, b"few") == [b"a", b"w", b"x", b"y", b"z"]


def test_what_stays_is_neither_left_out_nor_told_twice_while_names_come_and_go(mirror: Mounted) -> None:
    """Several read one directory; each has all that was there all the time."""
    stays = {b"%d" % number for number in range(0, 3000, 2)}
    over, found = threading.Event(), list[set[bytes]]()

    def read() -> None:
        while not over.is_set():
            listed = [os.fsencode(entry.name) for entry in os.scandir(mirror.path(b"many").decode())]
            assert len(set(listed)) == len(listed)
            found.append(set(listed))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    random = Random(5)
    for _ in range(200):
        name = b"many/%d" % random.randrange(1, 3000, 2)
        if name in mirror.master.attrs and mirror.master.attrs[name].exists():
            mirror.master.remove(name)
        else:
            mirror.master.file(name, b"")
        mirror.tell(name)
    over.set()
    for reader in readers:
        reader.join(30)
    assert found
    assert all(listed >= stays for listed in found)
    now = sorted(path[5:] for path, attr in mirror.master.attrs.items() if path.startswith(b"many/") and attr.exists())
    assert names(mirror, b"many") == now


def test_each_name_has_a_place_of_its_own_that_it_keeps() -> None:
    attr = FileAttr(mode=0o100644)
    listing = {b"%d" % number: attr for number in range(100_000)}
    places = [place for place, _, _ in in_order(listing)]
    assert places == sorted(set(places))
    assert places[0] > 0 and places[-1] < 1 << 31
    before = {name: place for place, name, _ in in_order({b"%d" % number: attr for number in range(0, 1000)})}
    after = {name: place for place, name, _ in in_order({b"%d" % number: attr for number in range(500, 1500)})}
    assert all(before[name] == after[name] for name in before.keys() & after.keys())
