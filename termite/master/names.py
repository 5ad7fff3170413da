"""Which files of the project have several names, as far as workers were told of them.

What a command writes through one name shows through all of them, and every worker must hear of each.
Loop only.
"""

from __future__ import annotations

import os
import stat

from termite import paths

_Identity = tuple[int, int]  # device and inode


class Names:
    def __init__(self) -> None:
        self._names: dict[_Identity, set[bytes]] = {}
        self._identity: dict[bytes, _Identity] = {}  # of every path in `_names`

    def __len__(self) -> int:
        return len(self._identity)

    def see(self, path: bytes, st: os.stat_result) -> None:
        """This path has this stat result now."""
        if st.st_nlink == 1 and path not in self._identity:
            return
        self.forget(path)
        if st.st_nlink > 1 and stat.S_ISREG(st.st_mode):
            identity = (st.st_dev, st.st_ino)
            self._identity[path] = identity
            self._names.setdefault(identity, set()).add(path)

    def forget(self, path: bytes) -> None:
        identity = self._identity.pop(path, None)
        if identity is not None:
            names = self._names[identity]
            names.discard(path)
            if not names:
                del self._names[identity]

    def others(self, path: bytes) -> list[bytes]:
        """The other names of the file with this one, those that still are."""
        identity = self._identity.get(path)
        if identity is None:
            return []
        return sorted(other for other in self._names[identity] if other != path and _is(other, identity))


def _is(path: bytes, identity: _Identity) -> bool:
    try:
        st = os.lstat(paths.absolute(path))
    except OSError:
        return False
    return (st.st_dev, st.st_ino) == identity
