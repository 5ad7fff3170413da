"""Progress lines of CMake's makefiles, which the master prints itself.

Before each compile such a makefile has

    cmake -E cmake_echo_color --switch= --green --progress-dir=DIR --progress-num=7 "Building C object a.c.o"

which writes DIR/Progress/7, counts the files there, and prints a share of the number in
DIR/Progress/count.txt: half of all commands of a build, to print a line each.  What exactly a cmake
makes of it is its own affair.  So it is asked, once for each way to print, in a directory of ours;
meanwhile, and if it does anything else than is done here, such commands run like any other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from termite import paths
from termite.command.shell import split_simple
from termite.command.standard import changes_meaning, searched_before_standard, shadows, standard_call
from termite.master.confined import ConfinedRoot, NotSimple, Outcome
from termite.master.shortcuts import Call, Shortcut

log = logging.getLogger(__name__)

MAX_MANNERS = 100
"""More are not asked about: something in the environment is another each time."""
_ASKING_LIMIT_S = 5.0

_MARK = b" -E cmake_echo_color "
_STYLE = re.compile(rb"--(?:normal|black|red|green|yellow|blue|magenta|cyan|white|bold)")
_STEPS = re.compile(rb"(?:\d{1,9}(?:,\d{1,9}){0,999})?", re.ASCII)
_COUNT = re.compile(rb"([1-9]\d{0,8})\s*", re.ASCII)
_COLOURS = re.compile(rb"(?:\x1b\[[\d;]*m)*", re.ASCII)
_COUNT_NAME = b"count.txt"
_STEP_DATA = b"empty"
_OF_ONE_COMMAND = (b"MAKEFLAGS=", b"MFLAGS=", b"MAKELEVEL=", b"MAKEOVERRIDES=", b"PWD=", b"OLDPWD=", b"SHLVL=", b"_=")
"""What tells one command from the next and does not change what cmake prints."""


class Line(NamedTuple):
    """One such command, taken apart."""

    cmake: bytes  # absolute
    style: tuple[bytes, ...]  # --green, --bold
    directory: bytes | None  # absolute, the one that Progress is in; None: no share is printed
    steps: tuple[bytes, ...]  # names of the files to write
    text: bytes


class Manner(NamedTuple):
    """All that decides how a line is printed: which cmake, told which style, in which environment."""

    cmake: bytes
    version: tuple[int, ...]  # of the file: device, inode, size, times
    style: tuple[bytes, ...]
    env: tuple[bytes, ...]


class Look(NamedTuple):
    """What stands before and behind the text: colours, if any."""

    before: bytes
    after: bytes


def read_line(words: Sequence[bytes]) -> Line | None:
    """None if it is no such command, or has a flag that is not known here."""
    match words:
        case [cmake, b"-E", b"cmake_echo_color", b"--switch=", *flags, text]:
            pass
        case _:
            return None
    if not (cmake.startswith(b"/") and cmake.endswith(b"/cmake")) or not text or text.startswith(b"-"):
        return None
    directory: bytes | None = None
    steps = b""
    match flags:
        case [*style, progress, numbers] if progress.startswith(b"--progress-dir="):
            directory = progress.removeprefix(b"--progress-dir=")
            steps = numbers.removeprefix(b"--progress-num=")
            if not directory.startswith(b"/") or not paths.is_clean(directory[1:]):
                return None
            if steps == numbers or not _STEPS.fullmatch(steps):
                return None
        case style:
            pass
    if not all(_STYLE.fullmatch(flag) for flag in style):
        return None
    return Line(cmake, tuple(style), directory, tuple(steps.split(b",")) if steps else (), text)


class ProgressLines:
    """Finds out how each cmake prints, and prints like it from then on.  Loop only."""

    def __init__(self) -> None:
        self._looks: dict[Manner, Look | None] = {}  # None: not as is done here, or not known yet
        self._asking: set[asyncio.Task[None]] = set()

    def find(
        self, program: bytes, argv: Sequence[bytes], cwd: bytes, umask: int, env: Sequence[bytes]
    ) -> Shortcut | None:
        """As `find_shortcut`, for lines of cmake; looks at the program's file."""
        if not argv or _MARK not in argv[-1]:
            return None
        program = program or argv[0]
        call = standard_call(argv, program)
        line = read_line(split_simple(call.script) or []) if call else None
        before = searched_before_standard(env)
        if line is None or before is None or changes_meaning(env):
            return None
        look = self._look(line, env)
        if look is None:
            return None
        told = Call(b"", partial(_tell, line, look, umask), reads=True, changes=True)
        return Shortcut((told,), paths.relative(cwd), False, shadows({program}, before))

    async def close(self) -> None:
        """Within the limit of one question."""
        await asyncio.gather(*self._asking, return_exceptions=True)

    def _look(self, line: Line, env: Sequence[bytes]) -> Look | None:
        try:
            st = os.stat(line.cmake)
        except OSError:
            return None
        version = st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns
        settings = tuple(setting for setting in env if not setting.startswith(_OF_ONE_COMMAND))
        manner = Manner(line.cmake, version, line.style, settings)
        if manner not in self._looks and len(self._looks) < MAX_MANNERS:
            self._looks[manner] = None
            asking = asyncio.get_running_loop().create_task(self._ask(manner))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
        return self._looks.get(manner)

    async def _ask(self, manner: Manner) -> None:
        look = await asyncio.to_thread(look_of, manner)
        self._looks[manner] = look
        whose = "answered here" if look else "its own affair"
        log.debug("progress lines of %s are %s", paths.for_people(manner.cmake), whose)


