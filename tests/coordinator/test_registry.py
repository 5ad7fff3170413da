"""The list of live workers, without any network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from termite.coordinator.overview import listed_masters, listed_workers
from termite.coordinator.registry import Master, Registry, Worker
from termite.errors import Refused
from termite.web.status import ListedMaster, RunningTask
from termite.wire.messages import RunningCommand, Use, WorkerInfo, WorkerReport


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
    assert registry.listing()[0].since == 5.0


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


def report(running: int) -> WorkerReport:
    return WorkerReport(
        state="running",
        load=1.5,
        cpu=50.0,
        memory_used=1,
        memory_total=2,
        running=running,
        done=7,
        uses=[Use("me@here:/src", 4, running)],
        tasks=[RunningCommand(3, "cc -c a.c", "me@here:/src", 0.5)],
    )


def test_what_a_worker_says_of_itself_is_kept_until_it_leaves_and_grows_older(registry: Registry) -> None:
    registry.register("w", info(), 1.0)
    registry.subscribe("m", "me@here:/src", "10.0.0.9", 2.0)
    registry.report("w", report(1), 3.0)
    registry.report("w", report(2), 4.0)
    registry.report("stranger", report(9), 4.0)
    registry.register("w", info(jobs=0), 4.5)
    workers = listed_workers(registry, 5.0)
    assert [(w.name, w.for_s, w.jobs) for w in workers] == [("box", 4.0, 0)]
    load = workers[0].load
    assert load is not None and (load.running, load.age_s) == (2, 1.0)
    assert load.tasks == [RunningTask(3, "cc -c a.c", 1.5, master="me@here:/src")]
    assert listed_masters(registry, workers, 5.0) == [ListedMaster("me@here:/src", "10.0.0.9", 3.0, 4, 2)]
    registry.drop("w")
    registry.report("w", report(1), 5.0)
    assert listed_workers(registry, 6.0) == []


def test_a_name_stands_for_one_connection_and_none_for_all(registry: Registry) -> None:
    registry.register("c1", info("one"), 0)
    registry.register("c2", info("two", port=1), 0)
    assert registry.connections("two") == ["c2"]
    assert registry.connections("three") == []
    assert registry.connections("") == ["c1", "c2"]


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
