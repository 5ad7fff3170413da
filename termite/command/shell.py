"""What a command line means, as far as that can be told without running it.

Pure functions over argv and shell text.  Everything here errs on the side of "I cannot tell"
(None): a caller that gets words back may rely on every POSIX shell seeing the same words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SHELLS = frozenset(b"sh bash rbash dash ash hush posh ksh mksh oksh pdksh zsh yash csh tcsh fish".split())
"""Programs that understand `-c CMD`: the last part of their path, without a version (ksh93, bash-5.2)."""

RESERVED = frozenset(
    b"! { } [[ ]] case coproc do done elif else esac fi for function if in select then time until while".split()
)
"""Words that are no command name where a command name is expected (POSIX, bash and ksh)."""

LIST_OPERATORS = (b"&&", b"||", b";")

_PLAIN = re.compile(rb"[A-Za-z0-9_@%+:,./\x80-\xff-]+")
_PLAIN_WORDS = re.compile(rb"(?:[A-Za-z0-9_@%+:,./\x80-\xff-][A-Za-z0-9_@%+:,./=\x80-\xff-]*[ \t]+)+")
"""Words after the first that need no closer look: most of a compiler's."""

_HARMLESS = re.compile(rb"[A-Za-z0-9_@%+:,./^=!\]\x80-\xff-]+")
_SINGLE_QUOTED = re.compile(rb"'([^']*)'")
_DOUBLE_QUOTED = re.compile(rb'"((?:[^"\\$`]|\\.)*)"', re.DOTALL)
_ESCAPE_IN_DOUBLE_QUOTES = re.compile(rb'\\([$`"\\\n])')
_NOT_FOR_SHELLS = re.compile(rb"[\0-\x08\x0b-\x1f\x7f]")  # bash marks quoting with \1 and \x7f: words holding them vary
_LONG_OPTIONS_WITH_ARGUMENT = frozenset({b"--rcfile", b"--init-file"})  # bash


@dataclass(frozen=True, slots=True)
class ShellCall:
    """`SHELL [FLAGS] -c SCRIPT [ARGS]`, taken apart."""

    shell: bytes  # last part of the shell's path
    flags: frozenset[str]  # single letters that were switched on: {"e", "c"}
    options: frozenset[bytes]  # `-o pipefail` gives b"pipefail"; `+x`, `-O x` and `--x` stand here as written
    script: bytes
    args: tuple[bytes, ...]  # $0, $1 ...


def shell_call(argv: Sequence[bytes], program: bytes = b"") -> ShellCall | None:
    """The parts of a `sh -c CMD` call, None if this is not one.

    `program` is what is executed, argv[0] what it is told to be called; the shell's name may be in either.
    """
    if not argv:
        return None
    shell = _shell_name(program or argv[0])
    if shell not in SHELLS:
        shell = _shell_name(argv[0].removeprefix(b"-"))  # a login shell's argv[0] is "-bash"
        if shell not in SHELLS:
            return None
    flags: set[str] = set()
    options: set[bytes] = set()
    at = 1
    while at < len(argv):
        arg = argv[at]
        if arg in (b"-", b"--"):
            at += 1
            break
        if arg[:1] not in (b"-", b"+") or len(arg) == 1:
            break
        at += 1
        if arg.startswith(b"--"):
            options.add(arg)
            at += arg in _LONG_OPTIONS_WITH_ARGUMENT
            continue
        for letter in arg[1:].decode("latin-1"):
            if letter in "oO":
                if at < len(argv):
                    options.add(argv[at] if arg[:1] == b"-" and letter == "o" else arg + b" " + argv[at])
                at += 1
            elif arg[:1] == b"-":
                flags.add(letter)
            else:
                options.add(b"+" + letter.encode("latin-1"))
    if "c" not in flags or at >= len(argv):
        return None
    return ShellCall(shell, frozenset(flags), frozenset(options), argv[at], tuple(argv[at + 1 :]))


def shell_script(argv: Sequence[bytes], program: bytes = b"") -> bytes | None:
    """CMD of `sh -c CMD`; None if this is no such call or gives the script arguments of its own."""
    call = shell_call(argv, program)
    return call.script if call is not None and not call.args else None


