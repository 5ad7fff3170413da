"""What shell text is understood, checked against the shells of this machine wherever words are promised."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from termite.command.shell import command_text, quoted, shell_call, shell_script, split_list, split_simple

SHELLS = [path for name in ("dash", "bash") if (path := shutil.which(name))]


def words_by_shell(shell: str, text: bytes) -> list[bytes]:
    """The operands a real shell hands to the command `printf` of the text's only command."""
    # The first word is replaced by a function of that name, which no quoting in the text can see through.
    script = b"f() { for w do printf '%s\\0' \"$w\"; done; }\nf " + text + b"\n"
    done = subprocess.run([shell, "-c", script], capture_output=True, timeout=20, check=True)
    return done.stdout.split(b"\0")[:-1]


@pytest.mark.parametrize(
    "argv",
    [
        [b"/bin/sh", b"-c", b"gcc -c a.c"],
        [b"sh", b"-ec", b"gcc -c a.c"],
        [b"/bin/bash", b"-eu", b"-o", b"pipefail", b"-c", b"gcc -c a.c"],
        [b"/bin/bash", b"-euo", b"pipefail", b"-c", b"gcc -c a.c"],
        [b"bash", b"-ceuo", b"pipefail", b"gcc -c a.c"],
        [b"bash", b"--norc", b"--rcfile", b"x", b"-c", b"gcc -c a.c"],
        [b"bash", b"-O", b"extglob", b"-c", b"gcc -c a.c"],
        [b"zsh", b"+x", b"-c", b"--", b"gcc -c a.c"],
        [b"/opt/ksh93", b"-c", b"gcc -c a.c"],
        [b"/usr/bin/bash-5.2", b"-c", b"gcc -c a.c"],
        [b"sh", b"-c", b"gcc -c a.c", b"name", b"first"],
    ],
)
def test_the_text_of_a_shell_call_is_the_script(argv: list[bytes]) -> None:
    assert command_text(argv[0], argv) == b"gcc -c a.c"


def test_the_program_tells_the_shell_even_if_argv0_does_not() -> None:
    assert command_text(b"/bin/sh", [b"recipe", b"-c", b"true"]) == b"true"
    assert command_text(b"/tools/wrapper", [b"sh", b"-c", b"true"]) == b"true"


def test_the_text_of_any_other_call_is_its_words_joined_and_quoted_only_where_needed() -> None:
    argv = [b"gcc", b"-DX='1 2'", b"-c", b"a b.c", b"", b"-o", b"\xff.o"]
    assert command_text(b"/usr/bin/gcc", argv) == b"gcc '-DX='\\''1 2'\\''' -c 'a b.c' '' -o \xff.o"
    assert command_text(b"", argv).startswith(b"gcc ")
    assert command_text(b"x", []) == b"x"


def test_a_shell_that_runs_a_file_is_an_ordinary_call() -> None:
    assert command_text(b"/bin/sh", [b"sh", b"./configure", b"-c"]) == b"sh ./configure -c"
    assert command_text(b"sh", [b"sh", b"-c"]) == b"sh -c"
    assert shell_script([b"sh", b"x.sh"]) is None
    assert shell_script([]) is None


def test_a_script_with_arguments_of_its_own_is_no_plain_script() -> None:
    assert shell_script([b"sh", b"-c", b"echo $1", b"sh", b"x"]) is None
    assert shell_script([b"sh", b"-ec", b"echo x"]) == b"echo x"


