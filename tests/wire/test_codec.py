from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from termite.attr.fileattr import FileAttr
from termite.errors import WireError
from termite.wire import codec
from termite.wire.messages import Change, Done, FileResult, Message, Ok, ReadDir, Run, Update, Want


def packed(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


ATTR = FileAttr(mode=0o100644, size=7, mtime_ns=1, hash=b"h" * 32)
EXAMPLES: list[Message] = [
    Ok(),
    Want(jobs=3),
    ReadDir(b"caf\xe9/\n"),
    Update([Change(b"a", ATTR)]),
    Run(1, b"/bin/sh", [b"sh", b"-c", b"\xff"], [b"A=1"], b"src", 0o22, changes=[Change(b"x", FileAttr(0))]),
    Done(0, [FileResult(b"a.o", ATTR, inline_at=0)], stdout=b"x"),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    data = codec.encode(message)
    assert codec.decode(data) == message
    assert codec.decode(memoryview(bytearray(data))) == message


def test_every_message_of_the_page_is_known_and_parts_are_not() -> None:
    assert {"Run", "Done", "Failure", "ReadDir"} <= set(codec.MESSAGES)
    assert not {"Message", "Change", "FileResult"} & set(codec.MESSAGES)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"type": "Want"}, "Want.*missing required field `jobs`"),
        ({"type": "Want", "jobs": "3"}, r"Want.*Expected `int`, got `str`.*\$\.jobs"),
        ({"type": "Want", "jobs": 3.0}, r"Want.*float.*\$\.jobs"),
        ({"type": "Want", "jobs": True}, r"Want.*bool.*\$\.jobs"),
        ({"type": "Want", "jobs": None}, r"Want.*None.*\$\.jobs"),
        ({"type": "Want", "jobs": 1, "extra": 2}, "Want.*unknown field `extra`"),
        ({"type": "ReadDir", "path": "text"}, r"ReadDir.*Expected `bytes`, got `str`.*\$\.path"),
        ({"type": "Update", "changes": [["Change", b"x", [1, "no"]]]}, r"Update.*\$\.changes\[0\]\[2\]\[1\]"),
        ({"type": "Nonsense"}, "unknown type 'Nonsense'"),
        ({"type": "Change"}, "unknown type 'Change'"),
        ({"type": 3}, "malformed"),
        ({"jobs": 3}, "missing required field `type`"),
        ([], "malformed"),
        (None, "malformed"),
    ],
)
def test_anything_amiss_is_an_error_that_names_message_and_field(value: Any, says: str) -> None:
    with pytest.raises(WireError, match=says):
        codec.decode(packed(value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        codec.encode(Want(3)) + b"\0",
        codec.encode(Want(3))[:-1],
        b"\x82\xa4type\xa7Failure\xa4code\xa2\xff\xfe",  # text that is not UTF-8
        b"\x82\xa4type\xa6Update\xa7changes\xdd\xff\xff\xff\xff",  # an array of 4 G elements
        b"\x82\xa4type\xa7ReadDir\xa4path\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
        b"\x91" * 100_000,
    ],
)
def test_broken_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(WireError):
        codec.decode(data)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_wire_error(data: bytes) -> None:
    try:
        codec.decode(data)
    except WireError:
        pass


@given(st.sampled_from(EXAMPLES), st.data())
def test_no_changed_byte_raises_anything_but_a_wire_error(message: Message, data: st.DataObject) -> None:
    raw = bytearray(codec.encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        codec.decode(raw)
    except WireError:
        pass


def test_what_cannot_be_encoded_is_an_error() -> None:
    with pytest.raises(WireError, match="cannot encode Want"):
        codec.encode(Want(1 << 70))
    with pytest.raises(WireError, match="cannot encode Want"):
        codec.encode(Want("\ud800"))  # type: ignore[arg-type]


def test_a_message_over_the_limit_is_neither_sent_nor_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(WireError, match="over the limit"):
        codec.encode(ReadDir(b"x" * 100))
    with pytest.raises(WireError, match="over the limit"):
        codec.decode(b"x" * 101)
