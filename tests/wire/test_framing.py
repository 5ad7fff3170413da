from __future__ import annotations

import hmac
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from termite.errors import WireError
from termite.wire.framing import BARE, MAC_BYTES, MAX_PAYLOAD, Framer, Session

A, B = bytes(range(32)), bytes(range(100, 132))
Parts = list[tuple[int, int, bytes]]


def two() -> tuple[Session, Framer]:
    return Session(A, B), Framer(Session(B, A))


def sealed(session: Session, frames: Parts) -> list[bytes]:
    return [b"".join(session.seal(*frame)) for frame in frames]


def received(framer: Framer, data: bytes) -> Parts:
    return [(kind, stream, bytes(payload)) for kind, stream, payload in framer.feed(data)]


frames = st.lists(
    st.tuples(st.integers(0, 127), st.integers(0, 2**32 - 1), st.binary(max_size=300)), min_size=1, max_size=8
)
bare_frames = st.lists(
    st.tuples(st.integers(BARE, 255), st.integers(0, 2**32 - 1), st.binary(max_size=300)), min_size=1, max_size=8
)


def test_a_frame_is_laid_out_exactly_like_this() -> None:
    session = Session(A, B)
    session.seal(9, 9, b"first")
    frame = b"".join(session.seal(7, 0x01020304, b"abc"))
    head = b"\x03\0\0\0" + b"\x07" + b"\x04\x03\x02\x01"
    mac = hmac.digest(A, struct.pack("<Q", 1) + head + b"abc", "sha256")[:16]
    assert frame == head + b"abc" + mac


@given(frames | bare_frames, st.data())
def test_frames_arrive_whole_however_the_bytes_are_cut(parts: Parts, data: st.DataObject) -> None:
    sender, framer = two()
    raw = b"".join(sealed(sender, parts))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=6)))
    got: Parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        got += received(framer, raw[start:stop])
    assert got == parts
    assert framer.pending == 0


def test_every_split_of_two_frames_gives_the_same() -> None:
    parts = [(1, 2, b"hello"), (3, 4, b"")]
    raw = b"".join(sealed(Session(A, B), parts))
    for cut in range(len(raw) + 1):
        framer = two()[1]
        assert received(framer, raw[:cut]) + received(framer, raw[cut:]) == parts


@given(frames, st.data())
def test_a_changed_byte_is_noticed_and_what_came_before_is_right(parts: Parts, data: st.DataObject) -> None:
    sender, framer = two()
    raw = bytearray(b"".join(sealed(sender, parts)))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    got: Parts = []
    try:
        for kind, stream, payload in framer.feed(bytes(raw)):
            got.append((kind, stream, bytes(payload)))
        assert framer.pending  # a longer length: still waiting for bytes that no one sends
    except WireError:
        pass
    assert len(got) < len(parts)
    assert got == parts[: len(got)]


@given(bare_frames, st.data())
def test_of_a_bare_frame_the_payload_alone_is_left_to_its_receiver(parts: Parts, data: st.DataObject) -> None:
    sender, framer = two()
    raw = sealed(sender, [*parts, (1, 1, b"end")])
    at = data.draw(st.integers(0, len(parts) - 1))
    where = data.draw(st.integers(0, len(raw[at]) - 1))
    changed = bytearray(raw[at])
    changed[where] ^= data.draw(st.integers(1, 255))
    raw[at] = bytes(changed)
    if 9 <= where < len(changed) - 16:
        got = received(framer, b"".join(raw))
        assert [(kind, stream, len(payload)) for kind, stream, payload in got] == [
            (kind, stream, len(payload)) for kind, stream, payload in [*parts, (1, 1, b"end")]
        ]
        return
    try:
        assert len(received(framer, b"".join(raw))) <= at
    except WireError:
        pass


@given(frames, st.data())
def test_a_dropped_byte_is_noticed(parts: Parts, data: st.DataObject) -> None:
    sender, framer = two()
    raw = bytearray(b"".join(sealed(sender, parts)))
    del raw[data.draw(st.integers(0, len(raw) - 1))]
    try:
        assert len(received(framer, bytes(raw))) < len(parts)
    except WireError:
        pass


