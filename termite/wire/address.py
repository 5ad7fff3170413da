"""host:port as people write it, and the listening socket behind it.

IPv6 addresses stand in brackets when a port follows.  Addresses that the kernel shows as IPv4 in
IPv6 are written as plain IPv4 everywhere.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any

from termite.errors import TermiteError, UsageError


def parse_address(text: str, default_port: int) -> tuple[str, int]:
    """(host, port) of `host`, `host:1233`, `[::1]`, `[::1]:1233` or `::1`."""
    text = text.strip()
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not (rest == "" or rest.startswith(":")):
            raise UsageError(f"bad address {text!r}: give host, host:port or [IPv6]:port")
        port = rest[1:] if rest else ""
        has_port = bool(rest)
    elif text.count(":") > 1:
        host, port, has_port = text, "", False
        try:
            ipaddress.IPv6Address(text.partition("%")[0])
        except ValueError:
            raise UsageError(f"bad address {text!r}: give host, host:port or [IPv6]:port") from None
    else:
        host, colon, port = text.partition(":")
        has_port = bool(colon)
    if not host or any(c.isspace() or c in "/@[]" for c in host):
        raise UsageError(f"bad address {text!r}: give host, host:port or [IPv6]:port")
    if not has_port:
        return host, default_port
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UsageError(f"bad port in address {text!r}: give host:port with a port from 1 to 65535")
    return host, int(port)


def check_host(flag: str, text: str) -> None:
    """UsageError unless this is a host alone, without a port or brackets."""
    try:
        good = parse_address(text, 1) == (text, 1)
    except UsageError:
        good = False
    if not good:
        raise UsageError(f"{flag} {text!r}: give a name or an address of this machine, without a port")


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: Any) -> str:
    """The host in a socket address, as one to dial."""
    host: str = address[0]
    return host.removeprefix("::ffff:") if "." in host else host


def is_loopback(host: str) -> bool:
    """True for an address by which only this machine can be meant."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int, retries: int, backlog: int, flag: str = "-port") -> socket.socket:
    """Listening socket on the first free port of port ... port + retries; TermiteError with the remedy if none is."""
    addresses = _listen_addresses(host)
    failure: OSError | None = None
    for candidate in range(port, min(port + retries, 65535) + 1):
        for family, address in addresses:
            try:
                return _bind_one(family, (address, candidate), backlog)
            except OSError as exc:
                failure = exc
                if exc.errno == errno.EADDRINUSE:
                    break
        if failure is not None and failure.errno != errno.EADDRINUSE:
            break
    where = format_address(host or "*", port) + (f" to {port + retries}" if retries else "")
    if failure is not None and failure.errno == errno.EADDRINUSE:
        raise TermiteError(f"port {where} is taken; end the program that listens there or choose another {flag}")
    if failure is not None and failure.errno in (errno.EACCES, errno.EPERM):
        raise TermiteError(f"no permission to listen on {where}; choose a {flag} above 1023")
    reason = failure.strerror if failure is not None else "no such port"
    raise TermiteError(f"cannot listen on {where}: {reason}; choose an address of this machine and a port below 65536")


def _listen_addresses(host: str) -> list[tuple[int, str]]:
    if host in ("", "*"):
        return [(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise TermiteError(f"cannot listen on {host}: {exc.strerror}; give an address of this machine") from None
    return [(family, str(address[0])) for family, _, _, _, address in found]


def _bind_one(family: int, address: tuple[str, int], backlog: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Only "::" means IPv4 as well.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
        sock.bind(address)
        sock.listen(backlog)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock
