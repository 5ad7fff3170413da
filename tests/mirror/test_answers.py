"""What the kernel asks for after news is answered without the interpreter, and is what the view would say."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from termite.mirror import answers
from tests.mirror.mounting import Mounted, mounted
from tests.mirror.told import FakeMaster, ids

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="/dev/fuse is missing: modprobe fuse")


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mounted]:
    """d/f, d/sub/g, l -> d/f"""
    master = FakeMaster(owner=ids())
    master.directory(b"d")
    master.file(b"d/f", b"contents\n", uid=os.getuid(), gid=os.getgid())
    master.directory(b"d/sub")
    master.file(b"d/sub/g", b"gee")
    master.link(b"l", b"d/f")
    with mounted(master, tmp_path) as mirror:
        yield mirror


def looks(mirror: Mounted, path: bytes) -> tuple[int, ...]:
    st = mirror.stat(path)
    return st.st_mode, st.st_size, st.st_mtime_ns, st.st_nlink, st.st_uid, st.st_gid, st.st_blocks, st.st_blksize


def test_news_of_what_the_kernel_knew_are_answered_at_once(mirror: Mounted) -> None:
    mirror.stat(b"d/f")
    assert not mirror.exists(b"d/new")
    mirror.master.file(b"d/f", b"longer contents\n")
    mirror.master.file(b"d/new", b"new")
    mirror.tell(b"d/f", b"d/new", b"d")
    assert mirror.quiet(lambda: (mirror.stat(b"d/f"), mirror.stat(b"d/new"), mirror.stat(b"d")))
    assert mirror.stat(b"d/f").st_size == 16
    assert mirror.read(b"d/f") == b"longer contents\n"
    mirror.master.remove(b"d/new")
    mirror.tell(b"d/new")
    assert mirror.quiet(lambda: mirror.exists(b"d/new"))
    assert not mirror.exists(b"d/new")


def test_they_are_what_the_view_says(mirror: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file, a directory, a link, before 1970 and after, of the master's user and of others."""
    for path in (b"d/f", b"d/sub", b"l", b"d/sub/g"):
        mirror.stat(path)
    for mtime_ns in (-1, -1_500_000_000, 0, 1_234_567_890_123_456_789):
        monkeypatch.setattr(mirror.master, "now", lambda mtime_ns=mtime_ns: mtime_ns)
        mirror.master.remove(b"d/sub/g")
        mirror.master.directory(b"d/sub", 0o750 | 1)
        mirror.master.file(b"d/f", b"x" * 4097, 0o755, uid=os.getuid(), gid=os.getgid())
        mirror.master.file(b"d/sub/g", b"", uid=12345, gid=54321)
        mirror.master.link(b"l", b"somewhere/else")
        mirror.tell(b"d/f", b"d/sub", b"d/sub/g", b"l")
        answered = {path: looks(mirror, path) for path in (b"d/f", b"d/sub", b"l")}
        for path, answer in answered.items():
            attr = mirror.master.view.look(path)
            links = attr.nlink if attr.is_dir() else 1
            blocks = (attr.size + 4095) // 4096 * 8
            assert answer == (attr.mode, attr.size, attr.mtime_ns, links, attr.uid, attr.gid, blocks, 4096), path


def test_what_was_in_a_directory_that_is_gone_is_not_in_its_successor(mirror: Mounted) -> None:
    mirror.stat(b"d/sub/g")
    mirror.master.file(b"d/sub/g", b"other")
    mirror.tell(b"d/sub/g")
    assert mirror.stat(b"d/sub/g").st_size == 5
    mirror.master.remove(b"d/sub/g")
    mirror.master.remove(b"d/sub")
    mirror.tell(b"d/sub")
    assert not mirror.exists(b"d/sub/g")
    mirror.master.directory(b"d/sub")
    mirror.tell(b"d/sub")
    assert not mirror.exists(b"d/sub/g")
    assert os.listdir(mirror.path(b"d/sub")) == []


@pytest.mark.parametrize("news", [(b"d/sub/g", b"d/sub"), (b"d/sub", b"d/sub/g"), (b"d/sub/g", b"d/sub", b"d")])
def test_what_comes_back_with_its_directory_is_found(mirror: Mounted, news: tuple[bytes, ...]) -> None:
    """The master does not tell of names in a directory that is new to it."""
    mirror.stat(b"d/sub/g")
    mirror.master.remove(b"d/sub/g")
    mirror.master.remove(b"d/sub")
    if b"d" in news:
        mirror.master.remove(b"d")
    mirror.tell(*news)
    assert not mirror.exists(b"d/sub/g")
    mirror.master.directory(b"d")
    mirror.master.directory(b"d/sub")
    mirror.master.file(b"d/sub/g", b"again")
    mirror.tell(news[-1] if b"d" in news else b"d/sub")
    assert mirror.read(b"d/sub/g") == b"again"


