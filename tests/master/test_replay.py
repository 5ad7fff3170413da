"""Replay into a real tree: order, safety, times, and what happens when the tree has changed meanwhile."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from termite.attr.fileattr import ABSENT
from termite.errors import ReplayError
from termite.master import staging
from termite.master.replay import MOST_ARRIVALS, Replayer, Span
from termite.wire.messages import FileResult
from tests.master.replaying import OLD, SECOND, Tree

# -- what arrives -------------------------------------------------------------------------------------


def test_a_new_file_arrives_with_mode_and_time(tree: Tree) -> None:
    tree.file("x", b"hello", mode=0o751, mtime=OLD + 7)
    changed = tree.apply().changed
    found = (tree.path / "x").stat()
    assert (tree.path / "x").read_bytes() == b"hello"
    assert stat.S_IMODE(found.st_mode) == 0o751 and found.st_mtime_ns == OLD + 7
    assert changed == [tree.at(""), tree.at("x")]


def test_an_existing_file_is_replaced_as_a_whole(tree: Tree) -> None:
    old = tree.has("x").stat().st_ino
    tree.file("x")
    tree.apply()
    assert (tree.path / "x").read_bytes() == b"data" and (tree.path / "x").stat().st_ino != old
    assert tree.leftovers() == []


@pytest.mark.parametrize("in_place", [True, False])
def test_only_a_file_written_in_place_stays_joined_to_its_other_names(tree: Tree, in_place: bool) -> None:
    os.link(tree.has("x", "long old contents"), tree.path / "y")
    tree.file("x", in_place=in_place)
    tree.apply()
    assert (tree.path / "x").read_bytes() == b"data"
    assert ((tree.path / "y").read_bytes() == b"data") is in_place


def test_staged_contents_become_the_file(tree: Tree) -> None:
    data = bytes(1 << 20) + b"end"
    tree.file("d/big", data)
    with_staged = tree.replayer.stage(len(data), hashlib.sha256(data).digest())
    for at in range(0, len(data), 1 << 18):
        with_staged.write(data[at : at + (1 << 18)])
    with_staged.finish()
    tree.contents[tree.at("d/big")] = with_staged
    tree.apply()
    with_staged.close()
    found = (tree.path / "d/big").stat()
    assert (tree.path / "d/big").read_bytes() == data and found.st_blocks * 512 < 1 << 18


def test_one_staged_file_used_twice_gives_two_files(tree: Tree) -> None:
    tree.file("a")
    tree.file("b")
    staged = tree.replayer.stage(4, hashlib.sha256(b"data").digest())
    staged.write(b"data")
    staged.finish()
    tree.contents = {tree.at("a"): staged, tree.at("b"): staged}
    tree.apply()
    staged.close()
    assert (tree.path / "b").read_bytes() == b"data"
    assert (tree.path / "a").stat().st_ino != (tree.path / "b").stat().st_ino


def test_staged_contents_for_a_file_with_other_names_are_written_in_place(tree: Tree) -> None:
    os.link(tree.has("x", "old and long"), tree.path / "y")
    tree.file("x", b"data", in_place=True)
    staged = tree.replayer.stage(4, hashlib.sha256(b"data").digest())
    staged.write(b"data")
    staged.finish()
    tree.contents[tree.at("x")] = staged
    tree.apply()
    staged.close()
    assert (tree.path / "y").read_bytes() == b"data"


@pytest.mark.parametrize("kept_names", [True, False])
def test_without_o_tmpfile_nothing_is_left_either(tree: Tree, kept_names: bool) -> None:
    tree.replayer = Replayer(tree.root, unnamed=False)
    if kept_names:
        tree.has("x")
    tree.file("x")
    tree.file("y")
    staged = tree.replayer.stage(4, hashlib.sha256(b"data").digest())
    staged.close()
    tree.apply()
    assert (tree.path / "x").read_bytes() == b"data" and tree.leftovers() == []


def test_a_file_system_without_exchange_still_replaces(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_renameat2", lambda *_: -1)
    tree.has("x")
    tree.file("x")
    tree.apply()
    assert (tree.path / "x").read_bytes() == b"data" and tree.leftovers() == []


def test_a_hard_link_within_a_result_is_one_file(tree: Tree) -> None:
    tree.link("a", "b")
    tree.file("b")
    tree.has("c")
    tree.link("c", "b")
    tree.apply()
    assert len({(tree.path / name).stat().st_ino for name in "abc"}) == 1 and tree.leftovers() == []


def test_a_renamed_file_stays_joined_to_its_other_names(tree: Tree) -> None:
    ino = tree.has("d/a", "data").stat().st_ino
    os.link(tree.path / "d" / "a", tree.path / "twin")
    tree.file("moved", was="d/a")
    tree.removed("d/a")
    tree.apply()
    assert (tree.path / "moved").stat().st_ino == (tree.path / "twin").stat().st_ino == ino
    assert not (tree.path / "d" / "a").exists() and tree.leftovers() == []


@pytest.mark.parametrize("meanwhile", ["changed", "gone", "alone", "a link"])
def test_a_renamed_file_that_is_not_what_the_command_saw_is_made_anew(tree: Tree, meanwhile: str) -> None:
    source = tree.has("a", "data")
    if meanwhile != "alone":
        os.link(source, tree.path / "twin")
    if meanwhile == "changed":
        source.write_text("DATA")
    elif meanwhile in ("gone", "a link"):
        source.unlink()
    if meanwhile == "a link":
        source.symlink_to("twin")
    tree.file("moved", was="a")
    tree.removed("a")
    tree.apply()
    assert (tree.path / "moved").read_text() == "data" and (tree.path / "moved").stat().st_nlink == 1
    assert tree.leftovers() == []


def test_a_rename_that_fails_half_way_leaves_no_temporary_name(tree: Tree) -> None:
    os.link(tree.has("a", "data"), tree.path / "twin")
    (tree.path / "d").mkdir()
    tree.begin()
    tree.file("d", was="a")
    (tree.path / "d" / "unseen").write_text("x")
    os.utime(tree.path / "d" / "unseen")
    tree.span = Span(0, tree.span.received_ns, *tree.span[2:])
    with pytest.raises(ReplayError):
        tree.apply()
    assert tree.leftovers() == [] and (tree.path / "a").samefile(tree.path / "twin")


def test_attributes_change_without_contents(tree: Tree) -> None:
    ino = tree.has("x", "same").stat().st_ino
    tree.attributes("x", 0o700, OLD)
    tree.attributes("gone", 0o700, OLD)
    notes = tree.apply().notes
    found = (tree.path / "x").stat()
    assert (found.st_ino, found.st_mtime_ns, stat.S_IMODE(found.st_mode)) == (ino, OLD, 0o700)
    assert len(notes) == 1 and "gone" in notes[0]


def test_a_symlink_replaces_whatever_it_meets(tree: Tree) -> None:
    tree.has("f")
    tree.has("d/x")
    os.symlink("old", tree.path / "l")
    tree.begin()
    for name in ("f", "d", "l", "new"):
        tree.symlink(name, b"to\xff")
    tree.apply()
    assert {os.readlink(os.path.join(tree.root, name)) for name in (b"f", b"d", b"l", b"new")} == {b"to\xff"}
    assert os.lstat(tree.path / "new").st_mtime_ns == OLD and tree.leftovers() == []


def test_a_read_only_directory_receives_its_children_first(tree: Tree) -> None:
    tree.directory("d", mode=0o500, mtime=OLD)
    tree.file("d/x")
    tree.apply()
    found = (tree.path / "d").stat()
    assert stat.S_IMODE(found.st_mode) == 0o500 and found.st_mtime_ns == OLD


def test_thousands_of_directories_need_few_descriptors(tree: Tree) -> None:
    for n in range(1500):
        tree.directory(f"d{n}")
        tree.file(f"d{n}/x")
    tree.apply()
    assert len(list(tree.path.glob("*/x"))) == 1500
    tree.begin()
    tree.files = [FileResult(tree.at(f"d{n}"), ABSENT) for n in range(1500)]
    tree.apply()
    assert list(tree.path.iterdir()) == []


@pytest.mark.parametrize("after", range(1, 20, 3))
def test_a_killed_master_leaves_every_file_whole(tree: Tree, after: int) -> None:
    versions = [b"a" * 300_000, b"b" * 200_000]
    tree.has("x").write_bytes(versions[0])
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for n in range(10_000):
                tree.file("x", versions[n % 2])
                tree.apply()
                os.write(write, b".")
        finally:
            os._exit(1)
    os.close(write)
    for _ in range(after):
        os.read(read, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read)
    assert (tree.path / "x").read_bytes() in versions


# -- what the tree may have become meanwhile ----------------------------------------------------------


def test_removing_what_is_gone_is_fine(tree: Tree) -> None:
    tree.removed("nothing")
    tree.removed("no/such/directory")
    tree.apply()
    assert list(tree.path.iterdir()) == []


def test_a_removed_directory_keeps_what_the_command_did_not_see(tree: Tree) -> None:
    tree.has("d/seen")
    tree.has("d/sub/seen")
    tree.begin()
    time_passes(tree)
    tree.has("d/sub/meanwhile")
    tree.removed("d")
    notes = tree.apply().notes
    assert [path.name for path in tree.path.rglob("*")] == ["d", "sub", "meanwhile"]
    assert any("meanwhile" in note for note in notes)


def time_passes(tree: Tree) -> None:
    """The command was sent just after the tree was made: wait for the clock to tick past that."""
    deadline = time.time_ns() + SECOND
    while time.time_ns() < tree.span.sent_ns + 10_000_000 and time.time_ns() < deadline:
        os.sched_yield()


def test_a_directory_with_private_files_only_may_have_been_left_by_rmdir(tree: Tree) -> None:
    tree.has("d/key").chmod(0o600)
    tree.begin()
    tree.removed("d")
    tree.apply()
    assert (tree.path / "d/key").exists()


def test_a_removed_tree_takes_its_private_files_along(tree: Tree) -> None:
    tree.has("d/key").chmod(0o600)
    tree.has("d/shown")
    tree.begin()
    tree.removed("d")
    tree.apply()
    assert not (tree.path / "d").exists()


def test_an_opaque_directory_replaces_what_was_there(tree: Tree) -> None:
    tree.has("d/old")
    tree.has("d/sub/old")
    tree.begin()
    tree.directory("d", opaque=True)
    tree.file("d/new")
    tree.apply()
    assert [path.name for path in tree.path.rglob("*")] == ["d", "new"]


def test_a_directory_made_by_two_commands_at_once_keeps_the_files_of_both(tree: Tree) -> None:
    tree.begin()
    time_passes(tree)
    tree.has("out/theirs")
    tree.directory("out", opaque=True)
    tree.file("out/ours")
    tree.apply()
    assert sorted(os.listdir(tree.path / "out")) == ["ours", "theirs"]


def test_a_missing_parent_is_made_again(tree: Tree) -> None:
    tree.file("gone/deep/x")
    replayed = tree.apply()
    assert (tree.path / "gone/deep/x").read_bytes() == b"data" and len(replayed.notes) == 2
    assert tree.at("gone") in replayed.changed


def test_a_file_takes_the_place_of_a_directory(tree: Tree) -> None:
    tree.has("d/x")
    tree.begin()
    tree.file("d")
    tree.apply()
    assert (tree.path / "d").read_bytes() == b"data" and tree.leftovers() == []


def test_a_directory_with_new_files_does_not_give_way_to_a_file(tree: Tree) -> None:
    tree.begin()
    time_passes(tree)
    tree.has("d/meanwhile")
    tree.file("d")
    with pytest.raises(ReplayError, match="new files"):
        tree.apply()
    assert (tree.path / "d/meanwhile").exists() and tree.leftovers() == []


def test_a_rename_that_cannot_be_finished_is_undone(tree: Tree) -> None:
    tree.has("a/in-a")
    tree.begin()
    time_passes(tree)
    tree.has("b/meanwhile")
    tree.directory("b", was="a")
    tree.removed("a")
    with pytest.raises(ReplayError):
        tree.apply()
    assert (tree.path / "a/in-a").exists() and (tree.path / "b/meanwhile").exists() and tree.leftovers() == []


def test_a_swap_tells_of_every_path_in_both(tree: Tree) -> None:
    tree.has("a/x")
    tree.has("b/y")
    tree.begin()
    tree.directory("a", was="b")
    tree.directory("b", was="a")
    changed = set(tree.apply().changed)
    assert {tree.at(name) for name in ("a", "b", "a/x", "a/y", "b/x", "b/y")} <= changed
    assert (tree.path / "a/y").exists() and (tree.path / "b/x").exists()


def test_a_hard_link_to_what_is_gone_is_an_error(tree: Tree) -> None:
    tree.link("x", "gone")
    with pytest.raises(ReplayError, match="gone"):
        tree.apply()


# -- times --------------------------------------------------------------------------------------------


def test_a_directory_keeps_its_time_when_only_its_files_contents_changed(tree: Tree) -> None:
    tree.has("d/x")
    os.utime(tree.path / "d", ns=(OLD, OLD))
    tree.file("d/x", in_place=True)
    tree.apply()
    assert (tree.path / "d").stat().st_mtime_ns == OLD


def test_a_directorys_time_never_goes_back_behind_another_commands_change(tree: Tree) -> None:
    tree.has("d/x")
    later = tree.span.received_ns + SECOND
    os.utime(tree.path / "d", ns=(later, later))
    tree.directory("d", mtime=tree.span.started_ns)
    tree.file("d/y")
    tree.apply()
    assert (tree.path / "d").stat().st_mtime_ns == later
    tree.directory("d", mtime=OLD)  # stale, not chosen: it changed after the command was sent
    tree.apply()
    assert (tree.path / "d").stat().st_mtime_ns == later


SPAN = Span(
    sent_ns=1000 * SECOND,
    received_ns=1010 * SECOND,
    started_ns=500 * SECOND,
    ended_ns=509 * SECOND,
    offset_ns=500 * SECOND,
)


@given(st.integers(0, 2000 * SECOND))
def test_implicit_times_lie_within_the_run_and_explicit_ones_stay(mtime_ns: int) -> None:
    told = SPAN.translate(mtime_ns)
    if 499.98 * SECOND <= mtime_ns <= 509.02 * SECOND:
        assert SPAN.sent_ns <= told <= SPAN.received_ns
        assert told == mtime_ns + SPAN.offset_ns or told in (SPAN.sent_ns, SPAN.received_ns)
    else:
        assert told == mtime_ns


def test_implicit_times_keep_their_order() -> None:
    times = [SPAN.translate(500 * SECOND + n * 10**8) for n in range(90)]
    assert times == sorted(times) and len(set(times)) == 90


@pytest.mark.parametrize("how", ["cleared", "made anew"])
def test_an_old_file_that_was_moved_there_while_the_command_ran_stays(tree: Tree, how: str) -> None:
    tree.has("d/seen")
    tree.has("d/moved")
    tree.begin()
    tree.replayer.note_arrival(tree.at("d/moved"), tree.span.sent_ns + SECOND)
    if how == "cleared":
        tree.removed("d")
    else:
        tree.directory("d", opaque=True)
    tree.apply()
    assert os.listdir(tree.path / "d") == ["moved"]


def test_a_file_that_was_moved_there_before_is_like_any_other(tree: Tree) -> None:
    tree.has("d/moved")
    tree.replayer.note_arrival(tree.at("d/moved"), time.time_ns())
    tree.begin()
    tree.removed("d")
    tree.apply()
    assert not (tree.path / "d").exists()


def test_what_was_moved_is_remembered_for_a_bounded_number_of_files(tree: Tree) -> None:
    for number in range(MOST_ARRIVALS + 5):
        tree.replayer.note_arrival(tree.at(str(number)), number)
    assert len(tree.replayer._arrived) == MOST_ARRIVALS and b"5" in tree.replayer._arrived
