from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from termite.master.peers import MAX_FAILED, NAMED, PeerBook
from termite.wire.messages import Peer

A, B, C, D = (Peer("10.0.0.1", port) for port in (1, 2, 3, 4))
HASH = b"h" * 32
SIZE = 20 << 20


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(10):
            return await coroutine

    return asyncio.run(bounded())


@pytest.fixture
def book() -> PeerBook:
    return PeerBook(scale=0.001)


def test_what_nobody_has_is_served_from_here(book: PeerBook) -> None:
    assert run(book.elsewhere(HASH, "a", [])) == []


def test_up_to_two_others_are_named_by_turns(book: PeerBook) -> None:
    for name, peer in {"a": A, "b": B, "c": C, "d": D}.items():
        book.has(HASH, name, peer, SIZE)
    answers = [tuple(run(book.elsewhere(HASH, "d", []))) for _ in range(6)]
    assert all(len(answer) == NAMED and D not in answer for answer in answers)
    assert {answer[0] for answer in answers} == {A, B, C}
    assert book.referred_bytes == 6 * SIZE


def test_a_worker_is_never_sent_to_itself(book: PeerBook) -> None:
    book.has(HASH, "a", A)
    assert run(book.elsewhere(HASH, "a", [])) == []


def test_one_that_failed_is_not_named_again_to_anybody(book: PeerBook) -> None:
    book.has(HASH, "a", A)
    assert run(book.elsewhere(HASH, "b", [A])) == []
    assert run(book.elsewhere(HASH, "c", [])) == []
    assert book.returned == 1


def test_who_was_failed_often_is_served_from_here(book: PeerBook) -> None:
    book.has(HASH, "a", A)
    assert run(book.elsewhere(HASH, "b", [Peer("x", n) for n in range(MAX_FAILED)])) == []


def test_a_lost_worker_is_named_no_more(book: PeerBook) -> None:
    book.has(HASH, "a", A)
    book.lost("a")
    assert run(book.elsewhere(HASH, "b", [])) == []


def test_the_second_waits_for_the_first_and_then_asks_it() -> None:
    async def scene() -> list[Peer]:
        book = PeerBook()
        book.fetching(HASH, "a", SIZE)
        second = asyncio.create_task(book.elsewhere(HASH, "b", []))
        await asyncio.sleep(0)
        assert not second.done()
        book.has(HASH, "a", A)
        return await second

    assert run(scene()) == [A]


def test_the_wait_for_a_first_one_that_is_slow_has_an_end(book: PeerBook) -> None:
    book.fetching(HASH, "a", SIZE)
    assert run(book.elsewhere(HASH, "b", [])) == []


def test_when_the_first_is_lost_one_takes_its_place_and_the_rest_wait_on() -> None:
    async def scene() -> tuple[int, list[Peer]]:
        book = PeerBook()

        async def want(name: str) -> list[Peer]:
            peers = await book.elsewhere(HASH, name, [])
            if not peers:
                book.fetching(HASH, name, SIZE)
            return peers

        book.fetching(HASH, "a", SIZE)
        waiting = [asyncio.create_task(want(name)) for name in "bcd"]
        await asyncio.sleep(0)
        book.lost("a")
        done, others = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        book.has(HASH, "b", B)
        return len(done), [peer for task in others for peer in await task]

    assert run(scene()) == (1, [B, B])


def test_memory_is_bounded(book: PeerBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("termite.master.peers.MAX_KNOWN", 10)
    for number in range(100):
        book.has(number.to_bytes(32, "big"), "a", A)
    assert len(book) == 10