def test_a_size_that_was_answered_beforehand_counts_for_readers(mirror: Mounted) -> None:
    """The view must not serve contents of a size that the kernel does not expect."""
    view = mirror.master.view
    mirror.stat(b"d/f")
    mirror.master.file(b"d/f", b"four")
    mirror.tell(b"d/f")
    assert mirror.stat(b"d/f").st_size == 4  # answered from the table; the kernel believes in 4
    mirror.master.file(b"d/f", b"contents\n")
    mirror.master.tell(b"d/f")  # the view has the news, the kernel has not been told yet
    with pytest.raises(OSError) as caught:
        view.read(b"d/f", 100, 0)
    assert caught.value.errno == errno.ESTALE


def test_only_so_many_are_kept(mirror: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MOST", 10)
    names = [b"d/%d" % number for number in range(30)]
    for name in names:
        assert not mirror.exists(name)
        mirror.master.file(name, b"x")
    mirror.tell(*names)
    ready = mirror.master.view.answers
    assert ready is not None
    assert len(ready.below(b"d")) <= 10
    assert all(mirror.stat(name).st_size == 1 for name in names)


@pytest.fixture
def making(tmp_path: Path) -> Iterator[Mounted]:
    """A mirror beside a directory `made`, where contents are named after their hashes; d is there."""
    made = tmp_path / "made"
    made.mkdir()

    def place_of(hash: bytes, size: int) -> bytes:
        return os.fsencode(made / hash.hex())

    master = FakeMaster(place_of=place_of)
    master.directory(b"d")
    with mounted(master, tmp_path) as mirror:
        yield mirror


def make(mirror: Mounted, path: bytes, contents: bytes, in_place: bytes | None = None) -> Path:
    """News that a command has made this file; where its contents lie, or something else."""
    mirror.exists(path)
    hash = hashlib.sha256(contents).digest()
    place = Path(os.fsdecode(mirror.root)).parent / "made" / hash.hex()
    place.write_bytes(contents if in_place is None else in_place)
    attr = mirror.master.file(path, contents)
    mirror.master.attrs[path] = msgspec.structs.replace(attr, hash=hash)
    mirror.tell(path)
    return place


def test_what_a_command_has_made_is_read_where_it_lies(making: Mounted) -> None:
    contents = os.urandom(3_000_001)
    make(making, b"d/a.o", contents)
    make(making, b"d/empty", b"")
    assert making.quiet(lambda: making.read(b"d/a.o"))
    assert making.read(b"d/a.o") == contents
    assert making.read(b"d/empty") == b""
    counts = making.master.view.counts()
    assert counts["read_bytes"] == len(contents) and counts["read"] >= 3
    assert not making.master.questions[b"file d/a.o"]


def test_what_is_made_anew_is_read_anew(making: Mounted) -> None:
    for contents in (b"one", b"another", b"ones", b"five!"):
        make(making, b"d/a.o", contents)
        assert making.read(b"d/a.o") == contents
    assert not making.master.questions[b"file d/a.o"]


@pytest.mark.parametrize("in_place", [b"", b"short", b"much longer than that"])
def test_what_lies_there_in_another_size_is_not_taken(making: Mounted, in_place: bytes) -> None:
    make(making, b"d/a.o", b"the contents", in_place)
    assert making.read(b"d/a.o") == b"the contents"
    assert making.master.questions[b"file d/a.o"] == 1


def test_what_has_gone_to_disk_is_asked_of_the_view(making: Mounted) -> None:
    place = make(making, b"d/a.o", bytes(1 << 20) + b"end")
    with open(making.path(b"d/a.o"), "rb", buffering=0) as file:
        assert file.read(4) == bytes(4)
        place.unlink()
        file.seek(1 << 20)
        assert file.read() == b"end"
    assert making.master.questions[b"file d/a.o"] == 1


def test_a_link_in_the_place_of_contents_is_not_followed(making: Mounted, tmp_path: Path) -> None:
    place = make(making, b"d/a.o", b"the contents")
    (tmp_path / "other").write_bytes(b"wrong ones !")
    place.unlink()
    place.symlink_to(tmp_path / "other")
    assert making.read(b"d/a.o") == b"the contents"
