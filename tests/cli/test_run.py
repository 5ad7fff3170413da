"""What surrounds every program, tried in this process and, for signals and exits, in one of its own."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from termite.cli.flags import HelpWanted
from termite.cli.run import INTERNAL_ERROR, Job, Main, raise_descriptor_limit, run_program
from termite.errors import MountError, UsageError
from termite.logs import start_logging

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import asyncio, logging, sys
from termite.cli.run import Job, run_program

async def main(stop):
    print("ready", flush=True)
    await stop.wait()
    if sys.argv[1] == "stubborn":
        await asyncio.Event().wait()
    return 7

sys.exit(run_program("termite-example", lambda argv: Job(main, *argv[1:])))
"""


def run(main: Main, logfile: str = "") -> int:
    return run_program("termite-example", lambda argv: Job(main, logfile), [])


def test_the_status_is_what_the_program_returns() -> None:
    async def three(stop: asyncio.Event) -> int:
        return 3

    async def nothing(stop: asyncio.Event) -> None:
        return None

    assert run(three) == 3
    assert run(nothing) == 0


def test_an_error_is_one_line_with_the_programs_name_and_its_own_status(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail(stop: asyncio.Event) -> int:
        raise MountError("/dev/fuse is missing;\nload the module")

    assert run(fail) == MountError.exit_status
    assert capsys.readouterr().err == "termite-example: /dev/fuse is missing;\\nload the module\n"


def test_an_error_before_anything_started_is_told_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    def prepare(argv: object) -> Job:
        raise UsageError("unknown flag -x")

    assert run_program("termite-example", prepare, []) == 2
    assert capsys.readouterr() == ("", "termite-example: unknown flag -x\n")


def test_help_goes_to_stdout_and_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    def prepare(argv: object) -> Job:
        raise HelpWanted("usage")

    assert run_program("termite-example", prepare, []) == 0
    assert capsys.readouterr() == ("usage\n", "")


def test_a_mistake_of_ours_is_one_line_and_its_trace_is_in_the_log(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def blunder(stop: asyncio.Event) -> int:
        raise ZeroDivisionError("hidden")

    log = tmp_path / "log"
    assert run(blunder, str(log)) == INTERNAL_ERROR
    assert capsys.readouterr().err == "termite-example: internal error (ZeroDivisionError); the log says more\n"
    assert "ZeroDivisionError: hidden" in log.read_text()


def test_a_failure_is_in_the_log_file_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def fail(stop: asyncio.Event) -> int:
        raise MountError("no fuse")

    log = tmp_path / "log"
    run(fail, str(log))
    assert "no fuse" in log.read_text()
    assert "no fuse" in capsys.readouterr().err


def test_a_log_line_has_time_level_place_and_stays_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    start_logging(str(log))
    logging.getLogger("termite.master.pool").info("got %s", "a\nb")
    logging.getLogger("termite.master.pool").debug("unseen")
    (line,) = log.read_text().splitlines()
    assert line.endswith(" I master.pool: got a\\nb")
    assert line[:4].isdigit() and line[19] == "."


def test_debugging_shows_more_of_ours_and_nothing_of_others(tmp_path: Path) -> None:
    log = tmp_path / "log"
    start_logging(str(log), debug=True)
    logging.getLogger("termite.x").debug("ours")
    logging.getLogger("other").debug("theirs")
    assert [line.rpartition(" ")[2] for line in log.read_text().splitlines()] == ["ours"]


def test_a_log_file_that_was_moved_away_is_opened_anew(tmp_path: Path) -> None:
    log = tmp_path / "log"
    start_logging(str(log))
    logging.getLogger("termite.x").info("one")
    log.rename(tmp_path / "old")
    logging.getLogger("termite.x").info("two")
    assert "one" in (tmp_path / "old").read_text()
    assert "two" in log.read_text()


def test_a_log_file_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"-logfile .* name a file that can be written"):
        start_logging(str(tmp_path / "missing" / "log"))


def test_the_limit_of_open_files_is_raised_as_far_as_allowed() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_limit_that_is_too_low_to_raise_is_said_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    raise_descriptor_limit()
    (line,) = caplog.messages
    assert line == "at most 1024 open files; large builds need 4096: ulimit -Hn 4096"


class Child:
    """The little program above, running."""

    def __init__(self, manner: str, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, manner, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait_line(self, part: str) -> None:
        assert self.process.stderr is not None
        while part not in (line := self.process.stderr.readline()):
            assert line, "ended"

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    """Starts children, and leaves none behind."""
    children: list[Child] = []

    def start(manner: str = "good", *args: str) -> Child:
        child = Child(manner, *args)
        children.append(child)
        child.wait_ready()
        return child

    yield start
    for child in children:
        child.process.kill()
        child.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_the_program_to_stop_in_its_own_way(start: Callable[..., Child], number: signal.Signals) -> None:
    child = start()
    child.signal(number)
    status, errors = child.end()
    assert status == 7
    assert f"{number.name}: stopping" in errors


def test_a_second_signal_insists(start: Callable[..., Child]) -> None:
    child = start("stubborn")
    child.signal(signal.SIGTERM)
    child.wait_line("SIGTERM: stopping")
    child.signal(signal.SIGTERM)
    status, errors = child.end()
    assert status == 130
    assert "SIGTERM again: ending at once" in errors


def test_with_a_log_file_a_hangup_stops_nothing(start: Callable[..., Child], tmp_path: Path) -> None:
    child = start("good", str(tmp_path / "log"))
    child.signal(signal.SIGHUP)
    child.signal(signal.SIGTERM)
    assert child.end()[0] == 7
    assert "SIGHUP" in (tmp_path / "log").read_text()