def test_the_flags_of_a_shell_call_are_told_apart() -> None:
    call = shell_call([b"bash", b"-eu", b"-o", b"pipefail", b"+x", b"-O", b"extglob", b"--posix", b"-c", b"true"])
    assert call is not None
    assert call.flags == {"e", "u", "c"}
    assert call.options == {b"pipefail", b"+x", b"-O extglob", b"--posix"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"mkdir -p a/b", [b"mkdir", b"-p", b"a/b"]),
        (b"  echo\t'a  b'\"c d\"e\\ f  ", [b"echo", b"a  bc de f"]),
        (b"echo '' \"\"", [b"echo", b"", b""]),
        (b'echo "a\\"b\\\\c\\d\\$e"', [b"echo", b'a"b\\c\\d$e']),
        (b"echo a\\\nb \\\n c", [b"echo", b"ab", b"c"]),
        (b"rm -f foo~ a=b 1", [b"rm", b"-f", b"foo~", b"a=b", b"1"]),
        (b"test ! -d x", [b"test", b"!", b"-d", b"x"]),
        (b"[ -d x ]", [b"[", b"-d", b"x", b"]"]),
        (b"echo 'a\nb'", [b"echo", b"a\nb"]),
        ("echo ü \\ü".encode(), [b"echo", "ü".encode(), "ü".encode()]),
        (b"echo 'if' then", [b"echo", b"if", b"then"]),
        (b"true;", [b"true"]),
        (b"", []),
        (b" \n", []),
    ],
)
def test_a_simple_command_is_split_into_its_words(text: bytes, words: list[bytes]) -> None:
    assert split_simple(text) == words


@pytest.mark.parametrize(
    "text",
    [
        b"echo $x",
        b"echo `x`",
        b'echo "$x"',
        b'echo "`x`"',
        b"echo a*",
        b"echo a?",
        b"echo [ab]",
        b"echo ~",
        b"echo ~u",
        b"echo a=~",
        b"echo a:~",
        b"echo {a,b}",
        b"echo a >b",
        b"echo 2>b",
        b"echo <b",
        b"a | b",
        b"a & b",
        b"a &",
        b"|",
        b"&",
        b"(a)",
        b"a; b",
        b"a && b",
        b"a || b",
        b"a\nb",
        b"echo # x",
        b"X=1 echo",
        b"'X'=1",
        b"if",
        b"'if' x",
        b"! true",
        b"[[ x ]]",
        b"time x",
        b"{ a",
        b"echo 'a",
        b'echo "a',
        b"echo a\\",
        b"echo \x01",
        b"echo '\x7f'",
        b"echo a\0b",
        b"echo \xff",
        b"%1",
        b"echo =ls",
        b"echo a\rb",
        b"&&",
        b"a &&",
        b"; a",
        b"a ;; b",
        b";",
        b"a &&& b",
        b"a ||| b",
        b"a ;& b",
        b"[x] y",
    ],
)
def test_anything_a_shell_treats_specially_is_not_split(text: bytes) -> None:
    assert split_simple(text) is None


def test_a_list_is_split_at_its_operators() -> None:
    assert split_list(b"test -d a||mkdir a && echo 'x;y' ; true;") == [
        (b"", [b"test", b"-d", b"a"]),
        (b"||", [b"mkdir", b"a"]),
        (b"&&", [b"echo", b"x;y"]),
        (b";", [b"true"]),
    ]
    assert split_list(b"a && ; b") is None
    assert split_list(b"a ||") is None
    assert split_list(b"a ; & b") is None


@pytest.mark.parametrize("shell", SHELLS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab-=:~%^!@,.+/]['\"\\ \t\nü;#{}$*?<>|&()", max_size=14).map(str.encode))
def test_whatever_is_split_is_split_as_the_shell_does_it(shell: str, text: bytes) -> None:
    words = split_simple(b"echo " + text)
    if words is not None and not text.rstrip().endswith(b";"):
        assert words_by_shell(shell, text.strip(b" \t\n")) == words[1:]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet="ab '\"\\$\n*ü;", max_size=6).map(str.encode), min_size=1, max_size=4))
def test_quoted_words_come_back_from_splitting(words: list[bytes]) -> None:
    assert split_simple(b"x " + b" ".join(quoted(w) for w in words)) == [b"x", *words]
