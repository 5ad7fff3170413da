"""What tests of the master start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.master.replaying import Tree
from tests.master.shortcutting import populate


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return populate(tmp_path / "root")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "p")
