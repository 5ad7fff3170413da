from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from termite.errors import Leaving
from termite.worker.slots import Turns, share


def test_everyone_gets_what_they_want_while_there_is_enough() -> None:
    assert share(8, {1: 3, 2: 4}) == {1: 3, 2: 4}


def test_slots_are_shared_evenly_when_they_are_scarce() -> None:
    assert share(8, {1: 20, 2: 20}) == {1: 4, 2: 4}


def test_what_one_does_not_want_goes_to_the_others() -> None:
    assert share(8, {1: 1, 2: 20, 3: 20}) == {1: 1, 2: 4, 3: 3}


@given(st.integers(0, 100), st.dictionaries(st.integers(0, 9), st.integers(0, 50)))
def test_all_slots_are_used_and_nobody_gets_more_than_wanted(total: int, wants: dict[int, int]) -> None:
    granted = share(total, wants)
    assert granted.keys() == wants.keys()
    assert all(0 <= granted[k] <= wants[k] for k in wants)
    assert sum(granted.values()) == min(total, sum(wants.values()))


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_tasks_take_turns_in_the_order_they_came() -> None:
    async def scene() -> None:
        turns, order = Turns(), []

        async def task(number: int) -> None:
            await turns.take()
            order.append(number)

        turns.grant(1)
        tasks = [asyncio.create_task(task(number)) for number in range(3)]
        await settled()
        assert order == [0] and (turns.running, turns.waiting) == (1, 2)
        turns.give_back()
        await settled()
        assert order == [0, 1]
        turns.grant(2)
        await settled()
        assert order == [0, 1, 2] and turns.waiting == 0
        await asyncio.gather(*tasks)

    asyncio.run(scene())


def test_a_cancelled_task_leaves_its_turn_to_the_next() -> None:
    async def scene() -> None:
        turns = Turns()
        turns.grant(1)
        await turns.take()
        first, second = asyncio.create_task(turns.take()), asyncio.create_task(turns.take())
        await settled()
        turns.give_back()
        first.cancel()  # its turn has come in the same moment
        await settled()
        assert second.done() and turns.running == 1

    asyncio.run(scene())


def test_no_turns_after_the_end() -> None:
    async def scene() -> None:
        turns = Turns()
        waiting = asyncio.create_task(turns.take())
        await settled()
        turns.close("going home")
        with pytest.raises(Leaving, match="going home"):
            await waiting
        with pytest.raises(Leaving):
            await turns.take()

    asyncio.run(scene())
