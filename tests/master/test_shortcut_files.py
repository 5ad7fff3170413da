"""What the master's own mkdir, rm, mv and touch do to files: no more than the real ones, and nothing half."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from termite.master import confined, shortcuts
from termite.master.shortcuts import ShortcutResult, find_shortcut
from tests.master.shortcutting import perform, populate, really, sh, snapshot


def test_changed_paths_name_each_new_directory_and_the_parents(root: Path) -> None:
    result = perform(*sh("mkdir -p a/b ../c"), root)
    assert result is not None
    prefix = os.fsencode(root)[1:]
    assert result.changed_paths == [
        prefix + end for end in (b"/here", b"/here/a", b"/here/a/b", b"", b"/c")
    ]  # fmt: skip
    result = perform(*sh("rm -rf a"), root)
    assert result is not None
    assert result.changed_paths == [prefix + b"/here", prefix + b"/here/a"]
    result = perform(*sh("mkdir -p ../c"), root)
    assert result is not None
    assert result.changed_paths == []


def test_the_daemons_own_umask_and_the_set_group_id_bit_do_not_show(root: Path) -> None:
    (root / "here").chmod(0o2775)
    own = os.umask(0o077)
    try:
        result = perform(*sh("mkdir -p a/b && true"), root, umask=0o002)
    finally:
        os.umask(own)
    assert result is not None
    for made in ("a", "a/b"):
        assert stat.S_IMODE((root / "here" / made).stat().st_mode) == 0o2775
    really([b"mkdir", b"-p", b"c/d"], root / "here", umask=0o002)
    assert stat.S_IMODE((root / "here/c/d").stat().st_mode) == 0o2775


def test_a_umask_that_would_lock_us_out_is_left_to_mkdir(root: Path) -> None:
    assert perform(*sh("mkdir x"), root, umask=0o777) is None
    assert not (root / "here" / "x").exists()


def test_the_masters_socket_is_never_deleted(root: Path) -> None:
    (root / ".termite-socket").write_text("")
    (root / "d" / "e" / ".termite-socket").write_text("")
    for script in ("rm -f ../.termite-socket", "rm -rf ../d", "rm -rf ../d/e"):
        assert perform(*sh(script), root) is None
    assert (root / "d" / "file").exists()
    shortcut = find_shortcut(*sh("rm -f ../plain"), os.fsencode(root / "here"), 0o22)
    assert shortcut is not None
    assert shortcut.perform(os.fsencode(root), protected={b"plain"}) is None


def test_the_masters_socket_is_neither_moved_nor_replaced_nor_touched(root: Path) -> None:
    (root / ".termite-socket").write_text("")
    before = snapshot(root)
    for script in ("mv -f ../.termite-socket x", "mv -f ../plain ../.termite-socket", "touch ../.termite-socket"):
        assert perform(*sh(script), root) is None
    assert snapshot(root) == before


def test_a_file_with_other_names_is_left_to_the_real_mv_and_touch(root: Path) -> None:
    os.link(root / "plain", root / "other")
    before = snapshot(root)
    for script in ("mv ../plain x", "mv -f ../d/file ../plain", "mv -f ../plain ../other", "touch ../other"):
        assert perform(*sh(script), root) is None
    assert snapshot(root) == before


def test_what_is_moved_is_the_same_file_and_not_newer(root: Path) -> None:
    os.utime(root / "plain", ns=(1, 1_234_567_891))
    before = (root / "plain").stat()
    result = perform(*sh("mv -f ../plain ../d/file"), root)
    assert result is not None
    after = (root / "d" / "file").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    prefix = os.fsencode(root)[1:]
    assert result.changed_paths == [prefix + end for end in (b"", b"/plain", b"/d", b"/d/file")]
    assert result.files() == {prefix + b"/plain": None, prefix + b"/d/file": b"%d" % after.st_ino}
    assert result.arrived == [prefix + b"/d/file"]


def test_what_is_touched_is_as_new_as_what_the_real_touch_leaves(root: Path) -> None:
    os.utime(root / "plain", ns=(1, 1))
    own = os.umask(0o077)
    try:
        renewed = perform(*sh("touch ../plain"), root, umask=0o002)
        made = perform(*sh("touch new"), root, umask=0o002)
    finally:
        os.umask(own)
    assert renewed is not None and made is not None
    assert renewed.files() == {}, "no contents were written that another command could mind"
    assert made.files() == {os.fsencode(root)[1:] + b"/here/new": hashlib.sha256(b"").digest()}
    really([b"touch", b"later"], root / "here")
    later = (root / "here" / "later").stat()
    for path in (root / "plain", root / "here" / "new"):
        assert later.st_mtime_ns - 5_000_000_000 < path.stat().st_mtime_ns <= later.st_mtime_ns
    assert (root / "plain").read_text() == "2"
    assert stat.S_IMODE((root / "here" / "new").stat().st_mode) == 0o664


def test_a_place_that_became_a_file_meanwhile_holds_nothing(root: Path) -> None:
    below = os.fsencode(root / "plain")[1:] + b"/x"
    assert ShortcutResult(0, b"", b"", [below]).files() == {below: None}


def test_a_default_acl_is_left_to_the_real_touch(root: Path) -> None:
    acl = bytes.fromhex("0200000001000700ffffffff04000500ffffffff20000000ffffffff")
    try:
        os.setxattr(root / "here", "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("this file system has no ACLs")
    assert perform(*sh("touch new"), root) is None
    assert perform(*sh("mkdir new"), root) is None
    assert not (root / "here" / "new").exists()


def test_symlinks_in_a_deleted_tree_are_deleted_not_followed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("")
    (root / "d" / "out").symlink_to(outside)
    (root / "d" / "up").symlink_to("../..")
    assert perform(*sh("rm -rf ../d"), root) is not None
    assert not (root / "d").exists()
    assert (outside / "precious").exists()


def test_a_directory_reached_through_a_symlink_is_left_to_the_real_command(root: Path) -> None:
    (root / "alias").symlink_to("d")
    assert perform(*sh("mkdir x"), root, cwd=root / "alias") is None
    assert perform(*sh("echo x"), root, cwd=root / "missing") is None
    assert perform(*sh("echo x"), root, cwd=root.parent) is None
    assert perform(*sh(f"mkdir {root}/d/x"), root) is not None
    assert perform(*sh(f"mkdir {root}/alias/y"), root) is None


def test_a_missing_root_is_no_shortcut(root: Path) -> None:
    shortcut = find_shortcut(*sh("true"), os.fsencode(root / "here"), 0o22)
    assert shortcut is not None
    assert shortcut.perform(os.fsencode(root / "missing")) is None
    (root / "alias").symlink_to("d")
    assert shortcut.perform(os.fsencode(root / "alias")) is None


def test_names_of_any_bytes_work(root: Path) -> None:
    name = b"a\nb\xff;$'\""
    assert perform(b"", [b"mkdir", name], root) is not None
    assert os.path.isdir(os.fsencode(root / "here") + b"/" + name)
    assert perform(b"", [b"rm", b"-r", name], root) is not None
    assert os.listdir(root / "here") == []


def test_a_tree_too_large_or_too_deep_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "MAX_ENTRIES", 3)
    assert perform(*sh("rm -rf ../d"), root) is None
    monkeypatch.setattr(confined, "MAX_ENTRIES", 5000)
    (root / ("x/" * 120)).mkdir(parents=True)
    assert perform(*sh("rm -rf ../x"), root) is None
    assert (root / ("x/" * 120)).exists()
    assert (root / "d" / "file").exists()


def test_a_command_of_enormous_length_is_left_alone(root: Path) -> None:
    assert perform(b"", [b"rm", b"-f", *[b"../x"] * shortcuts.MAX_WORDS], root) is None
    assert perform(*sh("rm -f " + "../plain " * 10_000), root) is None
    assert (root / "plain").exists()


def test_many_operands_in_many_directories_hold_a_bounded_number_of_descriptors(root: Path) -> None:
    for number in range(confined.MAX_DIRECTORIES + 1):
        (root / f"m{number}").mkdir()
        (root / f"m{number}" / "f").write_text("")
    operands = " ".join(f"../m{number}/f" for number in range(confined.MAX_DIRECTORIES + 1))
    assert perform(*sh(f"rm -f {operands}"), root) is None
    assert (root / "m0" / "f").exists()
    assert perform(*sh(f"rm -f {operands.rpartition(' ')[0]}"), root) is not None
    assert not (root / "m0" / "f").exists()


def test_what_mkdir_made_before_an_error_is_taken_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = os.mkdir

    def full_disk(name: bytes, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if name == b"c":
            raise OSError(28, "No space left on device")
        make(name, mode, dir_fd=dir_fd)

    before = snapshot(root)
    monkeypatch.setattr(os, "mkdir", full_disk)
    assert perform(*sh("mkdir -p x a/b/c"), root) is None
    assert snapshot(root) == before


def test_a_directory_that_appears_at_the_same_moment_is_as_good_as_made(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = os.mkdir

    def twice(name: bytes, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        make(name, mode, dir_fd=dir_fd)
        make(name, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", twice)
    assert perform(*sh("mkdir -p a/b"), root) == ShortcutResult(0, b"", b"", [])
    assert (root / "here/a/b").is_dir()


def test_a_failure_in_the_middle_of_deleting_reads_as_that_of_rm(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = os.unlink

    def stubborn(name: bytes, *, dir_fd: int | None = None) -> None:
        if name == b"file":
            raise PermissionError(1, "Operation not permitted")
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", stubborn)
    result = perform(*sh("rm -rf ../d ../plain"), root)
    assert result is not None
    assert result.status == 256
    assert result.stderr == b"rm: cannot remove '../d/file': Operation not permitted\n"
    assert not (root / "plain").exists()
    assert os.listdir(root / "d") == ["file"]
    prefix = os.fsencode(root)[1:]
    assert {prefix + b"/d", prefix + b"/d/e", prefix + b"/d/e/f", prefix + b"/plain"} <= set(result.changed_paths)
    assert prefix + b"/d/file" not in result.changed_paths


@pytest.fixture
def as_nobody() -> Iterator[Callable[[], None]]:
    """Gives up root's powers for the rest of the test when called."""
    yield lambda: os.seteuid(65534)
    os.seteuid(os.getuid())


