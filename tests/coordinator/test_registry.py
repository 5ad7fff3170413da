"""The list of live workers, without any network."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from termite.coordinator.registry import Master, Registry, Worker
from termite.errors import Refused
from termite.wire.messages import WorkerInfo


def info(name: str = "box", host: str = "10.0.0.1", port: int = 1232, jobs: int = 4) -> WorkerInfo:
    return WorkerInfo(name=name, host=host, port=port, jobs=jobs, arch="x86_64")


@pytest.fixture
def registry() -> Iterator[Registry]:
    registry = Registry()
    yield registry
    registry.check()


def names(registry: Registry) -> list[str]:
    return [worker.name for worker in registry.workers()]


def test_a_worker_is_listed_as_long_as_its_connection(registry: Registry) -> None:
    registry.register("c1", info("b"), 1.0)
    registry.register("c2", info("a", port=1), 2.0)
    assert names(registry) == ["a", "b"]
    gone = registry.drop("c1")
    assert isinstance(gone, Worker) and gone.info.name == "b"
    assert names(registry) == ["a"]
    assert registry.drop("c1") is None


def test_two_workers_of_one_name_get_different_names(registry: Registry) -> None:
    assert registry.register("c1", info("box"), 0).name == "box"
    assert registry.register("c2", info("box", port=1), 0).name == "box#2"
    assert registry.register("c3", info("box", port=2), 0).name == "box#3"
    registry.drop("c2")
    assert registry.register("c4", info("box", port=3), 0).name == "box#2"


def test_registering_again_on_a_connection_replaces_and_keeps_name_and_age(registry: Registry) -> None:
    registry.register("c1", info(jobs=4), 5.0)
    assert registry.register("c1", info(jobs=8), 9.0).name == "box"
    assert [worker.jobs for worker in registry.workers()] == [8]
    assert registry.status(15.0)["workers"][0]["for_s"] == 10.0


def test_a_worker_that_came_back_takes_the_place_of_its_old_connection(registry: Registry) -> None:
    registry.register("old", info(jobs=4), 1.0)
    assert registry.register("new", info(jobs=6), 2.0).name == "box"
    assert registry.drop("old") is None
    assert [worker.jobs for worker in registry.workers()] == [6]


def test_masters_are_told_apart_from_workers(registry: Registry) -> None:
    registry.subscribe("m", "me@here:/src", "10.0.0.9", 0)
    registry.register("w", info(), 0)
    assert registry.subscribers() == ["m"]
    assert registry.knows("m") and registry.knows("w") and not registry.knows("x")
    assert isinstance(registry.drop("m"), Master)
    assert registry.subscribers() == []


def test_the_status_is_plain_data(registry: Registry) -> None:
    registry.register("w", info(), 1.0)
    registry.subscribe("m", "me@here:/src", "10.0.0.9", 2.0)
    status = msgspec.json.decode(msgspec.json.encode(registry.status(4.0)))
    assert status["jobs"] == 4
    assert status["workers"][0]["name"] == "box"
    assert "type" not in status["workers"][0]
    assert status["masters"] == [{"name": "me@here:/src", "host": "10.0.0.9", "for_s": 2.0}]


@pytest.mark.parametrize(
    "bad",
    [
        info(name=""),
        info(name="a\nb"),
        info(name="a" * 256),
        info(host=""),
        info(host="x\x1b[m"),
        info(port=0),
        info(port=65536),
        info(jobs=-1),
        info(jobs=1 << 30),
    ],
)
def test_a_worker_that_makes_no_sense_is_refused_and_leaves_no_trace(registry: Registry, bad: WorkerInfo) -> None:
    with pytest.raises(Refused, match="must be"):
        registry.register("c", bad, 0)
    assert registry.workers() == []
    with pytest.raises(Refused):
        registry.subscribe("c", "", "h", 0)


_STEPS = st.lists(
    st.tuples(st.sampled_from("rrsd"), st.integers(0, 4), st.sampled_from("ab"), st.integers(1, 3)), max_size=40
)


@given(_STEPS)
def test_names_and_addresses_stay_unique_whatever_comes_and_goes(steps: list[tuple[str, int, str, int]]) -> None:
    registry = Registry()
    for what, connection, name, port in steps:
        if what == "r":
            registry.register(("w", connection), info(name, port=port), 0)
        elif what == "s":
            registry.subscribe(("m", connection), name, "h", 0)
        else:
            registry.drop(("w", connection))
            registry.drop(("m", connection))
        registry.check()