def command_text(program: bytes, argv: Sequence[bytes]) -> bytes:
    """The text that rules match: CMD of `sh -c CMD`, else the words with single spaces, quoted where needed.

    The first word is the one that was written (argv[0]), not the path that it was found at.
    """
    call = shell_call(argv, program)
    if call is not None:
        return call.script
    words = argv or [program]
    return b" ".join([quoted(word) for word in words])


def quoted(word: bytes) -> bytes:
    """The word as a shell would have to be given it; itself if it holds nothing special."""
    if _PLAIN.fullmatch(word):
        return word
    return b"'" + word.replace(b"'", b"'\\''") + b"'"


def split_simple(text: bytes) -> list[bytes] | None:
    """The words of one simple command, quotes removed.

    None if the text has an operator, expansion, glob, assignment, redirection, comment, reserved
    word, or anything else that some shell treats specially, or that is not UTF-8 (where in some
    locales half a letter looks like a backslash).
    """
    parts = split_list(text)
    if parts is None or len(parts) > 1:
        return None
    return parts[0][1] if parts else []


def split_list(text: bytes) -> list[tuple[bytes, list[bytes]]] | None:
    """Simple commands joined by `&&`, `||` and `;`, each with the operator before it (b"" for the first).

    None under the same conditions as `split_simple`.  One closing `;` is dropped, as a shell does.
    """
    text = text.strip(b" \t\n")
    if not _is_ordinary(text):
        return None
    commands: list[tuple[bytes, list[bytes]]] = []
    operator = b""
    words: list[bytes] = []
    at = 0
    while at < len(text):
        if text[at] in b" \t":
            at += 1
            continue
        if text.startswith(b"\\\n", at):
            at += 2
            continue
        if words and (plain := _PLAIN_WORDS.match(text, at)):
            words += plain[0].split()
            at = plain.end()
            continue
        found = next((o for o in LIST_OPERATORS if text.startswith(o, at)), None)
        if found is not None:
            if not words:
                return None
            commands.append((operator, words))
            operator, words = found, []
            at += len(found)
            continue
        got = _word(text, at, first=not words)
        if got is None:
            return None
        word, at = got
        words.append(word)
    if words:
        commands.append((operator, words))
    elif operator not in (b"", b";"):
        return None
    return commands


def _is_ordinary(text: bytes) -> bool:
    if _NOT_FOR_SHELLS.search(text):
        return False
    if text.isascii():
        return True
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _word(text: bytes, at: int, first: bool) -> tuple[bytes, int] | None:
    """The word that starts at `at` and where it ends; None if it is more than letters and quotes."""
    start = at
    pieces: list[bytes] = []
    if text[at] in b"&|":
        return None  # a pipe or a background command
    while at < len(text) and text[at] not in b" \t;&|":
        got = _piece(text, at, start)
        if got is None:
            return None
        piece, at = got
        pieces.append(piece)
    raw, word = text[start:at], b"".join(pieces)
    if first and (b"=" in raw or word in RESERVED or raw[:1] == b"%"):
        return None  # an assignment, a keyword, a job
    return word, at


def _piece(text: bytes, at: int, start: int) -> tuple[bytes, int] | None:
    """One stretch of a word: plain, quoted or escaped."""
    if found := _HARMLESS.match(text, at):
        is_path = at == start and text[at] == ord("=") and text[at + 1 : at + 2].strip(b" \t;&|")
        return None if is_path else (found[0], found.end())  # zsh takes `=ls` for the path of ls
    if found := _SINGLE_QUOTED.match(text, at):
        return found[1], found.end()
    if found := _DOUBLE_QUOTED.match(text, at):
        return _ESCAPE_IN_DOUBLE_QUOTES.sub(_unescaped, found[1]), found.end()
    char = text[at : at + 1]
    if char == b"\\" and at + 1 < len(text):
        escaped = text[at + 1 : at + 2]
        return (b"" if escaped == b"\n" else escaped), at + 2
    if char == b"~" and at > start and text[at - 1 : at] not in (b":", b"="):
        return char, at + 1  # the end of a backup file's name
    if char == b"[" and at == start and text[at + 1 : at + 2] in (b"", b" ", b"\t"):
        return char, at + 1  # the command `[`, which no glob can be: nothing follows it
    return None


def _unescaped(found: re.Match[bytes]) -> bytes:
    return b"" if found[1] == b"\n" else found[1]


def _shell_name(path: bytes) -> bytes:
    return path.rpartition(b"/")[2].rstrip(b"0123456789.-")
