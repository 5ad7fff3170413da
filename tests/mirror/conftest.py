"""What tests of mounts start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mirror.mounting import Mounted, mounted
from tests.mirror.told import FakeMaster, ids


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mounted]:
    """d/f, d/sub/g, l -> d/f"""
    master = FakeMaster(owner=ids())
    master.directory(b"d")
    master.file(b"d/f", b"contents\n")
    master.directory(b"d/sub")
    master.file(b"d/sub/g", b"gee")
    master.link(b"l", b"d/f")
    with mounted(master, tmp_path) as mirror:
        yield mirror
