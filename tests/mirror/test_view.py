"""What a task's file system means: questions shared, answers in order, contents never torn."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from termite.attr.cache import Stale, What
from termite.attr.fileattr import ABSENT, FileAttr
from termite.errors import PeerLost, TermiteError, Timeout
from termite.mirror.view import OpenContent
from tests.mirror.mounting import error_of
from tests.mirror.told import FakeMaster, ids, paths_of


@pytest.fixture
def master() -> Iterator[FakeMaster]:
    master = FakeMaster(max_open=3)
    master.directory(b"d")
    master.file(b"d/f", b"contents")
    master.directory(b"d/sub")
    master.link(b"l", b"d/f")
    yield master
    master.view.cache.check()
    master.view.close()


def open_fds() -> int:
    gc.collect()  # what earlier tests' tracebacks still hold
    return len(os.listdir("/proc/self/fd"))


def test_a_name_is_answered_and_its_directory_asked_once(master: FakeMaster) -> None:
    assert master.view.getattr(b"d/f").size == 8
    assert error_of(lambda: master.view.getattr(b"d/nothing")) == errno.ENOENT
    assert master.view.look(b"d/nothing") is ABSENT
    assert master.questions == {b"dir d": 1}


def test_the_root_is_asked_for_itself(master: FakeMaster) -> None:
    assert master.view.getattr(b"").is_dir()
    assert master.questions == {b"dir ": 1}


def test_a_directory_lists_its_names(master: FakeMaster) -> None:
    assert set(master.view.readdir(b"d")) == {b"f", b"sub"}
    assert master.view.readdir(b"d/sub") == {}


def test_listing_what_is_no_directory_fails(master: FakeMaster) -> None:
    master.view.getattr(b"d/f")
    assert error_of(lambda: master.view.readdir(b"d/f")) == errno.ENOTDIR
    assert error_of(lambda: master.view.readdir(b"d/nothing")) == errno.ENOENT


def test_a_link_is_read_and_nothing_else_is_one(master: FakeMaster) -> None:
    assert master.view.readlink(b"l") == b"d/f"
    assert error_of(lambda: master.view.readlink(b"d/f")) == errno.EINVAL
    assert error_of(lambda: master.view.readlink(b"d/nothing")) == errno.ENOENT


def test_a_link_is_as_long_as_its_target_whatever_the_master_said(master: FakeMaster) -> None:
    master.attrs[b"l"] = FileAttr(0o120777, 0, target=b"four")
    assert master.view.getattr(b"l").size == 4


def test_contents_are_read_at_any_offset_and_fetched_once(master: FakeMaster) -> None:
    assert master.view.read(b"d/f", 100, 0) == b"contents"
    assert master.view.read(b"d/f", 3, 3) == b"ten"
    assert master.view.read(b"d/f", 10, 8) == b""
    assert master.questions[b"file d/f"] == 1


def test_reading_what_is_no_file_fails(master: FakeMaster) -> None:
    assert error_of(lambda: master.view.read(b"d", 1, 0)) == errno.EISDIR
    assert error_of(lambda: master.view.read(b"l", 1, 0)) == errno.EINVAL
    assert error_of(lambda: master.view.read(b"nothing", 1, 0)) == errno.ENOENT


def test_the_masters_user_becomes_the_tasks_and_others_stay() -> None:
    master = FakeMaster(owner=ids())
    master.file(b"mine", b"", uid=1000, gid=1001)
    master.file(b"mixed", b"", uid=1000, gid=5)
    master.file(b"roots", b"")
    seen = [master.view.getattr(path) for path in (b"mine", b"mixed", b"roots")]
    assert [(attr.uid, attr.gid) for attr in seen] == [(2000, 2001), (2000, 5), (0, 0)]


def test_counters_count(master: FakeMaster) -> None:
    master.view.getattr(b"d")
    master.view.readdir(b"d")
    master.view.readlink(b"l")
    master.view.read(b"d/f", 100, 0)
    counts = master.view.counters.as_dict()
    assert counts == {
        "ask_dir": 2, "ask_file": 1, "changed_while_served": 0,
        "getattr": 1, "read": 1, "read_bytes": 8, "readdir": 1, "readlink": 1,
    }  # fmt: skip


# -- one question at a time -----------------------------------------------------------------------


def together(count: int, call: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(count) as pool:
        return [future.result(20) for future in [pool.submit(call) for _ in range(count)]]


def test_concurrent_askers_of_one_directory_share_the_answer(master: FakeMaster) -> None:
    others_wait = threading.Event()
    seen = threading.Semaphore(0)
    master.before_dir = lambda path: others_wait.wait(20) or None
    ask = master.view.getattr

    def look() -> FileAttr:
        seen.release()
        return ask(b"d/f")

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(look) for _ in range(8)]
        for _ in range(8):
            assert seen.acquire(timeout=20)
        others_wait.set()
        assert all(future.result(20).size == 8 for future in futures)
    assert master.questions[b"dir d"] == 1


def test_concurrent_readers_of_one_file_share_one_fetch(master: FakeMaster) -> None:
    master.view.getattr(b"d/f")
    started, go = threading.Semaphore(0), threading.Event()
    master.before_file = lambda path: go.wait(20) or None

    def read() -> bytes:
        started.release()
        return master.view.read(b"d/f", 100, 0)

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(read) for _ in range(8)]
        for _ in range(8):
            assert started.acquire(timeout=20)
        go.set()
        assert {future.result(20) for future in futures} == {b"contents"}
    assert master.questions[b"file d/f"] == 1


def test_a_failed_question_reaches_the_asker_and_is_asked_again(master: FakeMaster) -> None:
    def lost(path: bytes) -> None:
        raise PeerLost("the master went away")

    master.before_dir = lost
    with pytest.raises(PeerLost):
        master.view.getattr(b"d/f")
    master.before_dir = lambda path: None
    assert master.view.getattr(b"d/f").size == 8


def test_waiting_for_the_answer_to_anothers_question_is_bounded() -> None:
    master = FakeMaster(ask_limit_s=0.05)
    master.file(b"f", b"")
    asked, go = threading.Event(), threading.Event()

    def slow(path: bytes) -> None:
        asked.set()
        go.wait(20)

    master.before_dir = slow
    first = threading.Thread(target=lambda: master.view.look(b"f"))
    first.start()
    assert asked.wait(20)
    with pytest.raises(Timeout):
        master.view.look(b"f")
    go.set()
    first.join(20)


def test_a_question_whose_answers_are_always_outrun_gives_up() -> None:
    master = FakeMaster()
    master.directory(b"d")
    master.view.getattr(b"d")
    master.ask_dir = lambda path: None  # type: ignore[method-assign]
    master.view._ask_dir = lambda path: None
    with pytest.raises(TermiteError, match="faster"):
        master.view.getattr(b"d/f")


# -- news -------------------------------------------------------------------------------------------


def test_only_names_that_were_asked_for_are_stale(master: FakeMaster) -> None:
    master.view.getattr(b"d/f")
    master.file(b"d/f", b"new contents")
    master.file(b"d/g", b"never looked at")
    assert master.tell(b"d/f", b"d/g") == [Stale(b"d/f", What.CONTENTS)]


def test_a_read_after_a_change_gives_the_new_contents(master: FakeMaster) -> None:
    assert master.view.read(b"d/f", 100, 0) == b"contents"
    master.file(b"d/f", b"others, longer")
    master.tell(b"d/f")
    assert master.view.read(b"d/f", 100, 0) == b"others, longer"
    master.remove(b"d/f")
    master.tell(b"d/f")
    assert error_of(lambda: master.view.read(b"d/f", 100, 0)) == errno.ENOENT


def test_listing_news_found_while_asking_is_reported(master: FakeMaster) -> None:
    master.view.getattr(b"d/sub")
    master.remove(b"d/sub")
    assert master.view.look(b"d/sub/x") is ABSENT
    assert master.noticed == [Stale(b"d/sub", What.GONE, was_dir=True)]


# -- files that change while they are served ------------------------------------------------------


def test_a_file_of_another_size_than_told_is_not_served_until_its_attributes_are_asked_for(master: FakeMaster) -> None:
    master.view.getattr(b"d/f")
    master.file(b"d/f", b"grown since the listing")
    for _ in range(2):  # the kernel tries again when reading ahead fails
        assert error_of(lambda: master.view.read(b"d/f", 100, 0)) == errno.ESTALE
    assert set(master.noticed) == {Stale(b"d/f", What.CONTENTS)}
    assert master.view.counters.changed_while_served == 1
    assert master.view.getattr(b"d/f").size == 23
    assert master.view.read(b"d/f", 100, 0) == b"grown since the listing"
    assert master.questions[b"file d/f"] == 1


def test_news_that_the_kernel_has_not_heard_are_not_served_under_the_old_size(master: FakeMaster) -> None:
    master.view.getattr(b"d/f")
    assert master.view.read(b"d/f", 100, 0) == b"contents"
    master.file(b"d/f", b"short")
    master.tell(b"d/f")
    assert error_of(lambda: master.view.read(b"d/f", 100, 0)) == errno.ESTALE
    master.view.getattr(b"d/f")
    assert master.view.read(b"d/f", 100, 0) == b"short"


def test_a_file_that_became_a_link_is_not_served(master: FakeMaster) -> None:
    master.view.getattr(b"d/f")
    master.remove(b"d/f")
    master.link(b"d/f", b"x")
    assert error_of(lambda: master.view.read(b"d/f", 100, 0)) == errno.ESTALE
    assert master.noticed == [Stale(b"d/f", What.GONE)]


def test_a_touched_file_is_served_and_its_times_are_noticed(master: FakeMaster) -> None:
    master.view.getattr(b"d/f")
    master.file(b"d/f", b"contents")
    assert master.view.read(b"d/f", 100, 0) == b"contents"
    assert paths_of(master.noticed) == {b"d/f"}


def test_other_contents_of_the_same_size_make_the_kernel_drop_the_old(master: FakeMaster) -> None:
    master.view.getattr(b"d/f")
    assert master.view.read(b"d/f", 4, 0) == b"cont"
    master.file(b"d/f", b"CONTENTS")
    master.view.close()  # as if evicted
    assert master.view.read(b"d/f", 8, 0) == b"CONTENTS"
    assert master.noticed == [Stale(b"d/f", What.CONTENTS)]


def test_an_answer_that_news_overtook_does_not_overwrite_them(master: FakeMaster) -> None:
    master.view.getattr(b"d/f")
    twice = iter([True, False])

    def news(path: bytes) -> None:
        if next(twice):
            master.file(b"d/f", b"newer!!!")
            master.tell(b"d/f")

    master.before_file_answer = news
    assert master.view.read(b"d/f", 100, 0) == b"newer!!!"
    assert master.questions[b"file d/f"] == 2


def test_contents_of_the_wrong_length_are_refused(master: FakeMaster) -> None:
    master.contents[b"d/f"] = b"short"
    with pytest.raises(TermiteError, match="wrong length"):
        master.view.read(b"d/f", 100, 0)


# -- descriptors --------------------------------------------------------------------------------------


def test_no_more_files_stay_open_than_allowed(master: FakeMaster) -> None:
    before = open_fds()
    for number in range(10):
        master.file(b"n%d" % number, b"%d" % number)
    for number in range(10):
        assert master.view.read(b"n%d" % number, 9, 0) == b"%d" % number
    assert open_fds() - before == 3
    master.view.close()
    assert open_fds() == before


def test_a_changed_or_removed_file_is_closed(master: FakeMaster) -> None:
    before = open_fds()
    master.file(b"d/sub/x", b"x")
    master.view.read(b"d/f", 1, 0)
    master.view.read(b"d/sub/x", 1, 0)
    master.view.getattr(b"d/sub")
    master.file(b"d/f", b"new")
    master.tell(b"d/f")
    assert open_fds() - before == 1
    master.remove(b"d/sub")
    master.tell(b"d/sub")
    assert open_fds() == before


def test_a_file_is_not_closed_under_its_reader() -> None:
    master = FakeMaster(max_open=1)
    master.file(b"a", b"aaa")
    master.file(b"b", b"bbb")
    held = master.view._content(b"a")
    master.view.read(b"b", 3, 0)
    assert os.pread(held.fd, 3, 0) == b"aaa"
    fd = held.fd
    del held
    with pytest.raises(OSError):
        os.fstat(fd)
    master.view.close()


def test_a_failed_read_leaves_no_descriptor_to_the_garbage_collector(master: FakeMaster) -> None:
    before = open_fds()
    master.contents[b"d/f"] = b"short"
    gc.disable()
    try:
        with pytest.raises(TermiteError):
            master.view.read(b"d/f", 100, 0)
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


def test_an_open_content_without_a_file_closes_nothing() -> None:
    OpenContent(b"", -1)


def test_readers_see_whole_versions_while_changes_come(master: FakeMaster) -> None:
    versions = [bytes([65 + n]) * 8 for n in range(20)]
    done = threading.Event()

    def read() -> set[bytes]:
        seen = set()
        while not done.is_set():
            try:
                seen.add(master.view.read(b"d/f", 8, 0))
            except OSError as error:
                assert error.errno == errno.ESTALE
        return seen

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        for contents in versions * 5:
            master.file(b"d/f", contents)
            master.tell(b"d/f")
            assert master.view.read(b"d/f", 8, 0) == contents
        done.set()
        seen = set().union(*(reader.result(20) for reader in readers))
    assert seen <= {b"contents", *versions}
