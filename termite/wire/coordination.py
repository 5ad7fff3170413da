"""A connection to one coordinator, kept alive: workers register over it, masters get the list.

Losing it disturbs nothing: the last list stays in force, and right after a reconnection also the
workers that were known before stay in it for a while, because a coordinator that was restarted gets
to know them again only one by one.  One log line per change of state.  Loop only.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from termite.errors import AuthError, Refused, TermiteError, WireError
from termite.wire.address import format_address
from termite.wire.auth import HANDSHAKE_LIMIT_S, Purpose
from termite.wire.messages import Message, Ok, Register, Subscribe, WorkerInfo, Workers
from termite.wire.rpc import HEARTBEAT_S, SILENCE_LIMIT_S, Connection
from termite.wire.transport import dial

log = logging.getLogger(__name__)

OnWorkers = Callable[[list[WorkerInfo]], None]
OnMessage = Callable[[Message], None]


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """How long a link waits for what, in seconds."""

    answer_s: float = HANDSHAKE_LIMIT_S  # handshake; then the first answer
    retry_min_s: float = 0.2  # before the first attempt to get back
    retry_max_s: float = 3.0  # between attempts, at most
    retry_refused_s: float = 10.0  # after a wrong secret and the like, which only a person can mend
    settle_s: float = 8.0  # after a reconnection, for workers to come back as well
    heartbeat_s: float = HEARTBEAT_S
    silence_limit_s: float = SILENCE_LIMIT_S


class CoordinatorLink:
    """`start`, then `stop`.  `on_workers` is called with the whole list, now and whenever it changes;
    `on_message` with whatever else the coordinator says, and raises `Refused` for what it does not know."""

    def __init__(
        self,
        host: str,
        port: int,
        key: bytes,
        purpose: Purpose,
        greeting: Register | Subscribe,
        on_workers: OnWorkers | None = None,
        *,
        on_message: OnMessage | None = None,
        times: LinkTimes | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.where = format_address(host, port)
        self.connected = asyncio.Event()  # set while the coordinator knows us
        self._host = host
        self._port = port
        self._key = key
        self._purpose = purpose
        self._greeting = greeting
        self._on_workers = on_workers
        self._on_message = on_message
        self._times = times or LinkTimes()
        self._jitter = jitter
        self._conn: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self.trouble = f"coordinator {self.where} has not answered yet"  # why there is no connection; empty: there is
        self._state = ""  # as last logged: "", "reached", "lost", "refused"
        self._listed: list[WorkerInfo] = []  # as the coordinator sent it last
        self._believed: list[WorkerInfo] = []  # as on_workers was told
        self._settling: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<CoordinatorLink {self.where} {self._state or 'new'}, {len(self._believed)} workers>"

    def start(self) -> None:
        """Begin; failures are logged and tried again, never raised."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep(), name=f"coordinator {self.where}")

    def greet_anew(self, greeting: Register | Subscribe) -> None:
        """Says something else of us, now if there is a connection and on every later one."""
        self._greeting = greeting
        if self._conn is not None and self.connected.is_set():
            self._conn.notify(greeting)

    def tell(self, message: Message) -> None:
        """One way; dropped if the coordinator does not know us at the moment."""
        if self._conn is not None and self.connected.is_set():
            self._conn.notify(message)

    async def stop(self) -> None:
        """Leave the coordinator; it drops us at once."""
        self._stop_settling()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        conn, self._conn = self._conn, None
        if conn is not None:
            await conn.close("stopped")
        self.connected.clear()

    # -- staying connected ---------------------------------------------------------------------------

    async def _keep(self) -> None:
        delay = self._times.retry_min_s
        while True:
            try:
                conn = await self._greet()
            except (AuthError, Refused, WireError) as error:
                self._became("refused", error)
                await asyncio.sleep(self._spread(self._times.retry_refused_s))
                continue
            except (TermiteError, UnicodeError) as error:  # the latter: a name that no resolver takes
                self._became("lost", error)
                await asyncio.sleep(self._spread(delay))
                delay = min(2 * delay, self._times.retry_max_s)
                continue
            self._became("reached")
            self.connected.set()
            await conn.wait_closed()
            self.connected.clear()
            self._conn = None
            self._stop_settling()
            self._became("lost", conn.close_reason)
            delay = self._times.retry_min_s
            await asyncio.sleep(self._spread(delay))

    async def _greet(self) -> Connection:
        """A connection on which the coordinator has taken note of us."""
        times = self._times
        conn = self._conn = await dial(
            self._host,
            self._port,
            self._key,
            self._purpose,
            handler=self._handle,
            timeout_s=times.answer_s,
            name=f"coordinator {self.where}",
            heartbeat_s=times.heartbeat_s,
            silence_limit_s=times.silence_limit_s,
        )
        if self._state:
            self._settle()
        try:
            await conn.call(self._greeting, timeout_s=times.answer_s)
        except TermiteError:
            await conn.close("not understood")
            raise
        return conn

    def _spread(self, delay: float) -> float:
        """Many who lost the same coordinator shall not all come back in the same moment."""
        return delay * (0.75 + 0.5 * self._jitter())

    def _became(self, state: str, reason: object = "") -> None:
        if state == self._state:
            return
        text = str(reason)
        for known in (self.where, f"lost coordinator {self.where}:", " cannot be reached:"):
            text = text.removeprefix(known)
        text = text.strip()
        self.trouble = "" if state == "reached" else f"coordinator {self.where}: {text}"
        if state == "reached":
            log.info("coordinator %s %s", self.where, "back" if self._state else "reached")
        elif state == "refused":
            log.error(
                "coordinator %s refused: %s; trying again every %g s", self.where, text, self._times.retry_refused_s
            )
        elif self._state == "reached":
            log.warning("coordinator %s lost: %s; trying again", self.where, text)
        else:
            log.warning("coordinator %s is not there: %s; trying again", self.where, text)
        self._state = state

    # -- the list ------------------------------------------------------------------------------------

    def _handle(self, conn: Connection, message: Message, body: bytes) -> Message:
        if self._on_message is not None and not isinstance(message, Workers):
            self._on_message(message)
            return Ok()
        if not isinstance(message, Workers) or self._on_workers is None:
            raise Refused(f"{type(message).__name__} is not served here")
        self._listed = message.workers
        self._tell()
        return Ok()

    def _tell(self) -> None:
        listed = list(self._listed)
        if self._settling is not None:
            known = {(info.host, info.port) for info in listed}
            listed += [info for info in self._believed if (info.host, info.port) not in known]
        self._believed = listed
        if self._on_workers is not None:
            self._on_workers(list(listed))

    def _settle(self) -> None:
        self._stop_settling()
        loop = asyncio.get_running_loop()
        self._settling = loop.call_later(self._times.settle_s, self._settled)

    def _settled(self) -> None:
        self._settling = None
        if self._believed != self._listed:
            self._tell()

    def _stop_settling(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
