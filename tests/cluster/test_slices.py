"""Who is woken soon while others compute: all that a command waits for, never the command."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from termite import loop
from tests.cluster.farm import Farm, wait_for


def slice_ns(pid: int) -> int:
    """0 before Linux 6.12."""
    attr = ctypes.create_string_buffer(loop._SCHED_ATTR.size)
    number = loop._SCHED_SETATTR[os.uname().machine] + 1  # sched_getattr
    assert ctypes.CDLL(None).syscall(number, pid, attr, len(attr), 0) == 0
    runtime: int = loop._SCHED_ATTR.unpack(attr.raw)[5]
    return runtime


def ask_for_slice(ns: int) -> None:
    """For this process; 0: the usual one."""
    attr = loop._SCHED_ATTR.pack(loop._SCHED_ATTR.size, os.SCHED_OTHER, 0, os.nice(0), 0, ns, 0, 0)
    assert ctypes.CDLL(None).syscall(loop._SCHED_SETATTR[os.uname().machine], 0, attr, 0) == 0


@pytest.fixture
def usual_ns() -> int:
    """As whatever a user starts has it, and from here on this process as well: tests may have run a program in it."""
    if os.uname().machine not in loop._SCHED_SETATTR or not slice_ns(0):
        pytest.skip("this kernel knows no slices")
    ask_for_slice(0)
    found = slice_ns(0)
    assert found != loop.SLICE_NS
    return found


@contextmanager
def sleeping(cluster: Farm, project: Path, *how: str) -> Iterator[tuple[int, int]]:
    """(pid of the wrapper, pid of the command, seen from here)."""
    seconds = f"6{os.getpid()}"
    wrapper = subprocess.Popen(["termite-shell-wrapper", *how, "sleep", seconds], cwd=project, env=cluster.env)
    try:
        found: list[int] = []

        def is_there() -> bool:
            pgrep = subprocess.run(["pgrep", "-f", f"^sleep {seconds}"], stdout=subprocess.PIPE, check=False)
            found[:] = map(int, pgrep.stdout.split())
            return bool(found)

        wait_for("the command", is_there)
        yield wrapper.pid, found[0]
    finally:
        wrapper.terminate()
        wrapper.wait(10)


def test_daemons_and_wrapper_are_woken_soon_and_the_command_is_like_any_other(
    cluster: Farm, project: Path, usual_ns: int
) -> None:
    with sleeping(cluster, project, "-exec") as (wrapper, command):
        assert command != wrapper
        assert slice_ns(command) == usual_ns
        assert slice_ns(wrapper) == loop.SLICE_NS
        for program in cluster.programs:
            if program.process.poll() is None:
                assert slice_ns(program.process.pid) == loop.SLICE_NS, program.name
        children = subprocess.run(["pgrep", "-f", "termite.worker.mirror"], stdout=subprocess.PIPE, check=True)
        mirrors = [int(pid) for pid in children.stdout.split()]
        assert any(slice_ns(pid) == loop.SLICE_NS for pid in mirrors)


def test_a_command_that_the_wrapper_becomes_is_like_any_other(cluster: Farm, project: Path, usual_ns: int) -> None:
    with sleeping(cluster, project, "-local", "--", "/bin/sleep") as (wrapper, command):
        assert command == wrapper
        assert slice_ns(command) == usual_ns


def test_a_command_that_the_wrapper_becomes_has_the_slice_that_its_user_asked_for(
    cluster: Farm, project: Path, usual_ns: int
) -> None:
    wanted = 2 * usual_ns
    ask_for_slice(wanted)
    try:
        with sleeping(cluster, project, "-local", "--", "/bin/sleep") as (_, command):
            assert slice_ns(command) == wanted
    finally:
        ask_for_slice(0)


def test_a_c_library_without_schedulers_does_not_keep_a_daemon_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def unknown(pid: int) -> int:
        asked.append(pid)
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "sched_getscheduler", unknown)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    loop.be_woken_soon()
    assert asked == [0]
