from __future__ import annotations

from collections.abc import Iterator

import pytest

from termite.master.pool import Pool, State
from termite.wire.messages import WorkerInfo


def info(name: str, jobs: int = 4, arch: str = "x86_64") -> WorkerInfo:
    return WorkerInfo(name=name, host="127.0.0.1", port=1, jobs=jobs, arch=arch)


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(jobs=20, arch="x86_64", keepalive_s=60)
    yield pool
    pool.check()


def open_worker(pool: Pool, name: str, granted: int = 4) -> None:
    found = pool.to_open(need=100, now=0)
    assert found is not None and found[0].name == name
    pool.opened(name, granted, now=0)


def test_no_worker_is_hopeless_and_a_listed_one_is_not(pool: Pool) -> None:
    assert pool.is_hopeless()
    assert pool.pick() is None
    pool.set_workers([info("a")])
    assert not pool.is_hopeless()


def test_a_worker_of_another_architecture_is_never_chosen(pool: Pool) -> None:
    pool.set_workers([info("a", arch="aarch64")])
    assert pool.to_open(need=1, now=0) is None
    assert pool.is_hopeless()


def test_one_worker_is_filled_before_the_next_is_opened(pool: Pool) -> None:
    pool.set_workers([info("a"), info("b")])
    first = pool.to_open(need=3, now=0)
    assert first is not None
    assert pool.to_open(need=3, now=0) is None  # its four slots are enough
    pool.opened(first[0].name, 4, now=0)
    second = pool.to_open(need=5, now=0)
    assert second is not None and second[0].name != first[0].name


def test_tasks_wait_for_a_mirror_that_is_being_opened_rather_than_queue(pool: Pool) -> None:
    pool.set_workers([info("b"), info("a")])
    open_worker(pool, "b", granted=1)
    pool.started("b")
    assert pool.to_open(need=9, now=0) is not None
    assert pool.pick() is None
    pool.opened("a", 1, now=0)
    assert pool.pick() == "a"


def test_one_task_queues_behind_each_running_one_and_no_more(pool: Pool) -> None:
    pool.set_workers([info("a")])
    open_worker(pool, "a", granted=2)
    for _ in range(4):
        assert pool.pick() == "a"
        pool.started("a")
    assert pool.pick() is None
    pool.ended("a", now=1)
    assert pool.pick() == "a"


def test_a_lost_task_goes_elsewhere_if_there_is_an_elsewhere(pool: Pool) -> None:
    pool.set_workers([info("b"), info("a")])
    open_worker(pool, "b")
    assert pool.pick(avoid=frozenset({"b"})) is None  # a can be opened
    open_worker(pool, "a")
    assert pool.pick(avoid=frozenset({"b"})) == "a"
    pool.lost("a", now=0)
    pool.set_workers([info("b")])
    assert pool.pick(avoid=frozenset({"b"})) == "b"


def test_a_failing_worker_is_left_alone_twice_as_long_each_time(pool: Pool) -> None:
    pool.set_workers([info("a")])
    pauses = []
    now = 0.0
    for _ in range(4):
        assert pool.to_open(need=1, now=now) is not None
        pool.lost("a", now)
        assert pool.all_paused(now)
        pauses.append(pool.members["a"].paused_until - now)
        now = pool.members["a"].paused_until
    assert pauses == [0.5, 1.0, 2.0, 4.0]


def test_never_more_slots_than_jobs_are_held() -> None:
    pool = Pool(jobs=6, arch="x86_64")
    pool.set_workers([info(n) for n in "abc"])
    opened = 0
    while pool.to_open(need=100, now=0) is not None:
        opened += 1
    assert opened == 2


def test_an_idle_mirror_gives_its_slots_back_and_asks_again_on_need(pool: Pool) -> None:
    pool.set_workers([info("a")])
    open_worker(pool, "a")
    assert pool.to_release(now=59) == []
    assert pool.to_release(now=60) == ["a"]
    assert pool.to_release(now=61) == []
    pool.granted("a", 0)
    assert pool.pick() is None
    assert pool.to_ask(need=2) == ("a", 4)


def test_a_worker_off_the_list_keeps_its_mirror_until_that_ends(pool: Pool) -> None:
    pool.set_workers([info("a")])
    open_worker(pool, "a")
    pool.set_workers([])
    assert pool.pick() == "a"
    assert not pool.is_hopeless()
    pool.lost("a", now=0)
    assert pool.is_hopeless()
    assert "a" not in pool.members


def test_a_preferred_worker_is_taken_while_it_has_room(pool: Pool) -> None:
    pool.set_workers([info("b"), info("a")])
    open_worker(pool, "b")
    open_worker(pool, "a")
    pool.started("b")
    assert pool.pick() == "b"
    assert pool.pick(prefer="a") == "a"
    assert pool.members["a"].state is State.OPEN


def test_a_worker_without_slots_is_about_to_leave_and_counts_for_nothing(pool: Pool) -> None:
    pool.set_workers([info("a", jobs=0)])
    assert pool.is_hopeless()
    pool.set_workers([info("a"), info("b")])
    pool.set_workers([info("a", jobs=0), info("b")])
    assert list(pool.members) == ["b"]


def test_a_draining_worker_gets_no_task_and_its_slots_are_sought_elsewhere(pool: Pool) -> None:
    pool.set_workers([info("a"), info("b")])
    open_worker(pool, "b")
    pool.started("b")
    assert not pool.drains("b")  # one still runs there
    assert pool.pick() is None
    assert pool.pick(prefer="b") is None
    assert pool.to_ask(need=4) is None
    assert pool.to_open(need=4, now=0) is not None
    pool.ended("b", now=1)
    assert pool.drains("b")


def test_one_that_left_did_not_fail_and_is_welcome_again(pool: Pool) -> None:
    pool.set_workers([info("a")])
    open_worker(pool, "a")
    pool.drains("a")
    pool.left("a", now=10, again=False)
    assert pool.members["a"].failures == 0
    assert pool.to_open(need=1, now=10) is None
    open_later = pool.to_open(need=1, now=12)
    assert open_later is not None
    pool.opened("a", 4, now=12)
    assert pool.pick() == "a"


def test_a_mirror_that_only_made_way_is_opened_anew_at_once(pool: Pool) -> None:
    pool.set_workers([info("a")])
    open_worker(pool, "a")
    pool.drains("a")
    assert not pool.is_hopeless()
    pool.left("a", now=10, again=True)
    assert pool.to_open(need=1, now=10) is not None


def test_one_that_left_and_is_not_listed_is_forgotten(pool: Pool) -> None:
    pool.set_workers([info("a")])
    open_worker(pool, "a")
    pool.drains("a")
    pool.set_workers([])
    assert pool.is_hopeless()
    pool.left("a", now=10, again=False)
    assert not pool.members
