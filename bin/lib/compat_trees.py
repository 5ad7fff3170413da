"""Whether builds made the same tree: names, kinds, permissions, link targets and contents.

Times are not compared.
"""

from __future__ import annotations

import filecmp
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

SKIPPED = {".termite-socket"}


@dataclass
class Comparison:
    """Of one tree made through termite with two that plain make made in the same place."""

    files: int = 0  # without directories
    unstable: list[str] = field(default_factory=list)  # plain make's two differ there
    unordered: list[str] = field(default_factory=list)  # differ, and were said to hang on the order of commands
    different: dict[str, str] = field(default_factory=dict)  # name: what is different

    def verdict(self) -> str:
        parts = [f"{len(self.different)} DIFFER" if self.different else "none"]
        if self.unstable:
            parts.append(f"{len(self.unstable)} as make itself")
        if self.unordered:
            parts.append(f"{len(self.unordered)} by order")
        return "; ".join(parts)


def compare(one: Path, other: Path, termite: Path, unordered: Collection[str] = ()) -> Comparison:
    found = Comparison()
    for name in sorted(_names(one) | _names(other) | _names(termite)):
        stable = not difference(one / name, other / name)
        against = difference(other / name, termite / name)
        if not stable:
            found.unstable.append(name)
        missing = _is_there(one / name) == _is_there(other / name) != _is_there(termite / name)
        if against and stable and not missing and name in unordered:
            found.unordered.append(name)
        elif against and (stable or missing):
            found.different[name] = against
        if not os.path.isdir(termite / name) or os.path.islink(termite / name):
            found.files += 1
    return found


def difference(plain: Path, termite: Path) -> str:
    """In a few words; empty: there is none."""
    if not _is_there(plain):
        return "too much in the second" if _is_there(termite) else ""
    if not _is_there(termite):
        return "missing in the second"
    left, right = os.lstat(plain), os.lstat(termite)
    if left.st_mode != right.st_mode:
        return f"{stat.filemode(left.st_mode)} became {stat.filemode(right.st_mode)}"
    if stat.S_ISLNK(left.st_mode):
        return "" if os.readlink(plain) == os.readlink(termite) else "another link target"
    if stat.S_ISREG(left.st_mode) and not filecmp.cmp(plain, termite, shallow=False):
        return f"other contents, {left.st_size} and {right.st_size} bytes"
    return ""


def _names(root: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(where, name), root)
        for where, directories, files in os.walk(root)
        for name in (*directories, *files)
        if name not in SKIPPED
    }


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)
