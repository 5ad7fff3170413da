"""The attribute cache: what is known, what is stale, and that nothing outlives its parent."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from termite.attr.cache import AttrCache, Stale, What, staleness
from termite.attr.fileattr import ABSENT, FileAttr
from termite.wire.messages import Change, DirListing

DIR = FileAttr(0o40755)


def a_file(version: int = 0, hash: bytes = b"") -> FileAttr:
    return FileAttr(0o100644, 10 + version, version, hash=hash)


def a_link(target: bytes) -> FileAttr:
    return FileAttr(0o120777, len(target), target=target)


def listing(**entries: FileAttr) -> DirListing:
    return DirListing(True, DIR, {name.encode(): attr for name, attr in entries.items()})


NO_DIRECTORY = DirListing(False, ABSENT)


@pytest.fixture
def cache() -> AttrCache:
    """root: d/ (f, sub/ (g)), l -> d, file"""
    cache = AttrCache()
    cache.put_listing(b"", listing(d=DIR, l=a_link(b"d"), file=a_file()))
    cache.put_listing(b"d", listing(f=a_file(), sub=DIR))
    cache.put_listing(b"d/sub", listing(g=a_file()))
    cache.check()
    return cache


def told(cache: AttrCache, *changes: tuple[bytes, FileAttr]) -> list[Stale]:
    stale = cache.apply([Change(path, attr) for path, attr in changes])
    cache.check()
    return stale


def test_an_empty_cache_knows_nothing_not_even_the_root() -> None:
    assert AttrCache().lookup(b"") is None
    assert AttrCache().lookup(b"a/b") is None
    assert AttrCache().listing(b"") is None


def test_a_known_directory_answers_for_every_name_in_it(cache: AttrCache) -> None:
    assert cache.lookup(b"d/f") == a_file()
    assert cache.lookup(b"d/nothing") is ABSENT
    assert cache.listing(b"d") == {b"f": a_file(), b"sub": DIR}
    assert len(cache) == 6


def test_the_root_has_attributes_of_its_own(cache: AttrCache) -> None:
    assert cache.lookup(b"") == DIR
    assert told(cache, (b"", FileAttr(0o40700))) == [Stale(b"", What.ATTRIBUTES)]
    assert cache.lookup(b"") == FileAttr(0o40700)


def test_names_below_what_is_not_a_directory_do_not_exist(cache: AttrCache) -> None:
    assert cache.lookup(b"file/x") is ABSENT
    assert cache.lookup(b"d/nothing/x/y") is ABSENT
    assert cache.lookup(b"l/f") is ABSENT  # links are the kernel's to follow


def test_a_listing_handed_out_is_a_copy(cache: AttrCache) -> None:
    before = cache.listing(b"d")
    told(cache, (b"d/new", a_file()))
    assert before is not None and b"new" not in before


def test_a_created_file_is_new(cache: AttrCache) -> None:
    assert told(cache, (b"d/new", a_file())) == [Stale(b"d/new", What.NEW)]


def test_a_deleted_file_is_gone(cache: AttrCache) -> None:
    assert told(cache, (b"d/f", ABSENT)) == [Stale(b"d/f", What.GONE)]
    assert cache.lookup(b"d/f") is ABSENT


def test_changed_contents_keep_the_name(cache: AttrCache) -> None:
    assert told(cache, (b"d/f", a_file(1))) == [Stale(b"d/f", What.CONTENTS)]


def test_a_touched_file_with_the_same_hash_keeps_its_contents() -> None:
    old, new = FileAttr(0o100644, 3, 1, hash=b"h"), FileAttr(0o100600, 3, 2, hash=b"h")
    assert staleness(b"f", old, new) == Stale(b"f", What.ATTRIBUTES)


def test_a_link_with_another_target_is_another_link(cache: AttrCache) -> None:
    assert told(cache, (b"l", a_link(b"x"))) == [Stale(b"l", What.TARGET)]


def test_news_that_is_none_makes_nothing_stale(cache: AttrCache) -> None:
    assert told(cache, (b"d/f", a_file()), (b"d/nothing", ABSENT), (b"d", DIR)) == []


def test_a_removed_directory_takes_everything_below_with_it(cache: AttrCache) -> None:
    assert told(cache, (b"d", ABSENT)) == [Stale(b"d", What.GONE, was_dir=True)]
    assert cache.lookup(b"d/sub/g") is ABSENT
    assert not cache.knows(b"d") and not cache.knows(b"d/sub")


def test_a_directory_replaced_by_a_file_and_back_is_unknown_again(cache: AttrCache) -> None:
    assert told(cache, (b"d", a_file())) == [Stale(b"d", What.GONE, was_dir=True)]
    assert cache.lookup(b"d/f") is ABSENT
    assert told(cache, (b"d", DIR)) == [Stale(b"d", What.GONE)]
    assert cache.lookup(b"d/f") is None, "a new directory must be asked for"


def test_a_new_directory_and_its_files_in_one_update_are_asked_for_later(cache: AttrCache) -> None:
    assert told(cache, (b"d/new", DIR), (b"d/new/f", a_file())) == [Stale(b"d/new", What.NEW)]
    assert cache.lookup(b"d/new/f") is None


def test_a_changed_directory_keeps_what_is_in_it(cache: AttrCache) -> None:
    assert told(cache, (b"d", FileAttr(0o40750, mtime_ns=5))) == [Stale(b"d", What.ATTRIBUTES)]
    assert cache.lookup(b"d/sub/g") == a_file()


def test_news_for_an_unknown_directory_is_ignored(cache: AttrCache) -> None:
    told(cache, (b"d/sub/g/x/y", a_file()), (b"elsewhere/f", a_file()))
    assert not cache.knows(b"elsewhere")


def test_a_subtree_whose_parents_are_unknown_is_dropped_all_the_same() -> None:
    cache = AttrCache()
    cache.put_listing(b"a/b/c", listing(f=a_file()))
    cache.check()
    assert cache.lookup(b"a/b/c/f") == a_file()
    assert told(cache, (b"a", ABSENT)) == []
    assert not cache.knows(b"a/b/c") and len(cache) == 0
    assert cache._below == {}


def test_a_listing_that_says_no_directory_removes_it_from_its_parent(cache: AttrCache) -> None:
    assert cache.put_listing(b"d/sub", NO_DIRECTORY) == [Stale(b"d/sub", What.GONE, was_dir=True)]
    cache.check()
    assert cache.lookup(b"d/sub") is ABSENT and cache.lookup(b"d/sub/g") is ABSENT


def test_no_directory_with_unknown_parents_is_remembered_until_it_appears() -> None:
    cache = AttrCache()
    cache.put_listing(b"a/b", NO_DIRECTORY)
    cache.check()
    assert cache.lookup(b"a/b/f") is ABSENT
    told(cache, (b"a/b", DIR))
    assert cache.lookup(b"a/b/f") is None


def test_a_parent_that_comes_late_overrules_its_children() -> None:
    cache = AttrCache()
    cache.put_listing(b"a/b", listing(f=a_file()))
    cache.put_listing(b"a", listing(b=a_file()))
    cache.check()
    assert cache.lookup(b"a/b/f") is ABSENT


def test_a_second_listing_returns_the_difference(cache: AttrCache) -> None:
    stale = cache.put_listing(b"d", listing(sub=a_file(), new=a_file()))
    cache.check()
    assert {item.path: item.what for item in stale} == {b"d/f": What.GONE, b"d/new": What.NEW, b"d/sub": What.GONE}
    assert not cache.knows(b"d/sub")


def test_what_was_learned_yields_to_news_that_came_first(cache: AttrCache) -> None:
    known = cache.lookup(b"d/f")
    assert known is not None
    assert cache.learn(b"d/f", known, a_file(0, b"h"))
    assert cache.lookup(b"d/f") == a_file(0, b"h")
    assert not cache.learn(b"d/f", known, a_file(7, b"old")), "the name was touched since"
    assert cache.lookup(b"d/f") == a_file(0, b"h")


def test_check_finds_a_listing_without_a_directory(cache: AttrCache) -> None:
    cache._dirs[b"d"][b"sub"] = a_file()
    with pytest.raises(AssertionError):
        cache.check()


def test_an_entry_costs_less_than_400_bytes() -> None:
    import msgspec

    count, per_directory = 10_000, 50
    encoded = [
        msgspec.msgpack.encode(
            listing(
                **{f"file_{d}_{i}.h": FileAttr(0o100644, d * i + 999, 10**18 + i, 1, 1000, 1000) for i in range(50)}
            )
        )
        for d in range(count // per_directory)
    ]
    cache = AttrCache()
    tracemalloc.start()
    try:
        for number, answer in enumerate(encoded):
            cache.put_listing(b"usr/include/%d" % number, msgspec.msgpack.decode(answer, type=DirListing))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(cache) == count
    assert used / count < 400


# -- against a tree that is always fully known ------------------------------------------------------

NAMES = st.sampled_from([b"a", b"b"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)
ATTRS = st.one_of(
    st.just(DIR), st.integers(0, 2).map(a_file), st.sampled_from([b"x", b"yy"]).map(a_link), st.just(ABSENT)
)


class Master:
    """A toy file system that tells a cache of its changes."""

    def __init__(self) -> None:
        self.files: dict[bytes, FileAttr] = {b"": DIR}

    def children(self, path: bytes) -> dict[bytes, FileAttr]:
        prefix = path + b"/" if path else b""
        inside = (p for p in self.files if p and p.startswith(prefix))
        return {p[len(prefix) :]: self.files[p] for p in inside if b"/" not in p[len(prefix) :]}

    def answer(self, path: bytes) -> DirListing:
        attr = self.files.get(path, ABSENT)
        return DirListing(True, attr, self.children(path)) if attr.is_dir() else NO_DIRECTORY

    def change(self, path: bytes, attr: FileAttr) -> bool:
        if not self.files.get(path.rpartition(b"/")[0], ABSENT).is_dir():
            return False
        if not attr.is_dir():
            self.files = {p: a for p, a in self.files.items() if not p.startswith(path + b"/")}
        self.files[path] = attr
        if not attr.exists():
            del self.files[path]
        return True


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(PATHS, st.tuples(PATHS, ATTRS)), max_size=40))
def test_whatever_is_known_is_what_the_master_has(steps: list[bytes | tuple[bytes, FileAttr]]) -> None:
    master, cache = Master(), AttrCache()
    kernel: dict[bytes, FileAttr] = {}  # what somebody was answered and was not told to forget
    for step in steps:
        if isinstance(step, bytes):
            stale = []
            for end in [0, *(i for i, byte in enumerate(step) if byte == ord("/"))]:  # as the kernel walks
                if cache.lookup(step[:end]) is None or cache.lookup(step[:end]).is_dir():
                    stale += cache.put_listing(step[:end], master.answer(step[:end]))
            answer = cache.lookup(step)
            if answer is not None:
                kernel[step] = answer
        elif master.change(*step):
            stale = cache.apply([Change(*step)])
        else:
            continue
        for item in stale:
            kernel = {p: a for p, a in kernel.items() if p != item.path and not p.startswith(item.path + b"/")}
        cache.check()
        for path in {b"", b"a", b"a/b", b"b/a", b"a/a/a", b"a/b/a", b"b/b/b"}:
            known = cache.lookup(path)
            assert known is None or known == master.files.get(path, ABSENT), path
        for path, attr in kernel.items():
            assert attr == master.files.get(path, ABSENT), f"{path!r} went stale without a word"
