"""Which directories the commands of one place write into.

The kernel copies a directory up before anything in it can be changed, which takes ten FUSE requests each
time.  Commands that are started in one place mostly change the same directories: those are made in a
task's upper directory beforehand, looking like what they stand for.  A directory that was made in vain
costs little, and is no result.  Loop only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from termite import paths
from termite.attr.fileattr import FileAttr

PLACES = 256
"""Working directories that are remembered."""

DIRECTORIES = 4
"""Of each, the directories that were changed last."""


class Habits:
    """Paths are relative to the writable root; the root itself is always there."""

    def __init__(self) -> None:
        self._places: OrderedDict[bytes, list[bytes]] = OrderedDict()  # working directory -> changed last first

    def note(self, cwd: bytes, changed: Iterable[bytes]) -> None:
        """A command that was started in `cwd` has changed something in these directories."""
        found = [directory for directory in changed if directory][:DIRECTORIES]
        if not found:
            return
        known = self._places.setdefault(cwd, [])
        self._places.move_to_end(cwd)
        known[:] = [*found, *(directory for directory in known if directory not in found)][:DIRECTORIES]
        if len(self._places) > PLACES:
            self._places.popitem(last=False)

    def expected(self, cwd: bytes, seen: Callable[[bytes], FileAttr | None]) -> list[tuple[bytes, FileAttr]]:
        """The directories to make for a command that is started in `cwd`, parents first, and how they look.

        `seen` tells how a directory looks to tasks, None if that is not known.
        """
        wanted: dict[bytes, FileAttr] = {}
        for directory in self._places.get(cwd, ()):
            chain: dict[bytes, FileAttr] = {}
            while directory and directory not in wanted:
                attr = seen(directory)
                if attr is None or not attr.is_dir():
                    break
                chain[directory] = attr
                directory = paths.split(directory)[0]
            else:
                wanted.update(chain)
        return sorted(wanted.items())
