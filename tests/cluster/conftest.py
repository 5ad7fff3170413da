"""Farms for the cluster tests; each test that takes one fails if the farm leaves anything behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.farm import Farm

OVER_SSH = {"test_commands", "test_pages", "test_peers", "test_races", "test_rules", "test_worker_life"}
"""Modules that run twice: the second time the farm's secret is an SSH key."""

ONLY_SSH = bool(os.environ.get("TERMITE_TEST_SSH"))
"""All modules run once, inside SSH."""

OF_THEIR_OWN = {"test_ssh"}
"""Modules that choose the farm's secret themselves."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__name__.rpartition(".")[2]
    if "over_ssh" not in metafunc.fixturenames or module in OF_THEIR_OWN:
        return
    if ONLY_SSH:
        metafunc.parametrize("over_ssh", [True], ids=["ssh"], indirect=True, scope="module")
    elif module in OVER_SSH:
        metafunc.parametrize("over_ssh", [False, True], ids=["secret", "ssh"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def over_ssh(request: pytest.FixtureRequest) -> bool:
    return bool(getattr(request, "param", False))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cluster" in str(item.path) and not os.path.exists("/dev/fuse"):
            item.add_marker(pytest.mark.skip(reason="/dev/fuse is missing"))


@pytest.fixture
def farm(over_ssh: bool) -> Iterator[Farm]:
    """An empty farm: the test starts what it needs."""
    farm = Farm(ssh=over_ssh)
    yield farm
    farm.close()


@pytest.fixture(scope="module")
def cluster(over_ssh: bool) -> Iterator[Farm]:
    """A coordinator and two workers, shared by the tests of one module."""
    farm = Farm(ssh=over_ssh)
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