@pytest.mark.skipif(os.getuid() != 0, reason="needs to give up root's powers")
def test_what_the_user_may_not_change_is_left_to_the_real_command(as_nobody: Callable[[], None]) -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        root = populate(Path(place))
        (root / "sticky").mkdir()
        (root / "sticky").chmod(0o1777)
        (root / "sticky" / "of-root").write_text("")
        (root / "open").mkdir()
        (root / "open").chmod(0o777)
        (root / "open" / "readonly").write_text("")
        (root / "open" / "mine").write_text("")
        (root / "open" / "tree" / "locked").mkdir(parents=True)
        (root / "open" / "tree" / "locked" / "file").write_text("")
        before = snapshot(root)
        as_nobody()
        for script in ("mkdir x", "rm -f ../plain", "rm -rf ../d", "rm -f ../sticky/of-root", "rm -rf ../open/tree"):
            assert perform(*sh(script), root) is None, script
        assert perform(*sh("rm ../open/readonly"), root) is None  # rm would ask
        assert perform(*sh("mv ../open/mine ../open/readonly"), root) is None  # and so would mv
        for script in ("mv -f ../plain x", "mv -f ../sticky/of-root ../open/x", "touch ../plain", "touch x"):
            assert perform(*sh(script), root) is None, script
        os.seteuid(0)
        assert snapshot(root) == before
        as_nobody()
        assert perform(*sh("rm -f ../open/readonly"), root) is not None
        os.seteuid(0)
