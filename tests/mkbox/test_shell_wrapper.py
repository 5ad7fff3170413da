"""termite-shell-wrapper against a master that answers as each test wants."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mkbox.native import (
    DEBUG,
    INSPECT,
    LOCAL,
    MERGED,
    RECURSE,
    REFRESH,
    RUN,
    SHUTDOWN,
    STDIN,
    Caller,
    FakeMaster,
    Request,
)

Start = Callable[..., FakeMaster]
Wrapper = Callable[..., subprocess.CompletedProcess[bytes]]


def succeed(_: Request, caller: Caller) -> None:
    caller.exit(0)


def stay_local(_: Request, caller: Caller) -> None:
    caller.local()


def stay_local_and_recurse(_: Request, caller: Caller) -> None:
    caller.local(RECURSE)


@pytest.fixture
def wrapper(native: Path, project: Path) -> Wrapper:
    def run(*args: str | bytes, **how: Any) -> subprocess.CompletedProcess[bytes]:
        how = dict[str, Any](cwd=project, capture_output=True, check=False, timeout=60) | how
        if "stdout" in how or "stderr" in how:
            del how["capture_output"]
        how.setdefault("stdin", subprocess.DEVNULL if "input" not in how else None)
        if how["stdin"] is None:
            del how["stdin"]
        how["env"] = dict(os.environ) | how.pop("env", {})
        return subprocess.run([native / "termite-shell-wrapper", *args], **how)

    return run


# -- what the master is told -------------------------------------------------------------------------


def test_a_command_line_travels_whole(wrapper: Wrapper, master: Start, project: Path) -> None:
    one = master(succeed)
    wrapper("-c", "echo 'a  b' \xe4; x=$y", env={"MAKE_TARGET": "a.o", "EMPTY": ""}, umask=0o027)
    (request,) = one.requests
    assert (request.kind, request.flags, request.umask) == (RUN, 0, 0o027)
    assert request.cwd == os.fsencode(project)
    assert request.program == b"/bin/sh"
    assert request.argv == [b"/bin/sh", b"-c", "echo 'a  b' \xe4; x=$y".encode()]
    assert request.env[b"MAKE_TARGET"] == b"a.o"
    assert request.env[b"EMPTY"] == b""
    assert set(request.env) == set(os.environb) | {b"MAKE_TARGET", b"EMPTY"}


def test_bytes_that_are_not_utf8_travel_as_they_are(wrapper: Wrapper, master: Start, project: Path) -> None:
    one = master(succeed)
    odd = os.fsencode(project) + b"/\xff a:b\n"
    os.mkdir(odd)
    wrapper("-exec", b"\xfe", b"", b"\xff\n", cwd=odd)
    assert (one.requests[0].cwd, one.requests[0].argv) == (odd, [b"\xfe", b"", b"\xff\n"])


@pytest.mark.parametrize(
    ("flags", "shell"),
    [
        (["-c"], "/bin/sh"),
        (["-ec"], "/bin/sh"),
        (["-e", "-c"], "/bin/sh"),
        (["-exuc"], "/bin/sh"),
        (["+e", "-c"], "/bin/sh"),
        (["-e", "-o", "nounset", "-c"], "/bin/sh"),
        (["-o", "pipefail", "-c"], "/bin/bash"),
        (["-eu", "-o", "pipefail", "-c"], "/bin/bash"),
        (["-euo", "pipefail", "-c"], "/bin/bash"),
        (["-Eeuo", "pipefail", "-c"], "/bin/bash"),
        (["-euo", "pipefail", "-O", "globstar", "-c"], "/bin/bash"),
        (["--norc", "--noprofile", "-c"], "/bin/bash"),
        (["--rcfile", "x", "-c"], "/bin/bash"),
        (["-c", "--"], "/bin/sh"),
    ],
)
def test_the_flags_of_a_shell_reach_one_that_knows_them(
    wrapper: Wrapper, master: Start, flags: list[str], shell: str
) -> None:
    one = master(succeed)
    result = wrapper(*flags, "true", "arg0", "-arg1")
    assert (result.returncode, result.stderr) == (0, b"")
    assert one.requests[0].program.decode() == shell
    assert [arg.decode() for arg in one.requests[0].argv] == [shell, *flags, "true", "arg0", "-arg1"]


def test_a_script_runs_as_a_shell_would_run_it(wrapper: Wrapper, master: Start) -> None:
    one = master(succeed)
    wrapper("./libtool", "--mode=compile", "gcc")
    assert one.commands == [[b"/bin/sh", b"./libtool", b"--mode=compile", b"gcc"]]


def test_termite_shell_names_the_shell(wrapper: Wrapper, master: Start) -> None:
    one = master(succeed)
    wrapper("-c", "true", env={"TERMITE_SHELL": "/bin/zsh"})
    assert (one.requests[0].program, one.requests[0].argv[0]) == (b"/bin/zsh", b"/bin/zsh")


@pytest.mark.parametrize("dashes", ["-", "--"])
def test_exec_takes_a_program_and_its_arguments(wrapper: Wrapper, master: Start, dashes: str) -> None:
    one = master(succeed)
    wrapper(dashes + "exec", "gcc", "-c", "x.c")
    wrapper(dashes + "exec", "./gcc", "--", "x")
    assert [(r.program, r.argv) for r in one.requests] == [
        (b"", [b"gcc", b"-c", b"x.c"]),
        (b"./gcc", [b"./gcc", b"--", b"x"]),
    ]


def test_behind_two_dashes_exec_takes_path_and_argv0_apart(wrapper: Wrapper, master: Start) -> None:
    one = master(succeed)
    wrapper("-exec", "--", "/bin/busybox", "sh", "-c", "true")
    wrapper("-exec", "--", "gcc", "gcc")
    assert [(r.program, r.argv) for r in one.requests] == [
        (b"/bin/busybox", [b"sh", b"-c", b"true"]),
        (b"", [b"gcc"]),
    ]


def test_flags_before_the_command(wrapper: Wrapper, master: Start, project: Path) -> None:
    one = master(succeed)
    (project / "sub").mkdir()
    wrapper("-dbg", "--dir=sub", "-worker", "w1:1232", "-ec", "true")
    wrapper("-c", "true", env={"TERMITE_DEBUG": "1"})
    first, second = one.requests
    assert (first.flags, first.worker, first.cwd) == (DEBUG, b"w1:1232", os.fsencode(project / "sub"))
    assert first.argv == [b"/bin/sh", b"-ec", b"true"]
    assert (second.flags, second.worker) == (DEBUG, b"")


def test_the_master_itself_can_be_asked(wrapper: Wrapper, master: Start) -> None:
    def answer(request: Request, caller: Caller) -> None:
        caller.frame(b"O", b"seen\n")
        caller.exit(0)

    one = master(answer)
    results = [wrapper("-refresh"), wrapper("--shutdown"), wrapper("-inspect", "a", "b")]
    assert [(r.returncode, r.stdout) for r in results] == [(0, b"seen\n")] * 3
    assert [(r.kind, r.argv) for r in one.requests] == [(REFRESH, []), (SHUTDOWN, []), (INSPECT, [b"a", b"b"])]


def test_a_master_that_is_gone_before_it_answers_has_shut_down(wrapper: Wrapper, master: Start) -> None:
    master(lambda request, caller: None)
    assert wrapper("-shutdown").returncode == 0


@pytest.mark.parametrize(
    "args",
    [["-frobnicate"], ["-c"], ["-o"], ["-exec"], ["-exec", "--"], ["-exec", "--", "x"], ["-dir"], []],
)
def test_a_wrong_command_line_is_one_line_and_status_2(wrapper: Wrapper, args: list[str]) -> None:
    result = wrapper(*args)
    assert result.returncode == 2
    assert result.stderr.startswith(b"termite-shell-wrapper: ")
    assert result.stderr.count(b"\n") == 1


def test_help_needs_no_master(wrapper: Wrapper) -> None:
    result = wrapper("--help")
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"-exec PROGRAM" in result.stdout


# -- standard files ----------------------------------------------------------------------------------


def test_stdout_and_stderr_in_one_pipe_are_merged(wrapper: Wrapper, master: Start, tmp_path: Path) -> None:
    one = master(succeed)
    wrapper("-c", "true", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with (tmp_path / "log").open("wb") as log, (tmp_path / "log").open("wb") as again:
        wrapper("-c", "true", stdout=log, stderr=subprocess.STDOUT)
        wrapper("-c", "true", stdout=log, stderr=again)
    assert [r.flags & MERGED for r in one.requests] == [MERGED, MERGED, 0]


def test_a_terminal_is_merged_and_no_stdin(wrapper: Wrapper, master: Start) -> None:
    one = master(succeed)
    leader, follower = pty.openpty()
    wrapper("-c", "true", stdin=follower, stdout=follower, stderr=follower)
    os.close(leader)
    os.close(follower)
    assert one.requests[0].flags == MERGED


def test_stdin_counts_only_if_it_can_have_data(wrapper: Wrapper, master: Start, tmp_path: Path) -> None:
    one = master(succeed)
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.write_bytes(b"x")
    empty.touch()
    at_end_r, at_end_w = os.pipe()
    os.close(at_end_w)
    open_r, open_w = os.pipe()
    for stdin in (full.open("rb"), empty.open("rb"), os.fdopen(at_end_r, "rb"), os.fdopen(open_r, "rb")):
        with stdin:
            wrapper("-c", "true", stdin=stdin)
    os.close(open_w)
    wrapper("-c", "true", preexec_fn=lambda: os.close(0))
    assert [r.flags & STDIN for r in one.requests] == [STDIN, 0, 0, STDIN, 0]


def close_stdin_and_stderr() -> None:
    os.close(0)
    os.close(2)


def test_closed_standard_files_stay_closed(wrapper: Wrapper, master: Start) -> None:
    one = master(stay_local)
    script = "import os; print([os.path.exists(f'/proc/self/fd/{n}') for n in (0, 2)])"
    result = wrapper("-exec", sys.executable, "-c", script, preexec_fn=close_stdin_and_stderr)
    assert result.stdout == b"[False, False]\n"
    assert one.requests[0].flags == 0


def test_stdin_is_sent_piece_by_piece_when_wanted(wrapper: Wrapper, master: Start) -> None:
    got: list[bytes] = []

    def answer(_: Request, caller: Caller) -> None:
        while piece := caller.want_stdin():
            got.append(piece)
        assert caller.want_stdin() == b"", "the end stays the end"
        caller.exit(0)

    master(answer)
    data = os.urandom(300_000)
    assert wrapper("-c", "cat >x", input=data).returncode == 0
    assert b"".join(got) == data


def test_a_command_may_end_without_the_stdin_it_asked_for(wrapper: Wrapper, master: Start) -> None:
    def answer(_: Request, caller: Caller) -> None:
        caller.frame(b"W")
        caller.frame(b"O", b"out")
        caller.exit(3 << 8)

    master(answer)
    reader, writer = os.pipe()
    result = wrapper("-c", "x", stdin=reader)
    os.close(reader)
    os.close(writer)
    assert (result.returncode, result.stdout) == (3, b"out")


def test_output_arrives_byte_for_byte(wrapper: Wrapper, master: Start) -> None:
    out, err = os.urandom(3_000_000), os.urandom(70_001)

    def answer(_: Request, caller: Caller) -> None:
        caller.frame(b"O")
        for at in range(0, len(out), 250_000):
            caller.frame(b"O", out[at : at + 250_000])
            caller.frame(b"E", err[at // 30 : (at + 250_000) // 30])
        caller.frame(b"E", err[len(out) // 30 :])
        caller.exit(0)

    master(answer)
    result = wrapper("-c", "x")
    assert result.stdout == out
    assert result.stderr == err


def test_frames_may_arrive_in_any_pieces(wrapper: Wrapper, master: Start) -> None:
    def answer(_: Request, caller: Caller) -> None:
        caller.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        for byte in b"O\3\0\0\0a\0bM\2\0\0\0hiX\4\0\0\0\0\7\0\0":
            caller.sock.sendall(bytes([byte]))

    master(answer)
    result = wrapper("-c", "x")
    assert (result.returncode, result.stdout, result.stderr) == (7, b"a\0b", b"termite: hi\n")


def test_a_nonblocking_stdout_loses_nothing(wrapper: Wrapper, master: Start, native: Path, project: Path) -> None:
    data = os.urandom(1_000_000)

    def answer(_: Request, caller: Caller) -> None:
        caller.frame(b"O", data)
        caller.exit(0)

    master(answer)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen([native / "termite-shell-wrapper", "-c", "x"], cwd=project, stdout=writer) as process:
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert pipe.read() == data
        assert process.wait(60) == 0


def flood(_: Request, caller: Caller) -> None:
    try:
        while True:
            caller.frame(b"O", bytes(100_000))
    except ConnectionError:
        pass


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_a_reader_that_is_gone_ends_it_by_sigpipe(wrapper: Wrapper, master: Start, closed_pipe: int) -> None:
    master(flood)
    result = wrapper("-c", "yes", stdout=closed_pipe, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (-signal.SIGPIPE, b"")


def test_with_sigpipe_ignored_it_fails_as_other_programs_do(wrapper: Wrapper, master: Start, closed_pipe: int) -> None:
    master(flood)
    result = wrapper("-c", "yes", stdout=closed_pipe, stderr=subprocess.PIPE, restore_signals=False)
    assert result.returncode == 1
    assert result.stderr == b"termite: stdout: write error: Broken pipe\n"


def test_a_full_disk_under_stdout_is_an_error(wrapper: Wrapper, master: Start) -> None:
    master(flood)
    with open("/dev/full", "wb") as full:
        result = wrapper("-c", "yes", stdout=full, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (1, b"termite: stdout: write error: No space left on device\n")


# -- how it ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 2, 126, 127, 255])
def test_the_exit_status_is_the_commands(wrapper: Wrapper, master: Start, code: int) -> None:
    master(lambda request, caller: caller.exit(code << 8))
    assert wrapper("-c", "x").returncode == code


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE])
def test_it_dies_of_the_commands_signal_without_a_core(
    wrapper: Wrapper, master: Start, project: Path, number: signal.Signals
) -> None:
    master(lambda request, caller: caller.exit(number | 0x80))
    result = wrapper("-c", "x", preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [number]))
    assert result.returncode == -number
    assert [p.name for p in project.iterdir()] == [".termite-socket"]


def test_an_interrupt_ends_it_at_once_and_the_master_sees_it(native: Path, master: Start, project: Path) -> None:
    asked, hung_up = threading.Event(), threading.Event()

    def answer(_: Request, caller: Caller) -> None:
        asked.set()
        caller.wait_for_hangup()
        hung_up.set()

    master(answer)
    with subprocess.Popen([native / "termite-shell-wrapper", "-c", "sleep 99"], cwd=project) as process:
        assert asked.wait(60)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT
    assert hung_up.wait(60)


def test_a_master_that_goes_away_is_named_with_the_command(wrapper: Wrapper, master: Start) -> None:
    one = master(lambda request, caller: caller.frame(b"O", b"half"))
    result = wrapper("-exec", "gcc", "-c", "x" * 1000)
    assert (result.returncode, result.stdout) == (1, b"half")
    assert result.stderr.startswith(f"termite: the master ({one.path}) went away while running: gcc -c xxx".encode())
    assert result.stderr.endswith(b"...; start termite-master again\n")


@pytest.mark.parametrize("bytes_", [b"?\0\0\0\0", b"X\1\0\0\0\0", b"L\0\0\0\0", b"W\1\0\0\0\0", b"M\0\0\0\x7f"])
def test_garbage_is_an_error(wrapper: Wrapper, master: Start, bytes_: bytes) -> None:
    master(lambda request, caller: caller.sock.sendall(bytes_))
    result = wrapper("-c", "x")
    assert result.returncode == 1
    assert b"another protocol" in result.stderr


def test_a_refusal_is_seen_even_if_the_request_was_not_read(native: Path, project: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(project / ".termite-socket"))
        listener.listen()
        argv: list[str | Path] = [native / "termite-shell-wrapper", "-exec", "x", *["y" * 100_000] * 10]
        with subprocess.Popen(argv, cwd=project, stderr=subprocess.PIPE) as process:
            sock, _ = listener.accept()
            sock.sendall(b"M\2\0\0\0noX\4\0\0\0\0\5\0\0")
            sock.shutdown(socket.SHUT_RD)
            _, err = process.communicate(timeout=60)
            sock.close()
    assert (process.returncode, err) == (5, b"termite: no\n")


# -- finding the master ------------------------------------------------------------------------------


def test_the_nearest_socket_above_is_used(wrapper: Wrapper, master: Start, project: Path) -> None:
    inner = project / "a" / "b"
    (inner / "c").mkdir(parents=True)
    far, near = master(succeed), master(succeed, inner)
    wrapper("-c", "true", cwd=inner / "c")
    wrapper("-c", "true", cwd=project / "a")
    assert (len(far.requests), len(near.requests)) == (1, 1)


def test_termite_socket_names_it(wrapper: Wrapper, master: Start, tmp_path: Path) -> None:
    one = master(succeed)
    assert wrapper("-c", "true", cwd="/", env={"TERMITE_SOCKET": one.path}).returncode == 0
    assert wrapper("-c", "true", cwd=tmp_path, env={"TERMITE_SOCKET": "project/.termite-socket"}).returncode == 0


def test_a_path_longer_than_a_socket_address_works(wrapper: Wrapper, master: Start, project: Path) -> None:
    deep = project / ("x" * 200) / ("y" * 200)
    deep.mkdir(parents=True)
    one = master(succeed, deep)
    assert wrapper("-c", "true", cwd=deep).returncode == 0
    assert wrapper("-c", "true", cwd="/", env={"TERMITE_SOCKET": one.path}).returncode == 0
    assert one.requests[0].cwd == os.fsencode(deep)


def test_without_a_master_it_says_how_to_get_one(wrapper: Wrapper, project: Path) -> None:
    result = wrapper("-c", "true")
    assert result.returncode == 1
    expected = (
        f"termite: no master: no .termite-socket in {project} or above it; "
        "start termite-master in the project root, or use termite-make\n"
    )
    assert result.stderr == expected.encode()


def test_a_stale_socket_is_named(wrapper: Wrapper, project: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(project / ".termite-socket"))
    result = wrapper("-c", "true")
    assert result.returncode == 1
    assert result.stderr.startswith(f"termite: no master at {project}/.termite-socket: nobody listens".encode())


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second user")
def test_a_socket_that_somebody_else_laid_there_is_not_trusted(wrapper: Wrapper, master: Start, project: Path) -> None:
    one = master(succeed)
    os.chown(one.path, 12345, 12345)
    result = wrapper("-c", "true")
    assert result.returncode == 1
    assert b"belongs to another user" in result.stderr
    assert one.requests == []
    assert wrapper("-c", "true", env={"TERMITE_SOCKET": one.path}).returncode == 0


# -- running in place --------------------------------------------------------------------------------

OURS = {
    "TERMITE_WRAPPER": "/x/termite-shell-wrapper",
    "LD_PRELOAD": "/odd/libtermite-interpose.so:/lib/x86_64-linux-gnu/libc.so.6",
}
SHOW = 'echo "$TERMITE_LOCAL|$TERMITE_WRAPPER|$LD_PRELOAD"; exit 9'


def test_locally_nothing_of_ours_is_inherited(wrapper: Wrapper, master: Start) -> None:
    master(stay_local)
    result = wrapper("-c", SHOW, env=OURS)
    assert (result.returncode, result.stdout) == (9, b"1||/lib/x86_64-linux-gnu/libc.so.6\n")
    result = wrapper("-c", "echo ${LD_PRELOAD-unset}", env={"LD_PRELOAD": "/odd/libtermite-interpose.so"})
    assert result.stdout == b"unset\n"


def test_with_recursion_what_is_below_is_caught_again(wrapper: Wrapper, master: Start, native: Path) -> None:
    master(stay_local_and_recurse)
    ours = {"TERMITE_WRAPPER": "w", "LD_PRELOAD": os.fspath(native / "libtermite-interpose.so")}
    assert wrapper("-c", SHOW, env=ours).stdout == f"|w|{ours['LD_PRELOAD']}\n".encode()


def test_under_a_local_command_no_master_is_asked(wrapper: Wrapper, master: Start) -> None:
    one = master(succeed)
    result = wrapper("-eu", "-o", "pipefail", "-c", "false | true", env={"TERMITE_LOCAL": "1"})
    assert (result.returncode, one.requests) == (1, [])


def test_local_tells_the_master_first(wrapper: Wrapper, master: Start) -> None:
    one = master(stay_local)
    result = wrapper("-local", "--", "/bin/sh", "sh", "-c", "echo here; exit 4", env=OURS)
    assert (result.returncode, result.stdout) == (4, b"here\n")
    assert [(r.kind, r.program, r.argv[0]) for r in one.requests] == [(LOCAL, b"/bin/sh", b"sh")]


def test_local_runs_without_a_master_too(wrapper: Wrapper, master: Start) -> None:
    assert wrapper("-local", "--", "/bin/echo", "echo", "x").stdout == b"x\n"
    master(lambda request, caller: None)
    assert wrapper("-local", "--", "/bin/echo", "echo", "x").stdout == b"x\n"


def test_descriptors_reach_a_local_command_and_ours_do_not(wrapper: Wrapper, master: Start) -> None:
    master(stay_local)
    reader, writer = os.pipe()
    script = f"echo token >&{writer}; ls /proc/self/fd | wc -l"
    how: dict[str, Any] = {"pass_fds": [writer], "capture_output": True, "check": True, "timeout": 60}
    plain = subprocess.run(["bash", "-c", script], **how)
    result = wrapper("-exec", "bash", "-c", script, pass_fds=[writer])
    os.close(writer)
    assert result.stdout == plain.stdout
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"token\ntoken\n"


def test_a_missing_program_is_127_and_an_unusable_one_126(wrapper: Wrapper, master: Start, project: Path) -> None:
    master(stay_local)
    (project / "data").write_text("x")
    missing, unusable = wrapper("-exec", "no-such-program"), wrapper("-exec", "./data")
    assert (missing.returncode, missing.stderr) == (127, b"termite: no-such-program: No such file or directory\n")
    assert (unusable.returncode, unusable.stderr) == (126, b"termite: ./data: Permission denied\n")


def test_a_script_without_interpreter_line_runs_in_a_shell(wrapper: Wrapper, master: Start, project: Path) -> None:
    master(stay_local)
    script = project / "script"
    script.write_text('echo "$0" "$@"\n')
    script.chmod(0o755)
    assert wrapper("-exec", "./script", "a", "b c").stdout == b"./script a b c\n"
    env = {"PATH": f"/nowhere:{project}:{os.environ['PATH']}"}
    assert wrapper("-exec", "script", "x", env=env).stdout == f"{script} x\n".encode()
