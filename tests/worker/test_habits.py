"""Directories that are made for a command before it runs."""

from __future__ import annotations

import stat

from termite.attr.fileattr import ABSENT, FileAttr
from termite.worker.habits import DIRECTORIES, PLACES, Habits

A_DIRECTORY = FileAttr(stat.S_IFDIR | 0o755)


def everything(path: bytes) -> FileAttr:
    return A_DIRECTORY


def made(habits: Habits, cwd: bytes) -> list[bytes]:
    return [path for path, _ in habits.expected(cwd, everything)]


def test_what_the_last_commands_changed_is_made_parents_first() -> None:
    habits = Habits()
    habits.note(b"p", [b"lib/deps", b""])
    habits.note(b"p", [b"src"])
    assert made(habits, b"p") == [b"lib", b"lib/deps", b"src"]
    assert made(habits, b"elsewhere") == []


def test_what_was_changed_long_ago_is_forgotten() -> None:
    habits = Habits()
    for number in range(DIRECTORIES + 1):
        habits.note(b"p", [b"d%d" % number])
    assert made(habits, b"p") == [b"d%d" % number for number in range(1, DIRECTORIES + 1)]
    for number in range(PLACES):
        habits.note(b"q%d" % number, [b"d"])
    assert made(habits, b"p") == []


def test_what_is_no_directory_any_more_or_not_known_is_not_made() -> None:
    habits = Habits()
    habits.note(b"p", [b"gone/x", b"unknown/y", b"a/b"])
    answers = {b"gone": ABSENT, b"gone/x": ABSENT, b"unknown/y": A_DIRECTORY, b"a": A_DIRECTORY, b"a/b": A_DIRECTORY}
    assert [path for path, _ in habits.expected(b"p", answers.get)] == [b"a", b"a/b"]
