"""Commands the master answers without a worker: mkdir, rm, mv, touch, echo, test, true, false.

Also with `$(dirname PATH)` among their words, as makefiles have it that make directories for their objects.

`find_shortcut` reads a command line and decides, without looking at the disk, whether it is one whose
whole effect is known; `Shortcut.perform` does it.  Both say None whenever the real command might do
anything else, print anything else, or fail: the caller then runs it as any other command, and nothing
has been changed by then.  What cmake says of its progress is answered by `progress.py`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

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
    with_dirnames,
)
from termite.master.confined import PROTECTED, ConfinedRoot, NotSimple, Outcome, Removal

MAX_WORDS = 2000

_FIRST_WORD = re.compile(rb"\s*(?:/usr/bin/|/bin/)?(?:mkdir|rm|mv|touch|echo|true|false|:|test|\[)(?:\s|;|\Z)")
_EMPTY = hashlib.sha256().digest()
_OCTAL_MODE = re.compile(rb"0?[0-7]{3}")


@dataclass(frozen=True, slots=True)
class ShortcutResult:
    """What the command left behind, to be passed on as if it had been run."""

    status: int  # as waitpid() gives it: exit status 1 is 256
    stdout: bytes
    stderr: bytes
    changed_paths: list[bytes]  # relative to the exported root, parents first; missing now: it was deleted
    arrived: list[bytes] = field(default_factory=list)  # of these, files that were elsewhere before
    renewed: list[bytes] = field(default_factory=list)  # of these, files with new times alone

    def files(self) -> dict[bytes, bytes | None]:
        """Those that were written or removed: what tells the contents from any other, None for none."""
        found: dict[bytes, bytes | None] = {}
        for path in self.changed_paths:
            try:
                st = os.lstat(paths.absolute(path))
            except OSError:
                found[path] = None
                continue
            if not stat.S_ISDIR(st.st_mode) and path not in self.renewed:
                found[path] = b"%d" % st.st_ino if st.st_size else _EMPTY
        return found


@dataclass(frozen=True, slots=True)
class Call:
    """One simple command: what it does, given the root."""

    operator: bytes  # b"&&", b"||" or b";" before it; b"" for the first
    perform: Callable[[ConfinedRoot], Outcome]
    reads: bool = False  # looks at the disk
    changes: bool = False  # changes the disk


@dataclass(frozen=True, slots=True)
class Shortcut:
    """A command line whose effect is known, as far as text can tell."""

    calls: tuple[Call, ...]
    cwd: bytes  # relative to the exported root
    stops_at_failure: bool  # the shell's -e
    shadowed_by: tuple[bytes, ...]  # if one of these is executable, PATH means another program

    def perform(self, root: bytes, protected: Collection[bytes] = PROTECTED) -> ShortcutResult | None:
        """Does it, changing nothing outside the directory `root`; None: run the command instead.

        Names in `protected` are never deleted.

        Blocking, for the time of a few dozen system calls and one more per file deleted.
        """
        if is_shadowed(self.shadowed_by):
            return None
        try:
            with ConfinedRoot(root, protected) as confined:
                with confined.directory(self.cwd):
                    pass  # a directory reached without a symlink: `..` means what it says
                return self._run(confined)
        except (NotSimple, OSError):
            return None

    def _run(self, root: ConfinedRoot) -> ShortcutResult:
        status = 0
        stdout = stderr = b""
        changed: dict[bytes, None] = {}
        arrived: list[bytes] = []
        renewed: list[bytes] = []
        for index, call in enumerate(self.calls):
            if (call.operator == b"&&" and status) or (call.operator == b"||" and not status):
                continue
            outcome = call.perform(root)
            status = outcome.status
            stdout += outcome.stdout
            stderr += outcome.stderr
            changed |= outcome.changed
            arrived += outcome.arrived
            renewed += outcome.renewed
            ends_list = index + 1 == len(self.calls) or self.calls[index + 1].operator == b";"
            if status and ends_list and self.stops_at_failure:
                break
        return ShortcutResult(status << 8, stdout, stderr, list(changed), arrived, renewed)


def find_shortcut(
    program: bytes, argv: Sequence[bytes], cwd: bytes, umask: int, env: Sequence[bytes] = ()
) -> Shortcut | None:
    """The shortcut for this command, None if it has to be run.

    `program` as in a request: a path, or empty for argv[0] on PATH.  `cwd` is absolute.  `env` holds
    NAME=VALUE strings; without any, PATH is taken to find the programs where they belong.
    """
    name = standard_name(program or argv[0]) if 0 < len(argv) <= MAX_WORDS else None
    if name is None:
        return None
    program = program or argv[0]
    names = {program}
    commands = [(b"", [program, *argv[1:]])]
    is_shell, stops_at_failure = name in SHELLS, False
    if is_shell:
        found = _script(argv, program)
        if found is None:
            return None
        commands, stops_at_failure, dirnames = found
        names |= {words[0] for _, words in commands if words[0] not in _BUILTINS}
        names |= {b"dirname"} if dirnames else set()
    elif name not in _COMMANDS:
        return None
    before = searched_before_standard(env)
    if before is None or changes_meaning(env):
        return None
    here = paths.relative(cwd)
    reader = _Reader(here, umask, builtins=is_shell)
    calls: list[Call] = []
    for operator, words in commands:
        call = reader.call(operator, words)
        if call is None or (any(earlier.changes for earlier in calls) and (call.changes or call.reads)):
            return None  # once something has changed, there must be no more doubt
        calls.append(call)
    return Shortcut(tuple(calls), here, stops_at_failure, shadows(names, before))


def _script(argv: Sequence[bytes], program: bytes) -> tuple[list[tuple[bytes, list[bytes]]], bool, bool] | None:
    """The commands of `sh -c SCRIPT`, is -e on, does it start `dirname`; None unless shells agree about all of it."""
    call = standard_call(argv, program)
    if call is None or not _FIRST_WORD.match(call.script):
        return None
    script, dirnames = with_dirnames(call.script)
    commands = split_list(script)
    if not commands:
        return None
    return commands, "e" in call.flags or b"errexit" in call.options, dirnames


class _Reader:
    """Turns words into calls; None for whatever is not understood."""

    def __init__(self, cwd: bytes, umask: int, builtins: bool) -> None:
        self._cwd = cwd
        self._umask = umask
        self._builtins = builtins

    def call(self, operator: bytes, words: Sequence[bytes]) -> Call | None:
        name, args = standard_name(words[0]), list(words[1:])
        match name:
            case b"true" | b"false" | b":":
                if (name == b":" and not self._builtins) or any(arg.startswith(b"--") for arg in args):
                    return None
                status = int(name == b"false")
                return Call(operator, lambda _: Outcome(status))
            case b"echo":
                text = echoed(args)
                return None if text is None else Call(operator, lambda _: Outcome(stdout=text))
            case b"test":
                return self._test(operator, args)
            case b"[":
                return self._test(operator, args[:-1]) if args and args[-1] == b"]" else None
            case b"mkdir":
                return self._mkdir(operator, args)
            case b"rm":
                return self._rm(operator, args)
            case b"mv":
                return self._mv(operator, args)
            case b"touch":
                return self._touch(operator, args)
        return None

    def _mkdir(self, operator: bytes, args: list[bytes]) -> Call | None:
        parents, mode = False, None
        while args and args[0].startswith(b"-"):
            arg = args.pop(0)
            if arg == b"--":
                break
            if arg in (b"-p", b"--parents"):
                parents = True
            elif arg in (b"-m", b"-pm") and args and _OCTAL_MODE.fullmatch(args[0]):
                parents |= arg == b"-pm"
                mode = int(args.pop(0), 8)
            elif arg.startswith(b"-m") and _OCTAL_MODE.fullmatch(digits := arg[2:]):
                mode = int(digits, 8)
            else:
                return None
        targets = self._operands(args)
        if not targets:
            return None
        umask = self._umask
        return Call(
            operator, lambda root: root.make_directories(targets, parents=parents, mode=mode, umask=umask), changes=True
        )

    def _rm(self, operator: bytes, args: list[bytes]) -> Call | None:
        flags = ""
        while args and args[0].startswith(b"-"):
            arg = args.pop(0)
            if arg == b"--":
                break
            if not re.fullmatch(rb"-[frR]+", arg):
                return None
            flags += arg[1:].decode()
        force, recursive = "f" in flags, "r" in flags.lower()
        targets = self._operands(args)
        if targets is None or not (targets or force):
            return None
        if any(paths.is_inside(self._cwd, target) for target in targets):
            return None  # `.` is refused by rm, and its parents are better not deleted by us
        removals = [
            Removal(target, arg, only_directory=arg.endswith(b"/")) for target, arg in zip(targets, args, strict=True)
        ]
        return Call(operator, lambda root: root.remove(removals, recursive=recursive, force=force), changes=True)

    def _mv(self, operator: bytes, args: list[bytes]) -> Call | None:
        force = args[:1] == [b"-f"]
        operands = self._files(args[1:] if force else args)
        if operands is None or len(operands) != 2:
            return None
        source, target = operands
        return Call(operator, lambda root: root.move(source, target, force=force), changes=True)

    def _touch(self, operator: bytes, args: list[bytes]) -> Call | None:
        operands = self._files(args)
        if operands is None or len(operands) != 1:
            return None  # of several, the first must not be touched if the last cannot be
        target, umask = operands[0], self._umask
        return Call(operator, lambda root: root.touch(target, umask=umask), changes=True)

    def _test(self, operator: bytes, args: list[bytes]) -> Call | None:
        match args:
            case [left, b"=" | b"!=" as relation, right]:
                status = int((left == right) != (relation == b"="))
                return Call(operator, lambda _: Outcome(status))
            case [b"!", b"-d" | b"-e" | b"-f" | b"-n" | b"-z" as primary, operand]:
                negated = True
            case [b"-d" | b"-e" | b"-f" | b"-n" | b"-z" as primary, operand]:
                negated = False
            case _:
                return None
        if primary in (b"-n", b"-z"):
            status = int((operand == b"") == ((primary == b"-n") != negated))
            return Call(operator, lambda _: Outcome(status))
        resolved = self._operands([operand])
        if not resolved:
            return None
        target = resolved[0] + (b"/" if operand.endswith(b"/") else b"")
        return Call(operator, lambda root: Outcome(int(_is(root, primary, target) == negated)), reads=True)

    def _files(self, args: list[bytes]) -> list[bytes] | None:
        """Operands that are meant to be files; None if one is doubtful."""
        return None if any(arg.endswith((b"/", b"/.")) for arg in args) else self._operands(args)

    def _operands(self, args: list[bytes]) -> list[bytes] | None:
        """Operands as paths relative to the exported root; None if one is doubtful."""
        resolved = [_resolve(self._cwd, arg) for arg in args]
        found = [path for path in resolved if path is not None]
        if len(found) < len(args) or any(arg.startswith(b"-") for arg in args):
            return None
        return found


def _resolve(cwd: bytes, operand: bytes) -> bytes | None:
    """Where an operand points; None unless the text alone tells.

    `..` is understood at the beginning of a relative operand only, where it starts from a directory
    that is known to have been reached without a symlink.
    """
    if not operand:
        return None
    at = [] if operand.startswith(b"/") else [part for part in cwd.split(b"/") if part]
    may_go_up = not operand.startswith(b"/")
    for part in operand.split(b"/"):
        if part in (b"", b"."):
            continue
        if part == b"..":
            if not may_go_up or not at:
                return None
            at.pop()
            continue
        may_go_up = False
        at.append(part)
    path = b"/".join(at)
    return path if paths.is_clean(path) else None


def _is(root: ConfinedRoot, primary: bytes, target: bytes) -> bool:
    """The answer of `test PRIMARY TARGET`; follows symlinks, as it should: nothing is changed."""
    root.parts(target.rstrip(b"/"))
    try:
        mode = os.stat(paths.absolute(target)).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise NotSimple(str(error)) from None
    if primary == b"-d":
        return stat.S_ISDIR(mode)
    return primary == b"-e" or stat.S_ISREG(mode)


_COMMANDS = frozenset({b"mkdir", b"rm", b"mv", b"touch", b"echo", b"true", b"false", b"test", b"["})

_BUILTINS = frozenset({b"true", b"false", b":", b"echo", b"test", b"["})
"""A shell finds these without looking at PATH."""
