"""mkbox --direct: what a shell would have done is done without one, and what cannot be so done, it does."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.mkbox.boxing import PROJECT, Argument, Boxes, Finished

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="making a box needs root"),
    pytest.mark.timeout(120),
]

HERE = PROJECT.decode()
PARENT = "read name </proc/$PPID/comm; echo $name"


def direct(
    boxes: Boxes, words: list[str], script: str, *options: Argument, move: tuple[str, str] | None = None
) -> Finished:
    moves = ["--from", move[0], "--move", move[1]] if move else []
    all_options = [*options, *moves, "--direct", str(len(words))]
    return boxes.run(*words, "--", "sh", "-c", script, options=all_options)


def upper(boxes: Boxes) -> dict[str, str]:
    return {p.relative_to(boxes.upper).as_posix(): p.read_text() for p in boxes.upper.rglob("*") if p.is_file()}


# -- without a shell -----------------------------------------------------------------------------------


def test_the_words_are_run_and_no_shell_is(boxes: Boxes) -> None:
    done = direct(boxes, ["sh", "-c", f"{PARENT}; echo \"$@\"", "x", "a b", ""], "echo the shell")
    assert (done.status, done.stdout, done.stderr, done.error) == (0, b"mkbox\na b \n", b"", b"")


def test_what_is_to_be_said_comes_first(boxes: Boxes) -> None:
    done = direct(boxes, ["echo", "ran"], "echo the shell", "--say", "  CC  a\xff.o\n".encode("latin-1"))
    assert (done.status, done.stdout) == (0, b"  CC  a\xff.o\nran\n")
    done = direct(boxes, ["no-such-program"], "echo the shell", "--say", "said\n")
    assert (done.status, done.stdout, done.stderr) == (0, b"said\nthe shell\n", b"")
    done = direct(boxes, ["true"], "true", "--say", "said\n", move=("nowhere", "b"))
    assert done.status == 1 << 8 and done.stdout == b"said\n" and done.stderr.startswith(b"mv: ")


def test_a_file_is_renamed_when_the_words_succeed(boxes: Boxes) -> None:
    done = direct(boxes, ["sh", "-c", "echo 1 > a; echo 2 > b"], "false", move=("a", "b"))
    assert (done.status, done.stderr, upper(boxes)) == (0, b"", {"b": "1\n"})


def test_a_file_that_was_there_before_is_replaced_as_mv_does_it(boxes: Boxes) -> None:
    done = direct(boxes, ["sh", "-c", "echo new > src/t"], "false", move=("src/t", "src/a.c"))
    assert (done.status, upper(boxes)) == (0, {"src/a.c": "new\n"})
    done = direct(boxes, ["true"], "false", move=("file", "src/a.c"))
    assert (done.status, upper(boxes)) == (0, {"src/a.c": "contents of/file"})
    assert not os.path.lexists(boxes.upper / "file") or (boxes.upper / "file").is_char_device()


@pytest.mark.parametrize("code", [1, 2, 77, 255])
def test_nothing_is_renamed_when_they_fail(boxes: Boxes, code: int) -> None:
    done = direct(boxes, ["sh", "-c", f"echo 1 > a; exit {code}"], "true", move=("a", "b"))
    assert (done.status, done.stderr, upper(boxes)) == (code << 8, b"", {"a": "1\n"})


def test_the_directory_is_entered_first(boxes: Boxes) -> None:
    done = direct(boxes, ["sh", "-c", "pwd; echo 1 > a"], "false", "--enter", f"{HERE}/src", move=("a", "b"))
    assert (done.status, done.stdout, upper(boxes)) == (0, f"{HERE}/src\n".encode(), {"src/b": "1\n"})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE])
def test_death_by_a_signal_looks_as_it_does_through_a_shell(boxes: Boxes, number: signal.Signals) -> None:
    suicide = f"kill -{number.value} $$"
    done = direct(boxes, ["sh", "-c", suicide], "true", "--rlimit", "core=0", move=("file", "b"))
    shell = boxes.sh(f"sh -c '{suicide}' && mv -f file b", options=["--rlimit", "core=0"])
    assert done.status == (128 + number.value) << 8
    assert upper(boxes) == {}
    if number != signal.SIGINT:  # which ends shells as well
        assert done.status == shell.status
    told = number not in (signal.SIGINT, signal.SIGPIPE)
    assert done.stderr.count(b"\n") == told


# -- where a shell, or mv, is needed after all ---------------------------------------------------------


@pytest.mark.parametrize("program", ["no-such-program", "./no-such-program", "./file", "./src", f"{HERE}/script"])
def test_a_program_that_cannot_be_executed_is_told_by_the_shell(boxes: Boxes, program: str) -> None:
    script = Path(os.fsdecode(boxes.outside(PROJECT))) / "script"
    script.write_text("echo ran as a script\n")
    script.chmod(0o755)
    command = f"{program} && mv -f file b"
    done = direct(boxes, [program], command, move=("file", "b"))
    shell = boxes.sh(command)
    assert (done.status, done.stdout, done.stderr) == (shell.status, shell.stdout, shell.stderr)
    assert done.stdout or done.stderr


def test_a_directory_that_cannot_be_entered_is_told_by_the_shell(boxes: Boxes) -> None:
    command = "cd /nowhere && true && mv -f file b"
    done = direct(boxes, ["true"], command, "--enter", "/nowhere", move=("file", "b"))
    assert (done.status, done.stderr) == ((shell := boxes.sh(command)).status, shell.stderr)
    assert b"/nowhere" in done.stderr and upper(boxes) == {}


@pytest.mark.parametrize(
    ("make", "moved", "to"),
    [
        ("echo 1 > a; mkdir d", "a", "d"),
        ("echo 1 > a; mkdir d", "a", "d/"),
        ("echo 1 > a", "a", "nowhere/b"),
        ("echo 1 > a", "a", "b/"),
        ("echo 1 > a; ln -s src d", "a", "d"),
        ("echo 1 > a; ln -s nowhere d", "a", "d"),
        ("echo 1 > a; ln a b", "a", "b"),
        ("echo 1 > a", "a", "a"),
        ("mkdir a", "a", "b"),
        ("mkdir a b", "a", "b"),
        ("ln -s src a", "a", "b"),
        ("true", "nowhere", "b"),
        ("true", "file/x", "b"),
    ],
)
def test_whatever_else_mv_may_be_asked_for_it_does(boxes: Boxes, make: str, moved: str, to: str) -> None:
    def left() -> dict[str, str]:
        found = {}
        for path in sorted(boxes.upper.rglob("*")):
            what = os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else "directory"
            found[path.relative_to(boxes.upper).as_posix()] = what
        return found

    done = direct(boxes, ["sh", "-c", make], "exit 9", move=(moved, to))
    ours = left()
    shell = boxes.sh(f"{make}; mv -f {moved} {to}")
    assert (done.status, done.stdout, done.stderr, ours) == (shell.status, shell.stdout, shell.stderr, left())


def test_what_is_left_running_is_killed_after_the_rename(boxes: Boxes) -> None:
    done = direct(boxes, ["sh", "-c", "echo 1 > a; sleep 1000 &"], "false", move=("a", "b"))
    assert (done.status, upper(boxes)) == (0, {"b": "1\n"})


# -- options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--direct", "1", "--", "true"],
        ["--direct", "1", "--", "true", "--"],
        ["--direct", "2", "--", "true", "--", "true"],
        ["--direct", "x", "--", "true", "--", "true"],
        ["--direct", "9", "--", "true"],
        ["--enter", "/", "--", "true"],
        ["--say", "x", "--", "true"],
        ["--from", "a", "--move", "b", "--", "true"],
        ["--move", "b", "--direct", "1", "--", "true", "--", "true"],
    ],
)
def test_options_that_make_no_sense_are_one_line_and_status_two(mkbox: str, options: list[str]) -> None:
    done = subprocess.run([mkbox, "-q", "-s", "/", *options], capture_output=True, timeout=20)
    assert done.returncode == 2
    assert done.stdout == b"" and done.stderr.startswith(b"mkbox: ") and done.stderr.count(b"\n") == 1
