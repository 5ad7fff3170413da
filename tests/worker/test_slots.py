from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from termite.worker.slots import share


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