def look_of(manner: Manner) -> Look | None:
    """How this cmake prints; None if it differs from what `_tell` does in anything but colours.

    Blocking, for some 15 ms of three processes each.
    """
    until = time.monotonic() + _ASKING_LIMIT_S
    try:
        with tempfile.TemporaryDirectory(prefix="termite-") as scratch:
            where = Path(scratch)
            bare = _said(manner, where, b"3", until)
            progress = where / "Progress"
            if bare is None or progress.exists():
                return None
            progress.mkdir()
            count = progress / os.fsdecode(_COUNT_NAME)
            count.write_bytes(b"9\n")
            begun = _said(manner, where, b"", until)
            under_way = _said(manner, where, b"2,15", until)
            steps = [progress / "2", progress / "15"]
            as_expected = (
                begun == (b"[  0%] ", *bare[1:])
                and under_way == (b"[ 22%] ", *bare[1:])
                and bare[0] == b""
                and set(progress.iterdir()) == {count, *steps}
                and all(step.read_bytes() == _STEP_DATA for step in steps)
                and all(step.stat().st_mode == count.stat().st_mode for step in steps)
                and count.read_bytes() == b"9\n"
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return Look(*bare[1:]) if as_expected else None


def _said(manner: Manner, where: Path, steps: bytes, until: float) -> tuple[bytes, bytes, bytes] | None:
    """(the share, what is before the text, what is after it but the end of the line); None for anything else."""
    text = b"Building %d%s \\n object"
    progress = [b"--progress-dir=" + os.fsencode(where), b"--progress-num=" + steps]
    ran = subprocess.run(
        [manner.cmake, b"-E", b"cmake_echo_color", b"--switch=", *manner.style, *progress, text],
        cwd=where,
        env=dict(setting.split(b"=", 1) for setting in manner.env if b"=" in setting),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=max(until - time.monotonic(), 0.01),
        check=False,
    )
    before, found, after = ran.stdout.partition(text)
    share = re.match(rb"(?:\[ *\d+%\] )?", before)
    if ran.returncode or not found or not after.endswith(b"\n") or share is None:
        return None
    before, after = before[share.end() :], after[:-1]
    if not (_COLOURS.fullmatch(before) and _COLOURS.fullmatch(after)):
        return None
    return share[0], before, after


def _tell(line: Line, look: Look, umask: int, root: ConfinedRoot) -> Outcome:
    outcome, share = Outcome(), b""
    if line.directory is not None:
        directory = paths.join(paths.relative(line.directory), b"Progress")
        count = root.read(paths.join(directory, _COUNT_NAME), 32)
        if count is not None:
            number = _COUNT.fullmatch(count)
            if number is None:
                raise NotSimple("another count")
            outcome, entries = root.overwrite(directory, line.steps, _STEP_DATA, umask=umask)
            share = b"[%3d%%] " % ((entries - 1) * 100 // int(number[1]))
    outcome.stdout = share + look.before + line.text + look.after + b"\n"
    return outcome
