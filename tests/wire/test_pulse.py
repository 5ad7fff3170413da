from __future__ import annotations

import struct

import pytest

from termite.errors import WireError
from termite.wire.pulse import Pulse


def exchange(pulse: Pulse, *, sent: int, back: int, offset: int, there_after: int) -> None:
    """One ping that reaches the peer `there_after` ns later; our wall clock is the monotonic one plus 1000."""
    pong = Pulse.pong(memoryview(Pulse.ping(sent)), sent + there_after + 1000 + offset)
    pulse.heard(memoryview(pong), back, back + 1000)


def test_the_offset_of_an_even_round_trip_is_exact() -> None:
    pulse = Pulse()
    exchange(pulse, sent=10_000, back=14_000, offset=-500, there_after=2000)
    assert pulse.clock_offset_ns == -500
    assert pulse.rtt_s == pytest.approx(4e-6)


def test_the_shortest_round_trip_decides() -> None:
    pulse = Pulse()
    exchange(pulse, sent=0, back=10_000, offset=700, there_after=9000)
    exchange(pulse, sent=20_000, back=20_100, offset=700, there_after=50)
    exchange(pulse, sent=30_000, back=90_000, offset=700, there_after=100)
    assert pulse.clock_offset_ns == 700
    assert pulse.rtt_s == pytest.approx(1e-7)


def test_old_samples_are_left_behind() -> None:
    pulse = Pulse()
    exchange(pulse, sent=0, back=10, offset=0, there_after=5)
    for n in range(1, 30):
        exchange(pulse, sent=n * 1000, back=n * 1000 + 100, offset=300, there_after=50)
    assert pulse.clock_offset_ns == 300


def test_broken_pings_and_pongs_are_errors() -> None:
    with pytest.raises(WireError):
        Pulse.pong(memoryview(b"short"), 0)
    with pytest.raises(WireError):
        Pulse().heard(memoryview(b"short"), 0, 0)
    with pytest.raises(WireError, match="never sent"):
        Pulse().heard(memoryview(struct.pack("<QQ", 10, 0)), 5, 5)