@given(frames | bare_frames, st.data())
def test_a_dropped_repeated_or_moved_frame_is_noticed(parts: Parts, data: st.DataObject) -> None:
    sender, framer = two()
    raw = sealed(sender, [*parts, (1, 1, b"end")])
    at = data.draw(st.integers(0, len(parts) - 1))
    how = data.draw(st.sampled_from(["drop", "repeat", "swap"]))
    if how == "drop":
        del raw[at]
    elif how == "repeat":
        raw.insert(at, raw[at])
    else:
        raw[at], raw[at + 1] = raw[at + 1], raw[at]
    with pytest.raises(WireError, match="changed, lost, repeated or reordered"):
        received(framer, b"".join(raw))


def test_a_frame_sent_back_to_its_sender_is_noticed() -> None:
    session = Session(A, B)
    raw = b"".join(session.seal(1, 1, b"x"))
    with pytest.raises(WireError):
        received(Framer(session), raw)


def test_payloads_up_to_the_limit_pass_and_longer_ones_do_not() -> None:
    sender, framer = two()
    largest = bytes(range(256)) * (MAX_PAYLOAD // 256)
    for _ in range(5):
        assert received(framer, b"".join(sender.seal(1, 2, largest))) == [(1, 2, largest)]
    with pytest.raises(WireError, match="over the limit"):
        sender.seal(1, 2, largest + b"x")


def test_an_absurd_length_is_refused_before_its_bytes_are_waited_for() -> None:
    framer = two()[1]
    with pytest.raises(WireError, match="over the limit"):
        received(framer, struct.pack("<IBI", MAX_PAYLOAD + 1, 1, 1))


@given(st.lists(st.sampled_from([0, 1, 1000, 70_000, MAX_PAYLOAD]), min_size=1, max_size=8), st.integers(2000, 400_000))
def test_large_and_small_frames_mix_in_any_portion(sizes: list[int], portion: int) -> None:
    sender, framer = two()
    parts = [(n % 256, n, bytes([n]) * size) for n, size in enumerate(sizes)]
    raw = b"".join(sealed(sender, parts))
    got: Parts = []
    for start in range(0, len(raw), portion):
        got += received(framer, raw[start : start + portion])
    assert got == parts


def test_there_is_always_room_to_receive() -> None:
    sender, framer = two()
    raw = b"".join(sender.seal(1, 1, bytes(MAX_PAYLOAD)))
    for _ in raw[:-1]:
        assert len(framer.space()) > 0
        assert list(framer.take(0)) == []
        break
    assert received(framer, raw[:-1]) == []
    assert len(framer.space()) > 0
    assert len(received(framer, raw[-1:])) == 1


def test_a_session_goes_on_in_another_process_where_it_was() -> None:
    sender, framer = two()
    assert received(framer, b"".join(sealed(sender, [(1, 1, b"a"), (1, 1, b"b")])))
    moved = Session.restore(sender.export())
    assert received(framer, b"".join(moved.seal(1, 1, b"c"))) == [(1, 1, b"c")]
    with pytest.raises(WireError):  # the original has fallen behind
        received(framer, b"".join(sender.seal(1, 1, b"d")))


def test_both_directions_are_carried_over() -> None:
    one, other = Session(A, B), Session(B, A)
    assert received(Framer(one), b"".join(sealed(other, [(1, 1, b"x")] * 3)))
    moved = Framer(Session.restore(one.export()))
    assert received(moved, b"".join(other.seal(2, 2, b"y"))) == [(2, 2, b"y")]


def test_a_broken_export_is_an_error() -> None:
    with pytest.raises(WireError):
        Session.restore(Session(A, B).export()[:-1])


def test_keys_are_not_shown() -> None:
    assert repr(Session(A, B)) == "<Session sent=0 received=0>"


def test_the_mac_is_sixteen_bytes() -> None:
    assert MAC_BYTES == 16 == len(Session(A, B).seal(1, 1, b"")[2])
