r"""What a makefile has a shell do around a compiler, for a box to do without one.

Makefiles of automake have, for each file to compile,

    depbase=`echo lib/a.o | sed 's|[^/]*$|.deps/&|;s|\.o$||'`;\
    gcc ... -MF $depbase.Tpo -c -o lib/a.o lib/a.c &&\
    mv -f $depbase.Tpo $depbase.Po

perhaps with `echo "  CC      " lib/a.o;` before it, or, where a target has flags of its own,

    gcc ... -c -o src/a.o `test -f 'src/a.c' || echo './'`src/a.c

and those of CMake `cd /build/lib && /usr/bin/cc ...`.  Five processes of shells, sed and mv cost
more there than all that termite adds to a compile.  What they amount to can be told from the text: a
line, a compiler with known arguments, then a file renamed.  Of what a shell adds to the environment the
compiler does not see SHLVL and _.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from termite import paths
from termite.command.shell import split_list
from termite.command.standard import (
    SHELLS,
    changes_meaning,
    echoed,
    is_shadowed,
    searched_before_standard,
    shadows,
    standard_call,
    standard_name,
)

_MAY_BE = re.compile(rb"\bcd /|\bmv -f |`test -f '")
_SAID = re.compile(rb"echo [^;|&]*;")
_DOUBTFUL = (b"", b"-")  # first letters of what mv does not take for a file

_NAMED = re.compile(
    rb"([a-z]\w*)=`echo ([\w./+][\w./+-]*) \| sed 's\|\[\^/\]\*\$\|([\w.][\w.-]*)/&\|;s\|\\\.(o|lo|obj)\$\|\|'`;",
    re.ASCII,
)
"""NAME=`echo OBJECT | sed ...`, which puts a directory before the last part of OBJECT and takes its suffix away.

