"""Whether a name means the program that everybody knows by it.

What is done in place of a command must be what the command itself would have done: so its name has
to lead to a standard directory, and nothing in the environment may change what a shell makes of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence

from termite.command.shell import ShellCall, shell_call

STANDARD_DIRECTORIES = (b"/usr/bin", b"/bin")
SHELLS = frozenset({b"sh", b"bash", b"dash"})
"""The shells whose builtins are known to agree on what is understood here."""

MAX_TEXT = 65536
_HARMLESS_FLAGS = frozenset("ceu")
_HARMLESS_OPTIONS = frozenset({b"errexit", b"nounset", b"pipefail"})
_CHANGES_MEANING = re.compile(rb"(?:BASH_ENV|BASH_FUNC_[^=]*|SHELLOPTS|BASHOPTS|POSIXLY_CORRECT)=")
_ECHO_FLAGS = re.compile(rb"-[neE]*")
_DIRNAME = re.compile(
    rb"""(?<=[ \t])(?P<quote>"?)(?:\$\(|(?P<tick>`))dirname (?!-|//)(?P<path>[A-Za-z0-9_@%+:,./-]+)"""
    rb"""(?(tick)`|\))(?P=quote)(?=[ \t;]|\Z)"""
)


def standard_name(program: bytes) -> bytes | None:
    """The name of a program in a standard directory, or one to be searched for; None for any other."""
    directory, slash, name = program.rpartition(b"/")
    return name if not slash or directory in STANDARD_DIRECTORIES else None


def standard_call(argv: Sequence[bytes], program: bytes) -> ShellCall | None:
    """The parts of `sh -c SCRIPT`; None unless it is a standard shell, told nothing that changes what SCRIPT means."""
    if standard_name(program) not in SHELLS or not argv or argv[0].startswith(b"-"):
        return None
    call = shell_call(argv, program)
    if call is None or call.args or len(call.script) > MAX_TEXT:
        return None
    return call if call.flags <= _HARMLESS_FLAGS and call.options <= _HARMLESS_OPTIONS else None


def changes_meaning(env: Sequence[bytes]) -> bool:
    """Whether a variable has shells or programs behave in another way than usual."""
    return any(_CHANGES_MEANING.match(setting) for setting in env)


def searched_before_standard(env: Sequence[bytes]) -> list[bytes] | None:
    """The directories of PATH that come before a standard one; None if none does, or one is relative."""
    search = next((setting[5:] for setting in env if setting.startswith(b"PATH=")), STANDARD_DIRECTORIES[0])
    before: list[bytes] = []
    for directory in search.split(b":"):
        if directory in STANDARD_DIRECTORIES:
            return before
        if not directory.startswith(b"/"):
            return None
        before.append(directory)
    return None


def shadows(names: Collection[bytes], before: Sequence[bytes]) -> tuple[bytes, ...]:
    """If one of these paths can be executed, a name without a slash means another program."""
    return tuple(directory + b"/" + name for name in names if b"/" not in name for directory in before)


def is_shadowed(paths: Sequence[bytes]) -> bool:
    """Looks at the disk: a system call for each."""
    return any(os.access(path, os.X_OK) for path in paths)


def with_dirnames(script: bytes) -> tuple[bytes, bool]:
    """The script with every `$(dirname PATH)` that is a word of its own replaced by what it prints; whether it had any.

    As it was where quotes or comments leave doubt.
    """
    if b"dirname " not in script or any(mark in script for mark in (b"'", b"\\", b"#")):
        return script, False
    replaced, count = _DIRNAME.subn(lambda found: _dirname(found["path"]), script)
    return (replaced, True) if count and b'"' not in replaced else (script, False)


def _dirname(path: bytes) -> bytes:
    """What `dirname` prints for a path that does not begin with two slashes."""
    directory = path.rstrip(b"/").rpartition(b"/")[0].rstrip(b"/")
    return directory or (b"/" if path.startswith(b"/") else b".")


def echoed(args: Sequence[bytes]) -> bytes | None:
    """What `echo` prints; None where shells and /bin/echo disagree: backslashes, and flags but a lone -n."""
    newline = b"\n"
    if args and args[0] == b"-n":
        args, newline = args[1:], b""
    if any(b"\\" in arg for arg in args):
        return None
    if args and (_ECHO_FLAGS.fullmatch(args[0]) or args[0] in (b"--help", b"--version")):
        return None
    return b" ".join(args) + newline
