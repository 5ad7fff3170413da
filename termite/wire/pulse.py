"""How far away the peer is and what its clock says, from pings and pongs.

Both clocks come in as arguments.  A pong echoes the ping and adds the peer's wall clock; the sample
with the smallest round trip among the recent ones is the one least disturbed by queues, so it alone
gives `rtt_s` and `clock_offset_ns`.
"""

from __future__ import annotations

import struct
from collections import deque

from termite.errors import WireError

_PING = struct.Struct("<Q")
_PONG = struct.Struct("<QQ")
_RECENT = 16


class Pulse:
    def __init__(self) -> None:
        self._samples: deque[tuple[int, int]] = deque(maxlen=_RECENT)  # (round trip ns, offset ns)
        self.rtt_s = 0.0  # 0: not measured yet
        self.clock_offset_ns = 0  # the peer's wall clock minus ours; 0 until measured

    def __len__(self) -> int:
        return len(self._samples)

    @staticmethod
    def ping(monotonic_ns: int) -> bytes:
        return _PING.pack(monotonic_ns)

    @staticmethod
    def pong(ping: memoryview, wall_ns: int) -> bytes:
        if len(ping) != _PING.size:
            raise WireError(f"ping of {len(ping)} bytes")
        return _PONG.pack(_PING.unpack(ping)[0], wall_ns)

    def heard(self, pong: memoryview, monotonic_ns: int, wall_ns: int) -> None:
        """Take a sample in; the clocks are those of now."""
        if len(pong) != _PONG.size:
            raise WireError(f"pong of {len(pong)} bytes")
        asked_ns, peer_ns = _PONG.unpack(pong)
        rtt_ns = monotonic_ns - asked_ns
        if rtt_ns < 0:
            raise WireError("pong for a ping that was never sent")
        self._samples.append((rtt_ns, peer_ns - (wall_ns - rtt_ns // 2)))
        best_rtt_ns, self.clock_offset_ns = min(self._samples)
        self.rtt_s = best_rtt_ns / 1e9