Names that mean something to a shell, such as IFS, begin with other letters.
"""

_FOUND_HERE = rb"`test -f '([\w./+-]+)' \|\| echo '([\w./+][\w./+-]*)'`"
"""Nothing if the file is there, else the directory that automake says it is in."""

_COMPILER = re.compile(
    rb"(?:.*/)?(?:[\w.+-]+-)?(?:gcc|g\+\+|cc|c\+\+|clang|clang\+\+|gfortran|ccache)(?:-[\d.]+)?", re.ASCII
)
"""No shell has a builtin of such a name."""

_LIBTOOL = re.compile(rb"(?:[\w./+][\w./+-]*/)?libtool", re.ASCII)


class Direct(NamedTuple):
    """`says` is written, then `argv` run in `directory`; if it succeeds, `moved` is renamed to `moved_to`.

    `script` is what a shell would still have to do once that is written.
    """

    says: bytes
    script: bytes
    argv: list[bytes]
    directory: bytes  # absolute; empty: where the shell would be started
    moved: bytes  # empty: nothing
    moved_to: bytes
    shell_pwd: bytes  # the PWD that the shell would begin with

    def environment(self, env: list[bytes]) -> list[bytes]:
        """What a shell that was given `env` hands on, but for SHLVL and _."""
        pwd = b"PWD=" + (self.directory or self.shell_pwd)
        if not self.directory and pwd in env:
            return env
        changed = (b"PWD=", b"OLDPWD=") if self.directory else (b"PWD=",)
        kept = [setting for setting in env if not setting.startswith(changed)]
        return [*kept, pwd, b"OLDPWD=" + self.shell_pwd] if self.directory else [*kept, pwd]


def without_shell(program: bytes, argv: Sequence[bytes], cwd: bytes, env: Sequence[bytes]) -> Direct | None:
    """What this command amounts to; None if it is no such thing, or if in doubt.

    `program` as in a request: a path, or empty for argv[0] on PATH.  `cwd` is absolute, without symlinks.
    Looks for programs that hide the standard ones on PATH, for files where `test -f` stands, and at PWD if
    that is not `cwd`: a few system calls.
    """
    program = program or (argv[0] if argv else b"")
    call = standard_call(argv, program)
    if call is None or not _MAY_BE.search(call.script):
        return None
    says, rest = _said(call.script)
    script = rest.strip(b" \t\n")
    names = {program}
    variable = value = b""
    if found := _NAMED.match(script):
        variable, value = found[1], _transformed(found[2], found[3], b"." + found[4])
        if not value:
            return None
        script = script[found.end() :]
        names.add(b"sed")
    script, looks = _expanded(script, variable, value, cwd)
    direct = _read(split_list(script) or [], looks)
    set_here = (b"IFS=", variable + b"=")  # an exported variable stays exported, with its new value
    if direct is None or changes_meaning(env) or any(setting.startswith(set_here) for setting in env):
        return None
    if direct.moved:
        names.add(b"mv")
    before = searched_before_standard(env)
    if before is None or is_shadowed(shadows(names, before)):
        return None
    return direct._replace(says=says, script=rest, shell_pwd=_shell_pwd(env, cwd))


def _said(script: bytes) -> tuple[bytes, bytes]:
    """(what an `echo` at the beginning writes, the script after it)."""
    if found := _SAID.match(script):
        words = split_list(found[0])
        text = echoed(words[0][1][1:]) if words else None
        if text is not None:
            return text, script[found.end() :]
    return b"", script


def _read(commands: Sequence[tuple[bytes, list[bytes]]], looks: bool) -> Direct | None:
    """[cd DIRECTORY &&] COMPILER ... [&& mv -f FROM TO]; `looks`: it was looked for a file where the shell starts."""
    if any(operator != b"&&" for operator, _ in commands[1:]):
        return None
    calls = [words for _, words in commands]
    directory = moved = moved_to = b""
    match calls:
        case [[b"cd", directory], *rest] if directory.startswith(b"/") and paths.is_clean(directory[1:]):
            calls = rest
    match calls:
        case [*rest, [b"mv", b"-f", moved, moved_to]] if moved[:1] not in _DOUBTFUL and moved_to[:1] not in _DOUBTFUL:
            calls = rest
    if len(calls) != 1 or not (directory or moved or looks) or not _compiles(calls[0]):
        return None
    if directory and looks:
        return None  # `cd` comes first
    return Direct(b"", b"", calls[0], directory, moved, moved_to, b"")


def _compiles(words: Sequence[bytes]) -> bool:
    """Whether this is a compiler, or libtool around one: `/bin/bash ../libtool ...`."""
    if _COMPILER.fullmatch(words[0]):
        return True
    is_shell = words[0].startswith(b"/") and standard_name(words[0]) in SHELLS
    return is_shell and len(words) > 1 and _LIBTOOL.fullmatch(words[1]) is not None


def _transformed(name: bytes, directory: bytes, suffix: bytes) -> bytes:
    """What the sed of _NAMED makes of a name; empty if the name lacks the suffix."""
    parents, slash, last = name.rpartition(b"/")
    if not last.endswith(suffix) or last == suffix:
        return b""
    return parents + slash + directory + b"/" + last.removesuffix(suffix)


def _expanded(script: bytes, variable: bytes, value: bytes, cwd: bytes) -> tuple[bytes, bool]:
    """The script with $variable and _FOUND_HERE replaced, and whether there was one of the latter.

    What takes their place holds nothing that a shell would split, match or quote.
    """
    if not variable and b"`" not in script:
        return script, False
    reference = rb"|\$(?:" + variable + rb"(?!\w)|\{" + variable + rb"\})" if variable else b""
    in_quotes = re.compile(rb"\\." + reference, re.DOTALL | re.ASCII)
    piece = re.compile(rb"""'[^']*'|"(?:[^"\\]|\\.)*"|\\.|""" + _FOUND_HERE + reference, re.DOTALL | re.ASCII)
    looks = False

    def replaced(found: re.Match[bytes]) -> bytes:
        nonlocal looks
        match found[0][:1]:
            case b"$":
                return value
            case b'"':
                return in_quotes.sub(replaced, found[0])
            case b"`":
                looks = True
                return b"" if os.path.isfile(os.path.join(cwd, found[1])) else found[2]
        return found[0]

    return piece.sub(replaced, script), looks


def _shell_pwd(env: Sequence[bytes], cwd: bytes) -> bytes:
    """PWD as shells set it at their start: what it was, if that is another name of `cwd`; debuggers are told it."""
    pwd = next((setting[4:] for setting in env if setting.startswith(b"PWD=")), b"")
    if pwd == cwd or not pwd.startswith(b"/"):
        return cwd
    try:
        return pwd if os.path.samestat(os.stat(pwd), os.stat(cwd)) else cwd
    except OSError:
        return cwd
