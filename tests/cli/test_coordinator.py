"""termite-coordinator as a program."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from termite.cli.coordinator import main
from termite.cli.run import write_port_file
from termite.errors import UsageError
from termite.wire.auth import Purpose
from termite.wire.messages import Status, StatusText
from termite.wire.transport import dial


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_text("a secret for tests\n")
    return path


class Started:
    """A coordinator in a process of its own; `port` is set once it listens."""

    def __init__(self, args: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "termite.cli.coordinator", *args],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert "listening on" in line, line + self.process.communicate()[1]
        self.port = int(line.rpartition(":")[2])


@pytest.fixture
def started(secret: Path) -> Iterator[Started]:
    started = Started(["-secret", str(secret), "-port", "0", "-web-port", "off", "-listen", "127.0.0.1"])
    yield started
    started.process.send_signal(signal.SIGTERM)
    _, errors = started.process.communicate(timeout=20)
    assert started.process.returncode == 0
    assert "SIGTERM: stopping" in errors
    assert "Traceback" not in errors


def test_it_serves_whoever_holds_the_secret_until_it_is_told_to_stop(started: Started) -> None:
    async def ask() -> object:
        conn = await dial("127.0.0.1", started.port, b"a secret for tests", Purpose.MASTER_SUBSCRIBE)
        reply = await conn.call(Status(), timeout_s=10)
        await conn.close()
        return reply.message

    answer = asyncio.run(ask())
    assert isinstance(answer, StatusText)
    assert b'"workers":[]' in answer.json


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("termite-coordinator: ")
    assert err.count("\n") == 1
    return err


def test_a_taken_port_is_one_line_with_the_remedy(
    secret: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        args = ["-secret", str(secret), "-listen", "127.0.0.1", "-port", str(taken.getsockname()[1])]
        assert main([*args, "-logfile", str(tmp_path / "log")]) == 1
    assert "is taken" in one_line(capsys)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["-port", "99999"], "-port 99999: give a whole number from 0 to 65535"),
        (["-prot", "1"], "did you mean -port?"),
        (["-secret", "/nowhere/key"], "does not exist"),
        (["-time.silence", "0"], "give a time from 0.1s"),
        (["here"], "takes flags only"),
        (["-web-password", ""], "-web-password is empty"),
        (["-web-password", "x", "-web-port", "off"], "-web-password without pages"),
        (["-web-port", "none"], "-web-port none: give a whole number from 0 to 65535, or off"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    args: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    assert part in one_line(capsys)


def test_an_empty_or_readable_secret_is_refused(secret: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret.chmod(0o644)
    assert main(["-secret", str(secret)]) == 2
    assert "chmod 600" in one_line(capsys)
    secret.chmod(0o600)
    secret.write_text("\n")
    assert main(["-secret", str(secret)]) == 2
    assert "is empty" in one_line(capsys)


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for flag in ("-port PORT", "-listen ADDRESS", "-secret FILE", "-logfile FILE", "-port-file FILE"):
        assert flag in out


def test_the_port_file_appears_whole(tmp_path: Path) -> None:
    write_port_file(tmp_path / "port", "::", 1233)
    assert (tmp_path / "port").read_text() == "[::]:1233\n"
    assert os.listdir(tmp_path) == ["port"]
    with pytest.raises(UsageError, match="-port-file"):
        write_port_file(tmp_path / "missing" / "port", "h", 1)
