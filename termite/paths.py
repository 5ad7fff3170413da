"""Root-relative paths: the one place that knows "clean, relative, inside".

`path` is bytes relative to the exported root without leading slash, b"" the root itself; `abspath`
has the slash.  Pure text: no disk, symlinks are not followed.
"""

from __future__ import annotations

from termite.errors import PathError

MAX_PATH = 4096


def is_clean(path: bytes) -> bool:
    """True for a relative path without empty, `.` or `..` components, NUL, or absurd length."""
    if path == b"":
        return True
    if len(path) > MAX_PATH or b"\0" in path:
        return False
    return not any(part in (b"", b".", b"..") for part in path.split(b"/"))


def checked(path: bytes) -> bytes:
    """The path itself; PathError if it is not clean."""
    if not is_clean(path):
        raise PathError(f"not a clean relative path: {path!r}")
    return path


def is_inside(path: bytes, root: bytes) -> bool:
    """True if `path` is `root` or lies below it."""
    return root == b"" or path == root or path.startswith(root + b"/")


def join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def split(path: bytes) -> tuple[bytes, bytes]:
    """(directory, name); the root gives (b"", b"")."""
    directory, _, name = path.rpartition(b"/")
    return directory, name


def absolute(path: bytes) -> bytes:
    return b"/" + path


def relative(abspath: bytes) -> bytes:
    """The root-relative form of an absolute path, `//`, `.` and `..` resolved as text."""
    parts: list[bytes] = []
    for part in abspath.split(b"/"):
        if part == b"..":
            if parts:
                parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def for_people(path: bytes) -> str:
    """A path as one printable line."""
    return path.decode("utf-8", "backslashreplace").replace("\n", "\\n")
