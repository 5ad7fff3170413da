"""Real mounts: what processes see, what the kernel keeps, and that it forgets when told."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from termite.mirror import greeting
from termite.mirror.fuse import Mount
from tests.mirror.mounting import Mounted, error_of, mounted, mounts_below
from tests.mirror.told import DiskMaster, FakeMaster

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="/dev/fuse is missing: modprobe fuse")


def as_nobody(mirror: Mounted, script: str) -> subprocess.CompletedProcess[bytes]:
    """A shell script as an ordinary user in the mount.

    It changes directory itself: this process must not wait (vfork) for a child that waits for the mount.
    """
    become = 'cd "$1" && exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps -all sh -c "$2"'
    return subprocess.run(["sh", "-c", become, "sh", mirror.root, script], capture_output=True, timeout=30)


# -- what is seen ---------------------------------------------------------------------------------------


def test_files_directories_and_links_look_as_on_the_master(mirror: Mounted) -> None:
    assert sorted(os.listdir(mirror.root)) == [b"d", b"l"]
    assert sorted(os.listdir(mirror.path(b"d"))) == [b"f", b"sub"]
    assert mirror.read(b"d/f") == b"contents\n" == mirror.read(b"l")
    assert mirror.readlink(b"l") == b"d/f"
    st = mirror.stat(b"d/f")
    attr = mirror.master.attrs[b"d/f"]
    assert (st.st_mode, st.st_size, st.st_mtime_ns, st.st_nlink) == (attr.mode, attr.size, attr.mtime_ns, 1)
    assert (st.st_blocks, st.st_blksize) == (8, 4096)


def test_types_are_listed_without_a_look_at_each_file(mirror: Mounted) -> None:
    before = mirror.calls()["getattr"]
    with os.scandir(mirror.root) as scan:
        kinds = {entry.name: (entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in scan}
    assert kinds == {b"d": (True, False), b"l": (False, True)}
    assert mirror.calls()["getattr"] - before <= 1  # the directory itself


def test_the_masters_user_appears_as_the_tasks(mirror: Mounted) -> None:
    mirror.master.file(b"mine", b"", uid=1000, gid=1001)
    st = mirror.stat(b"mine")
    assert (st.st_uid, st.st_gid) == (2000, 2001)


def test_names_of_any_bytes_pass_unchanged(tmp_path: Path) -> None:
    names = [bytes([byte]) * 3 for byte in range(1, 256) if byte != ord("/")] + [
        b"x" * 255,
        b"\xff\xfe \n\t'\"\\",
        "ü€".encode(),
    ]
    names.remove(b"...")
    master = FakeMaster()
    for name in [*names, b"..."]:
        master.file(name, name)
        master.link(name + b">" if len(name) < 255 else b"link", name)
    with mounted(master, tmp_path) as mirror:
        for name in [*names, b"..."]:
            assert mirror.read(name) == name
            assert mirror.readlink(name + b">" if len(name) < 255 else b"link") == name
        assert set(os.listdir(mirror.root)) == set(master.attrs) - {b""}


def test_large_files_are_read_whole_and_at_any_offset(mirror: Mounted) -> None:
    contents = os.urandom(5 * 1024 * 1024 + 4097)
    mirror.master.file(b"big", contents)
    assert mirror.read(b"big") == contents
    mirror.master.file(b"big2", contents)
    mirror.tell(b"big2")
    with open(mirror.path(b"big2"), "rb") as file:
        for offset in (4_000_000, 61_441, 65_520, 1, 131_071):
            assert os.pread(file.fileno(), 70_000, offset) == contents[offset : offset + 70_000]


def test_a_link_as_long_as_links_get_is_whole(mirror: Mounted) -> None:
    target = b"/".join([b"x" * 200] * 20)[:4095]
    mirror.master.link(b"long", target)
    assert mirror.readlink(b"long") == target
    assert mirror.readlink(b"long") == target


def test_nothing_can_be_written(mirror: Mounted) -> None:
    for change in (
        lambda: os.unlink(mirror.path(b"d/f")),
        lambda: os.mkdir(mirror.path(b"new")),
        lambda: os.open(mirror.path(b"d/f"), os.O_WRONLY),
        lambda: os.chmod(mirror.path(b"d/f"), 0o600),
    ):
        assert error_of(change) == errno.EROFS


def test_what_is_private_can_be_neither_listed_nor_read(mirror: Mounted) -> None:
    mirror.master.directory(b"hidden", 0)
    mirror.master.file(b"hidden/x", b"secret")
    mirror.master.file(b"private", b"secret", mode=0)
    ran = as_nobody(mirror, "ls hidden; cat hidden/x; cat private; cat d/f")
    assert ran.stdout == b"contents\n"
    assert ran.stderr.count(b"Permission denied") == 3
    assert error_of(lambda: mirror.read(b"private")) == errno.EACCES, "the master refuses even root"


def test_a_program_runs_from_the_mount(mirror: Mounted) -> None:
    program = shutil.which("true")
    assert program is not None
    mirror.master.file(b"d/true", Path(program).read_bytes(), mode=0o755)
    mirror.master.file(b"d/script", b"#!/bin/sh\necho ran $1\n", mode=0o755)
    ran = as_nobody(mirror, "d/true && d/script well")
    assert (ran.returncode, ran.stdout) == (0, b"ran well\n")


# -- what the kernel keeps ------------------------------------------------------------------------------


def test_what_was_seen_once_is_not_asked_again(mirror: Mounted) -> None:
    def look() -> None:
        mirror.read(b"d/f")
        mirror.stat(b"d/sub")
        assert not mirror.exists(b"d/nothing")
        assert not mirror.exists(b"nothing")
        assert mirror.readlink(b"l") == b"d/f"
        assert mirror.read(b"l") == b"contents\n"

    look()
    assert mirror.calls()["readlink"] == 1
    assert mirror.quiet(look)


def test_another_process_finds_it_in_the_kernel_too(mirror: Mounted) -> None:
    def look() -> None:
        assert as_nobody(mirror, "cat l; test ! -e d/nothing").stdout == b"contents\n"

    look()
    assert mirror.quiet(look)


def test_the_kernel_offered_what_is_wanted() -> None:
    libfuse = greeting.OUT_HEADER.pack(40, 0, 7) + greeting.INIT_OUT_2012.pack(7, 19, 131072, 0x21, 0, 0, 131072)
    sent = greeting.extended(libfuse, offered=greeting.CACHE_SYMLINKS, unique=7)
    assert greeting.OUT_HEADER.unpack_from(sent) == (len(sent), 0, 7)
    major, minor, _, flags, *_ = greeting.INIT_OUT_2012.unpack_from(sent, greeting.OUT_HEADER.size)
    assert (major, minor, flags) == (7, 19, 0x21 | greeting.CACHE_SYMLINKS), "nothing that was not offered"


def test_lookups_in_one_directory_go_in_parallel(tmp_path: Path) -> None:
    master = FakeMaster()
    both = threading.Barrier(2)
    master.file(b"a", b"a")
    master.file(b"b", b"b")
    with mounted(master, tmp_path) as mirror:
        look = master.view.look

        def meet(path: bytes) -> object:
            if path in (b"a", b"b"):
                both.wait(20)
            return look(path)

        master.view.look = meet  # type: ignore[method-assign, assignment]
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(mirror.exists, name) for name in (b"a", b"b")]
            assert all(future.result(20) for future in found)


# -- what it forgets ------------------------------------------------------------------------------------


def test_changed_contents_are_seen(mirror: Mounted) -> None:
    for contents in (b"longer than it was before\n", b"short", b"SHORT", b""):
        mirror.read(b"d/f")
        mirror.master.file(b"d/f", contents)
        mirror.tell(b"d/f")
        assert mirror.read(b"d/f") == contents
        assert mirror.stat(b"d/f").st_size == len(contents)
        assert mirror.quiet(lambda: mirror.read(b"d/f"))


def test_an_open_file_reads_the_new_contents(mirror: Mounted) -> None:
    with open(mirror.path(b"d/f"), "rb", buffering=0) as file:
        assert file.read() == b"contents\n"
        mirror.master.file(b"d/f", b"new contents, and more")
        mirror.tell(b"d/f")
        assert os.pread(file.fileno(), 100, 0) == b"new contents, and more"


def test_a_touched_file_keeps_its_pages(mirror: Mounted) -> None:
    mirror.read(b"d/f")
    reads = mirror.calls()["read"]
    known = mirror.master.view.cache.lookup(b"d/f")
    assert known is not None and known.hash
    mirror.master.attrs[b"d/f"] = type(known)(0o100755, known.size, mirror.master.now(), hash=known.hash)
    mirror.tell(b"d/f")
    assert mirror.stat(b"d/f").st_mode & 0o777 == 0o755
    assert mirror.read(b"d/f") == b"contents\n"
    assert mirror.calls()["read"] == reads


def test_a_removed_file_is_gone_and_a_created_one_there(mirror: Mounted) -> None:
    mirror.read(b"d/f")
    mirror.master.remove(b"d/f")
    mirror.tell(b"d/f")
    assert not mirror.exists(b"d/f")
    mirror.master.file(b"d/f", b"CONTENTS\n")  # of the same length
    mirror.tell(b"d/f")
    assert mirror.read(b"d/f") == b"CONTENTS\n"


def test_a_removed_file_that_is_still_open_leaves_no_old_page_to_its_successor(mirror: Mounted) -> None:
    with open(mirror.path(b"d/f"), "rb", buffering=0) as held:
        held.read()
        mirror.master.remove(b"d/f")
        mirror.tell(b"d/f")
        assert not mirror.exists(b"d/f")
        mirror.master.file(b"d/f", b"CONTENTS\n")
        mirror.tell(b"d/f")
        assert mirror.read(b"d/f") == b"CONTENTS\n"


def test_types_change_into_each_other(mirror: Mounted) -> None:
    assert mirror.read(b"d/f") == b"contents\n"
    makers: list[Callable[[bytes], object]] = [
        lambda path: mirror.master.directory(path),
        lambda path: mirror.master.link(path, b"sub/g"),
        lambda path: mirror.master.file(path, b"file again"),
        lambda path: mirror.master.link(path, b"sub"),
        lambda path: mirror.master.directory(path),
        lambda path: mirror.master.file(path, b"and again"),
    ]
    for make in makers:
        mirror.stat(b"d/f")
        mirror.master.remove(b"d/f")
        make(b"d/f")
        mirror.tell(b"d/f")
        told = mirror.master.attrs[b"d/f"]
        assert mirror.stat(b"d/f").st_mode == told.mode
        if told.is_symlink():
            assert mirror.readlink(b"d/f") == told.target
        elif told.is_dir():
            assert os.listdir(mirror.path(b"d/f")) == []
        else:
            assert mirror.read(b"d/f") == mirror.master.contents[b"d/f"]


def test_a_replaced_directory_has_nothing_of_the_old_one(mirror: Mounted) -> None:
    assert mirror.read(b"d/sub/g") == b"gee"
    mirror.master.remove(b"d/sub")
    mirror.tell(b"d/sub")
    assert not mirror.exists(b"d/sub/g")
    mirror.master.directory(b"d/sub")
    mirror.master.file(b"d/sub/new", b"new")
    mirror.tell(b"d/sub", b"d/sub/new")
    assert os.listdir(mirror.path(b"d/sub")) == [b"new"]
    assert mirror.read(b"d/sub/new") == b"new"
    assert not mirror.exists(b"d/sub/g")


def test_a_directory_removed_while_somebody_is_in_it_leaves_no_names_to_its_successor(mirror: Mounted) -> None:
    held = [os.open(mirror.path(path), os.O_PATH) for path in (b"d/sub", b"d/sub/g")]
    try:
        assert not mirror.exists(b"d/sub/new")
        mirror.master.remove(b"d/sub")
        mirror.tell(b"d/sub")
        mirror.master.directory(b"d/sub")
        mirror.master.file(b"d/sub/new", b"new")
        mirror.tell(b"d/sub", b"d/sub/new")
        assert os.listdir(mirror.path(b"d/sub")) == [b"new"]
        assert mirror.exists(b"d/sub/new")
        assert not mirror.exists(b"d/sub/g")
        assert mirror.stat(b"d/sub").st_ino != os.fstat(held[0]).st_ino
    finally:
        for fd in held:
            os.close(fd)


@pytest.mark.parametrize("held", [False, True])
def test_a_changed_link_leads_elsewhere(mirror: Mounted, held: bool) -> None:
    fd = os.open(mirror.path(b"l"), os.O_PATH | os.O_NOFOLLOW) if held else -1  # the kernel keeps its inode
    try:
        for target in (b"d/sub/g", b"d", b"/an/absolute/path/that/is/much/longer", b"d/f"):
            assert mirror.readlink(b"l")
            mirror.master.link(b"l", target)
            mirror.tell(b"l")
            assert mirror.readlink(b"l") == target
            assert mirror.stat(b"l").st_size == len(target)
            assert mirror.quiet(lambda: mirror.readlink(b"l"))
        assert mirror.read(b"l") == b"contents\n"
    finally:
        if held:
            os.close(fd)


def test_names_that_nobody_asked_for_cost_nothing(mirror: Mounted) -> None:
    mirror.stat(b"d/f")
    names = [b"d/new%d" % number for number in range(100)]
    for name in names:
        mirror.master.file(name, b"")
    assert mirror.quiet(lambda: mirror.tell(*names))
    assert all(mirror.exists(name) for name in names)


def test_a_file_that_changed_before_its_first_read_fails_once_and_is_then_right(mirror: Mounted) -> None:
    mirror.stat(b"d/f")
    mirror.master.file(b"d/f", b"grown since it was listed")
    assert error_of(lambda: mirror.read(b"d/f")) == errno.ESTALE
    mirror.mount.forget(mirror.master.noticed)
    assert mirror.read(b"d/f") == b"grown since it was listed"


def test_forgetting_while_a_lookup_waits_for_the_master(mirror: Mounted) -> None:
    """The lookup holds the directory; forgetting waits for it and then drops the answer it gave."""
    mirror.stat(b"d")
    asked, go = threading.Event(), threading.Event()
    look = mirror.master.view.look

    def slow(path: bytes) -> object:
        found = look(path)
        if path == b"d/f":
            asked.set()
            assert go.wait(20)
        return found

    mirror.master.view.look = slow  # type: ignore[method-assign, assignment]
    with ThreadPoolExecutor(2) as pool:
        looking = pool.submit(mirror.exists, b"d/f")
        assert asked.wait(20)
        mirror.master.remove(b"d/f")
        forgetting = pool.submit(mirror.mount.forget, mirror.master.tell(b"d/f"))
        go.set()
        looking.result(20)
        forgetting.result(20)
    assert not mirror.exists(b"d/f")


def test_readers_see_only_whole_versions_once_told(mirror: Mounted) -> None:
    """While changes come a reader may fail (ESTALE) or see some of both, as on any disk; afterwards not."""
    done = threading.Event()

    def read() -> int:
        count = 0
        while not done.is_set():
            try:
                mirror.read(b"d/f")
            except OSError as error:
                assert error.errno == errno.ESTALE
            mirror.exists(b"d/nothing")
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for number in range(60):
                contents = b"%d" % number * (number + 1) * 997
                mirror.master.file(b"d/f", contents)
                mirror.tell(b"d/f")
                assert mirror.read(b"d/f") == contents
        finally:
            done.set()
        assert all(reader.result(20) for reader in readers)


def change_at_random(master: FakeMaster, random: Random) -> tuple[bytes, list[bytes]]:
    """Do anything to a name; that name, and what there is to tell."""
    directory = b"r%d" % random.randrange(2)
    path = directory + b"/n%d" % random.randrange(4)
    told = [path]
    if directory not in master.attrs:
        master.directory(directory)
        told = [directory, path]
    match random.randrange(5):
        case 0:
            master.remove(path)
        case 1:
            master.remove(path)
            master.directory(path)
            master.file(path + b"/x", b"x")
        case 2:
            master.remove(path)
            master.link(path, b"n0" * random.randrange(1, 9))
        case 3:
            master.remove(directory)
            return path, [directory]
        case _:
            master.remove(path)
            master.file(path, random.randbytes(random.randrange(9)))
    return path, told


@pytest.mark.parametrize("seed", range(3))
def test_whatever_changes_under_readers_is_seen_as_it_is(mirror: Mounted, seed: int) -> None:
    master, random, done = mirror.master, Random(seed), threading.Event()
    notifier = ThreadPoolExecutor(1)
    master.view._on_stale = lambda stale: notifier.submit(mirror.mount.forget, stale) and None

    def read(seed: int) -> None:
        random = Random(seed)
        while not done.is_set():
            path = mirror.path(b"r%d/n%d" % (random.randrange(2), random.randrange(4)))
            with contextlib.suppress(OSError):
                os.lstat(path)
                os.listdir(os.path.dirname(path))
                os.readlink(path) if os.path.islink(path) else Path(os.fsdecode(path)).read_bytes()

    readers = [threading.Thread(target=read, args=(seed * 10 + number,)) for number in range(3)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(60):
            path, told = change_at_random(master, random)
            # Behind what the view itself has handed to that thread, as for a task that begins now.
            notifier.submit(mirror.mount.forget, master.tell(*told)).result(20)
            attr = master.attrs.get(path)
            assert mirror.exists(path) == (attr is not None)
            if attr is None:
                continue
            assert mirror.stat(path).st_mode == attr.mode
            if attr.is_symlink():
                assert mirror.readlink(path) == attr.target
            elif attr.is_dir():
                assert os.listdir(mirror.path(path)) == [b"x"]
            else:
                assert mirror.read(path) == master.contents[path]
    finally:
        done.set()
        for reader in readers:
            reader.join(20)
        notifier.shutdown()


# -- an overlay, a compiler -----------------------------------------------------------------------------

COMPILE = """
set -e
mount -t tmpfs none "$UP"
mkdir "$UP/u" "$UP/w"
mount -t overlay none -o "lowerdir=$MNT$PROJECT,upperdir=$UP/u,workdir=$UP/w" "$MNT$PROJECT"
mkdir "$MNT$PROJECT/t"
chroot "$MNT" /bin/sh -c 'cd "$1" && TMPDIR="$1/t" g++ -O1 -c main.cc -o main.o && rm main.h' sh "$PROJECT"
cp "$UP/u/main.o" "$OUT"
test -c "$UP/u/main.h"
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")
def test_a_second_compile_in_an_overlay_never_reaches_python(tmp_path: Path) -> None:
    project, root, up = tmp_path / "project", tmp_path / "mnt", tmp_path / "up"
    for directory in (project, root, up):
        directory.mkdir()
    (project / "main.h").write_text("#include <vector>\n")
    (project / "main.cc").write_text('#include "main.h"\nint main() { return std::vector<int>(3).size(); }\n')
    master = DiskMaster(hidden=os.fsencode(root))
    mount = Mount(master.view, os.fsencode(root))

    def compile_once(output: str) -> tuple[bytes, dict[str, int]]:
        before = master.view.counters.as_dict()
        environment = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "MNT": str(root), "PROJECT": str(project)}
        environment |= {"UP": str(up), "OUT": str(tmp_path / output)}
        command = ["unshare", "-m", "--propagation", "private", "sh", "-c", COMPILE]
        subprocess.run(command, env=environment, check=True, timeout=100, capture_output=True)
        after = master.view.counters.as_dict()
        return (tmp_path / output).read_bytes(), {name: after[name] - before[name] for name in after}

    mount.start()
    try:
        cold, cold_calls = compile_once("cold.o")
        assert cold_calls["read"] > 10
        warm_calls = {"getattr": 1}
        for _ in range(4):  # a machine short of memory drops pages by itself
            warm, warm_calls = compile_once("warm.o")
            assert warm == cold
            if not any(warm_calls.values()):
                break
        assert not any(warm_calls.values()), warm_calls
        subprocess.run(["g++", "-O1", "-c", "main.cc", "-o", "plain.o"], cwd=project, check=True, timeout=60)
        assert cold == (project / "plain.o").read_bytes()
    finally:
        mount.stop()
    assert mounts_below(tmp_path) == []
    assert stat.S_ISDIR(root.stat().st_mode)
