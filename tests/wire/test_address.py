from __future__ import annotations

import socket

import pytest

from termite.errors import TermiteError, UsageError
from termite.wire.address import bind, format_address, host_of, parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host", ("host", 7)),
        ("host:1233", ("host", 1233)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("::1", ("::1", 7)),
        ("[::1]", ("::1", 7)),
        ("[fe80::1%eth0]:65535", ("fe80::1%eth0", 65535)),
        (" host:1233\n", ("host", 1233)),
    ],
)
def test_addresses_are_read_as_people_write_them(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text, 7) == expected


@pytest.mark.parametrize(
    "text",
    ["", ":1233", "host:", "host:0", "host:65536", "host:x", "host:-1", "host:1²", "[::1", "[]:1", "[::1]x", "a b:1", "http://h:1"],
)
def test_anything_else_is_a_usage_error_that_shows_the_text(text: str) -> None:
    with pytest.raises(UsageError, match="address"):
        parse_address(text, 7)


def test_a_formatted_address_reads_back() -> None:
    for address in (("host", 1), ("::1", 2), ("127.0.0.1", 3)):
        assert parse_address(format_address(*address), 9) == address


def test_ipv4_shown_as_ipv6_is_plain_ipv4() -> None:
    assert host_of(("::ffff:10.0.0.1", 5, 0, 0)) == "10.0.0.1"
    assert host_of(("::1", 5, 0, 0)) == "::1"


def test_a_taken_port_says_what_to_do() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(TermiteError, match=r"port 127\.0\.0\.1:\d+ is taken.*-port"),
    ):
        bind("127.0.0.1", taken.getsockname()[1], 0, 1)


def test_with_retries_the_next_free_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with bind("127.0.0.1", port, 20, 1) as sock:
            assert port < sock.getsockname()[1] <= port + 20


def test_every_address_means_ipv4_as_well() -> None:
    with bind("", 0, 0, 1) as sock, socket.create_connection(("127.0.0.1", sock.getsockname()[1])):
        pass


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(TermiteError, match=r"cannot listen on 192\.0\.2\.1"):
        bind("192.0.2.1", 0, 3, 1)
    with pytest.raises(TermiteError, match="cannot listen"):
        bind("127.0.0.1", 70000, 0, 1)
