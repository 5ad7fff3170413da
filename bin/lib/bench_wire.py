"""Carries packets between emulated hosts, each half a round trip after it was sent: a proxy that only delays.

Every host's network device is a tun device whose other end is a descriptor of this process; so all protocols are
delayed alike, and no device is made outside the hosts' namespaces.  Nothing is lost or slowed down but by being late.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections import deque

_DESTINATION = slice(16, 20)
"""Where an IPv4 header holds the address that the packet goes to."""
_MAX_PACKET = 65536
_AT_ONCE = 64
"""Packets to take from one host before the next has its turn."""


class Wire:
    """`ends`: each host's address, four bytes, and its descriptor, which does not block."""

    def __init__(self, ends: dict[bytes, int], delay_s: float) -> None:
        self._ends = ends
        self._delay_s = delay_s
        self._under_way: deque[tuple[float, int, bytes]] = deque()  # due, to which descriptor, packet

    def carry(self, limit_s: float) -> None:
        """Waits at most that long for something to do, and does it."""
        if self._under_way:
            limit_s = min(limit_s, max(0.0, self._under_way[0][0] - time.monotonic()))
        ready, _, _ = select.select(list(self._ends.values()), [], [], limit_s)  # finer than epoll's milliseconds
        for fd in ready:
            self._take(fd)
        self._deliver(time.monotonic())

    def _take(self, fd: int) -> None:
        for _ in range(_AT_ONCE):
            try:
                packet = os.read(fd, _MAX_PACKET)
            except BlockingIOError:
                return
            to = self._ends.get(packet[_DESTINATION])
            if to is not None:
                self._under_way.append((time.monotonic() + self._delay_s, to, packet))

    def _deliver(self, now: float) -> None:
        while self._under_way and self._under_way[0][0] <= now:
            _, to, packet = self._under_way.popleft()
            try:
                os.write(to, packet)
            except OSError:
                pass  # full or down: the packet is lost, as on a real wire


def main(argv: list[str]) -> None:
    """DELAY ADDRESS=DESCRIPTOR...; runs until it is killed."""
    ends: dict[bytes, int] = {}
    for end in argv[1:]:
        address, _, fd = end.partition("=")
        ends[socket.inet_aton(address)] = int(fd)
    wire = Wire(ends, float(argv[0]))
    parent = os.getppid()
    while os.getppid() == parent:
        wire.carry(1.0)


if __name__ == "__main__":
    main(sys.argv[1:])
