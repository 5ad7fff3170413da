from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable

import pytest

from termite.worker.stdin import waits_for

LIMIT_S = 10.0


def eventually(condition: Callable[[], bool]) -> bool:
    """True as soon as the condition holds; False if it does not within the limit."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        if condition():
            return True
        os.sched_yield()
    return False


def asleep(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "S"


@pytest.mark.parametrize("command", [["cat"], ["sh", "-c", "read x"], ["sh", "-c", "true; cat; true"], ["tail", "-n1"]])
def test_a_command_that_reads_its_stdin_is_found_waiting(command: list[str]) -> None:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin is not None
    pipe = os.fstat(process.stdin.fileno())
    assert eventually(lambda: waits_for(process.pid, pipe))
    assert waits_for(os.getpid(), pipe)
    process.stdin.close()
    process.wait()
    assert not waits_for(process.pid, pipe)


def test_a_command_that_only_holds_its_stdin_is_not() -> None:
    process = subprocess.Popen(["sleep", "100"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    pipe = os.fstat(process.stdin.fileno())
    try:
        assert eventually(lambda: asleep(process.pid))
        assert not waits_for(process.pid, pipe)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def test_another_pipe_is_not_mistaken_for_it() -> None:
    read, write = os.pipe()
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin is not None
    try:
        assert eventually(lambda: waits_for(process.pid, os.fstat(process.stdin.fileno())))
        assert not waits_for(process.pid, os.fstat(read))
    finally:
        process.stdin.close()
        process.wait()
        os.close(read)
        os.close(write)
