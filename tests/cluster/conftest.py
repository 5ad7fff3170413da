"""Farms for the cluster tests; each test that takes one fails if the farm leaves anything behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.farm import Farm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cluster" in str(item.path) and not os.path.exists("/dev/fuse"):
            item.add_marker(pytest.mark.skip(reason="/dev/fuse is missing"))


@pytest.fixture
def farm() -> Iterator[Farm]:
    """An empty farm: the test starts what it needs."""
    farm = Farm()
    yield farm
    farm.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Farm]:
    """A coordinator and two workers, shared by the tests of one module."""
    farm = Farm()
    farm.coordinator()
    farm.worker(2)
    farm.worker(2)
    yield farm
    farm.close()


@pytest.fixture
def project(cluster: Farm) -> Iterator[Path]:
    """An empty project with a master of its own on the shared cluster."""
    root = cluster.dir / "project"
    root.mkdir()
    master = cluster.master(root)
    yield root
    master.stop()
    cluster.programs.remove(master)
    shutil.rmtree(root)
