from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from termite.master.conflicts import RECENT, Command, Conflict, Conflicts

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


class Clocked:
    """Conflicts with a clock that ticks at every event."""

    def __init__(self, max_changes: int = 1000) -> None:
        self.conflicts = Conflicts(max_changes)
        self.now = 0

    def sent(self, *tasks: int) -> None:
        for task in tasks:
            self.now += 10
            self.conflicts.sent(task, self.now)
            self.conflicts.check()

    def changed(self, task: int, files: Mapping[bytes, bytes | None]) -> list[Conflict]:
        self.now += 10
        found = self.conflicts.changed(Command(task, f"cmd {task}"), files, self.now)
        self.conflicts.check()
        return found

    def ended(self, *tasks: int) -> None:
        for task in tasks:
            self.conflicts.ended(task)
            self.conflicts.check()


def test_two_commands_that_overlap_and_write_the_same_file_are_found() -> None:
    clock = Clocked()
    clock.sent(1, 2)
    assert clock.changed(1, {b"p/out": A, b"p/one": A}) == []
    clock.ended(1)
    (found,) = clock.changed(2, {b"p/out": B, b"p/two": A})
    assert (found.path, found.first.task, found.second.task, found.same) == (b"p/out", 1, 2, False)
    assert found.second_ns - found.first_ns == 10
    text = str(found)
    assert "/p/out" in text and "task 1 (cmd 1)" in text and "task 2 (cmd 2)" in text
    assert "what task 2 left is there now" in text


def test_a_command_that_was_sent_after_the_other_ones_changes_is_no_conflict() -> None:
    clock = Clocked()
    clock.sent(1)
    clock.changed(1, {b"out": A})
    clock.ended(1)
    clock.sent(2)
    assert clock.changed(2, {b"out": B}) == []


def test_so_it_is_while_a_third_one_runs_all_the_time() -> None:
    clock = Clocked()
    clock.sent(3, 1)
    clock.changed(1, {b"out": A})
    clock.ended(1)
    clock.sent(2)
    assert clock.changed(2, {b"out": B}) == []
    clock.ended(2)
    (found,) = clock.changed(3, {b"out": C})
    assert found.first.task == 2, "the latest change is the one that was overwritten"


def test_a_removal_conflicts_with_a_write() -> None:
    clock = Clocked()
    clock.sent(1, 2)
    clock.changed(1, {b"out": A})
    (found,) = clock.changed(2, {b"out": None})
    assert not found.same


def test_the_same_contents_are_said_to_be_the_same() -> None:
    clock = Clocked()
    clock.sent(1, 2)
    clock.changed(1, {b"out": A})
    (found,) = clock.changed(2, {b"out": A})
    assert found.same and "both left the same" in str(found)


def test_many_files_of_the_same_two_commands_are_one_conflict_that_names_a_different_one() -> None:
    clock = Clocked()
    clock.sent(1, 2)
    clock.changed(1, {b"f%d" % i: A for i in range(10)})
    (found,) = clock.changed(2, {b"f%d" % i: B if i == 5 else A for i in range(10)})
    assert (found.path, found.more, found.same) == (b"f5", 9, False)
    assert "and 9 more" in str(found)


def test_each_other_command_is_named() -> None:
    clock = Clocked()
    clock.sent(1, 2, 3)
    clock.changed(1, {b"a": A})
    clock.changed(2, {b"b": A})
    assert [c.first.task for c in clock.changed(3, {b"a": B, b"b": B})] == [1, 2]


def test_a_task_does_not_conflict_with_itself_when_it_is_sent_again() -> None:
    clock = Clocked()
    clock.sent(1, 2)
    clock.changed(2, {b"out": A})
    clock.ended(2)
    clock.sent(1)
    assert clock.changed(1, {b"out": B}) == []


def test_nothing_is_remembered_when_nothing_runs() -> None:
    clock = Clocked()
    clock.sent(1)
    clock.changed(1, {b"f%d" % i: A for i in range(100)})
    clock.ended(1)
    assert not clock.conflicts._changes


def test_the_history_is_bounded() -> None:
    clock = Clocked(max_changes=50)
    clock.sent(1, 2, 3)
    clock.changed(1, {b"f%d" % i: A for i in range(100)})
    assert len(clock.conflicts._changes) == 50
    for _ in range(RECENT):
        clock.changed(2, {b"f99": A})
        clock.changed(3, {b"f99": B})
    assert len(clock.conflicts.recent) == RECENT < clock.conflicts.found


event = st.tuples(st.sampled_from(["sent", "changed", "ended"]), st.integers(1, 4), st.sets(st.integers(0, 5)))


@given(st.lists(event, max_size=60))
def test_the_invariants_hold_whatever_happens(events: list[tuple[str, int, set[int]]]) -> None:
    clock = Clocked(max_changes=4)
    for kind, task, files in events:
        if kind == "sent":
            clock.sent(task)
        elif kind == "ended":
            clock.ended(task)
        else:
            for found in clock.changed(task, {b"%d" % f: bytes([task]) for f in files}):
                assert found.first.task != task == found.second.task
