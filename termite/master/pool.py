"""Which worker gets the next task.

A plain object: no I/O, no clock, no connection.  It is told what happens (the list of workers,
mirrors opened and lost, slots granted, tasks started and ended) and answers what to do next
(`pick`, `to_open`, `to_ask`, `to_release`).  Loop only.

How it chooses: fill a worker before opening the next one, because a warm cache beats an idle core;
then keep one task waiting per running one, so that the network's delay is hidden; never ask for more
slots in total than `jobs`.  A worker that failed is left alone for a while, twice as long each time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from termite.wire.messages import WorkerInfo

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
LEAVING_PAUSE_S = 1.0
"""How long a worker that said it leaves is left alone, should the coordinator still list it."""


class State(Enum):
    """Of our relation to one worker."""

    CLOSED = "closed"  # no mirror there
    OPENING = "opening"  # a mirror was asked for
    OPEN = "open"  # a mirror is there, with `granted` slots


@dataclass
class Member:
    """One worker as the pool sees it."""

    info: WorkerInfo
    state: State = State.CLOSED
    listed: bool = True  # False: the coordinator no longer lists it; its mirror may still live
    wanted: int = 0  # slots asked for
    granted: int = 0  # slots the worker gave
    running: int = 0  # tasks sent and not yet answered
    idle_since: float = 0.0
    failures: int = 0  # in a row
    paused_until: float = 0.0
    done: int = 0  # tasks answered, for the status page
    draining: bool = False  # it asked for no more tasks

    def free(self) -> int:
        return self.granted - self.running if self.state is State.OPEN and not self.draining else 0


@dataclass
class Pool:
    """`jobs`: slots to hold at most, over all workers.  Times are seconds of any one clock."""

    jobs: int
    arch: str
    keepalive_s: float = 60.0
    members: dict[str, Member] = field(default_factory=dict)

    def set_workers(self, infos: list[WorkerInfo]) -> None:
        """The coordinator's list, whole.  Workers of another architecture, and those that leave, are left out."""
        listed = {info.name: info for info in infos if info.arch == self.arch and info.jobs > 0}
        for name, info in listed.items():
            member = self.members.get(name)
            if member is None:
                self.members[name] = Member(info)
            else:
                member.info = info
                member.listed = True
        for name in [n for n in self.members if n not in listed]:
            self.members[name].listed = False
            if self.members[name].state is State.CLOSED:
                del self.members[name]

    def pick(self, avoid: frozenset[str] = frozenset(), prefer: str = "") -> str | None:
        """The worker to send a task to now, or None if all slots and their one-deep queues are full.

        `prefer` (a worker's name) is obeyed while that worker is open; `avoid` are those where the
        task was lost already: they are taken only when nothing else is known.
        """
        candidates = [m for m in self.members.values() if m.state is State.OPEN and m.granted > 0 and not m.draining]
        fresh = [m for m in candidates if m.info.name not in avoid]
        if not fresh and any(m.listed and m.info.name not in avoid for m in self.members.values()):
            return None  # another one can be opened
        candidates = fresh or candidates
        chosen = next((m for m in candidates if m.info.name == prefer), None)
        if chosen is not None and chosen.running < 2 * chosen.granted:
            return prefer
        with_room = [m for m in candidates if m.free() > 0]
        if with_room:
            # The fullest first: leave whole workers idle rather than all of them half warm.
            return min(with_room, key=lambda m: (m.free(), m.info.name)).info.name
        if self._may_grow(avoid):
            return None
        queueing = [m for m in candidates if m.running < 2 * m.granted]
        if queueing:
            return min(queueing, key=lambda m: (m.running / m.granted, m.info.name)).info.name
        return None

    def _may_grow(self, avoid: frozenset[str]) -> bool:
        """True while another slot is on its way, so that a task had better wait a moment."""
        return any(m.state is State.OPENING and m.info.name not in avoid for m in self.members.values())

    def _held(self) -> int:
        members = (m for m in self.members.values() if not m.draining)
        return sum(m.wanted if m.state is State.OPENING else m.granted for m in members)

    def running(self) -> int:
        """Tasks sent and not yet answered, those that queue with them, to compare with the slots that are held."""
        return sum(m.running for m in self.members.values() if not m.draining)

    def to_open(self, need: int, now: float) -> tuple[WorkerInfo, int] | None:
        """(worker, slots) to open a mirror on, given how many tasks run or wait; None if none is of use."""
        missing = min(need, self.jobs) - self._held()
        if missing <= 0:
            return None
        closed = [
            m
            for m in self.members.values()
            if m.state is State.CLOSED and m.listed and m.paused_until <= now and m.info.jobs > 0
        ]
        if not closed:
            return None
        member = max(closed, key=lambda m: (min(m.info.jobs, missing), m.info.name))
        member.state = State.OPENING
        member.wanted = min(member.info.jobs, self.jobs)
        return member.info, member.wanted

    def to_ask(self, need: int) -> tuple[str, int] | None:
        """(worker, slots) whose mirror is open and should be asked for more, or None."""
        missing = min(need, self.jobs) - self._held()
        if missing <= 0:
            return None
        for member in self.members.values():
            room = min(member.info.jobs, self.jobs)
            if member.state is State.OPEN and member.listed and not member.draining and member.wanted < room:
                member.wanted = room
                return member.info.name, room
        return None

    def to_release(self, now: float) -> list[str]:
        """Mirrors that were idle for the keepalive time: their slots are to be given back."""
        idle = [
            m
            for m in self.members.values()
            if m.state is State.OPEN and m.wanted > 0 and m.running == 0 and now - m.idle_since >= self.keepalive_s
        ]
        for member in idle:
            member.wanted = 0
        return [m.info.name for m in idle]

    # -- what happened -------------------------------------------------------------------------------

    def opened(self, name: str, granted: int, now: float) -> None:
        member = self.members[name]
        member.state = State.OPEN
        member.draining = False
        member.granted = granted
        member.failures = 0
        member.idle_since = now

    def granted(self, name: str, jobs: int) -> None:
        self.members[name].granted = jobs

    def lost(self, name: str, now: float) -> None:
        """The mirror could not be opened, or its connection ended."""
        member = self.members.get(name)
        if member is None:
            return
        member.state = State.CLOSED
        member.draining = False
        member.granted = member.wanted = member.running = 0
        member.failures += 1
        member.paused_until = now + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (member.failures - 1))
        if not member.listed:
            del self.members[name]

    def drains(self, name: str) -> bool:
        """The worker asked for no more tasks; True if none of ours is left there, so that it can be closed."""
        member = self.members[name]
        member.draining = True
        return member.running == 0

    def left(self, name: str, now: float, again: bool) -> None:
        """A drained mirror has ended as agreed: no failure.  `again`: another one may be opened at once."""
        member = self.members.get(name)
        if member is None:
            return
        member.state = State.CLOSED
        member.draining = False
        member.granted = member.wanted = member.running = 0
        member.paused_until = now if again else now + LEAVING_PAUSE_S
        if not member.listed:
            del self.members[name]

    def started(self, name: str) -> None:
        self.members[name].running += 1

    def ended(self, name: str, now: float) -> None:
        member = self.members.get(name)
        if member is not None and member.running > 0:
            member.running -= 1
            member.done += 1
            if member.running == 0:
                member.idle_since = now

    # -- questions -----------------------------------------------------------------------------------

    def is_hopeless(self) -> bool:
        """True if no worker is open or opening and none is listed: nothing can be hoped for now."""
        return not any(m.listed or (m.state is not State.CLOSED and not m.draining) for m in self.members.values())

    def all_paused(self, now: float) -> bool:
        """True if every worker that is known has failed and is being left alone."""
        return all(m.state is State.CLOSED and m.paused_until > now for m in self.members.values())

    def check(self) -> None:
        """Asserts the invariants."""
        for name, member in self.members.items():
            assert member.info.name == name
            assert member.running >= 0
            if member.state is State.CLOSED:
                assert member.granted == 0 and member.running == 0, name
                assert member.listed, f"{name} is neither listed nor open"
