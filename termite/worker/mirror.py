"""A mirror process: one master's file system as its tasks see it, and the tasks.

Started by the worker's daemon (`spare.py`), which hands it an authenticated connection once there is one; ends
with that connection or with the daemon, whichever goes first.  It lives in a mount namespace of its own, so
when it dies, however it dies, the kernel takes its mounts away.

Threads: the event loop has the connection and all state; FUSE threads block on questions to the
master; one thread drops kernel caches, for the reason given in `mirror/forget.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import sys
from collections.abc import Awaitable, Sequence
from functools import partial

import msgspec

from termite import paths
from termite.attr.cache import AttrCache, Stale
from termite.attr.fileattr import ABSENT, FileAttr
from termite.errors import BoxError, Refused, StoreError, TermiteError, WireError
from termite.logs import start_logging
from termite.loop import be_woken_soon, loop_factory, settle_memory
from termite.mirror.box import BoxPlan
from termite.mirror.fuse import Mount, load_early
from termite.mirror.view import Owner, View
from termite.store.recent import RecentStore
from termite.web.counting import Timings
from termite.wire.framing import Session
from termite.wire.messages import (
    VERSION,
    Cancel,
    Change,
    DirListing,
    Draining,
    Failure,
    Fetch,
    Granted,
    Message,
    MirrorOpened,
    Ok,
    OpenMirror,
    Prefetch,
    ReadDir,
    Run,
    Status,
    StatusText,
    Update,
    Want,
)
from termite.wire.rpc import Connection, Reply, Result
from termite.worker import control
from termite.worker.ahead import Ahead
from termite.worker.boxes import FIRST_EXTRA, Boxes
from termite.worker.contents import QUESTION_LIMIT_S, Contents
from termite.worker.files import Files
from termite.worker.notifier import Notifier
from termite.worker.ownfiles import OwnFiles
from termite.worker.paranoia import Paranoia
from termite.worker.process import leave_signals_to_the_daemon, memory_used, own_namespace
from termite.worker.reporting import MirrorReport, Reporter, mirror_counts, task_reports
from termite.worker.runner import Runner
from termite.worker.scratch import Scratch, Sweeper
from termite.worker.slots import Turns
from termite.worker.task import TaskPlace
from termite.worker.watching import Watch

log = logging.getLogger(__name__)

QUIET_S = 3.0
"""A draining mirror without tasks waits this long for its master to close the connection, then does so itself."""

TASKS_BETWEEN_ENDS = 20
"""A mirror whose memory is over the bound runs at least this many tasks before it makes way for another."""


class Mirror:
    """All of one mirror process; made once the control channel has delivered `Start`."""

    def __init__(self, start: control.Start, control_socket: socket.socket, net_fd: int) -> None:
        self.start = start
        self.turns = Turns()
        self.timings = Timings()
        self._reporter = Reporter(self.report, self._tell_daemon)
        self.ended = asyncio.Event()
        self._control = control_socket
        self._net_fd = net_fd
        self._loop = asyncio.get_running_loop()
        self._store = RecentStore(start.store, start.store_bytes)
        self._cache = AttrCache()
        self._view: View | None = None
        self._mount: Mount | None = None
        self._plan: BoxPlan | None = None
        self._place: TaskPlace | None = None  # None: no template yet
        self._boxes: Boxes | None = None
        self._runner: Runner | None = None
        self._root = b""
        self.contents = Contents(self._store, self._tell_daemon)
        self._first_grant = asyncio.Event()
        self._paranoia = Paranoia(self._cache) if start.paranoia else None
        self._own = OwnFiles() if start.own_files else None
        self._files = Files(self.contents, self._cache, self._store, self._on_broken_store, self._paranoia, self._own)
        self._watch = Watch()
        self._notifier: Notifier | None = None  # None: not mounted yet
        self.conn: Connection

    def take(self, conn: Connection) -> None:
        """Before anything else: the master's connection."""
        self.conn = self._files.conn = conn

    # -- requests of the master ----------------------------------------------------------------------

    def handle(self, conn: Connection, message: Message, body: bytes) -> Result | Awaitable[Result]:
        """Dispatches one request; see `Handler` in wire/rpc.py."""
        match message:
            case Run():
                return self._run(message, self._apply(message.changes))
            case Update():
                return self._update(message)
            case Cancel():
                if self._runner is not None:
                    self._runner.cancel(message.task)
                return Ok()
            case Fetch() if self._runner is not None:
                return self._runner.results.fetch(message)
            case Want():
                self._tell_daemon(control.Wants(message.jobs, ""))
                return Ok()
            case OpenMirror():
                return self._open(message)
            case Prefetch():
                return self._prefetch(message)
            case Status():
                return StatusText(self.status())
            case _:
                return Failure("WireError", f"a mirror does not answer {type(message).__name__}")

    async def _open(self, message: OpenMirror) -> Message:
        if message.version != VERSION:
            raise Refused(f"the master speaks protocol {message.version}, this worker {VERSION}: update the older one")
        if self._mount is not None:
            raise WireError("OpenMirror came twice")
        self._root = paths.checked(message.root)
        self._view = View(
            self._cache,
            self._ask_dir,
            self._files.ask_file,
            owner=Owner(message.uid, message.gid, self.start.uid, self.start.gid),
            on_stale=self._forget_soon,
            place_of=self._place_of,
        )
        self._files.learn = self._view.learn
        mountpoint = os.path.join(self.start.directory, b"mnt")
        box_dir = os.path.join(self.start.directory, b"box")
        for directory in (mountpoint, box_dir):
            os.mkdir(directory, 0o755)
        scratch = Scratch(self.start.directory)
        self._store.use_memory(scratch.results)
        self._mount = Mount(self._view, mountpoint)
        self._notifier = Notifier(self._mount.forget)
        await asyncio.to_thread(self._mount.start)
        self._boxes = Boxes(self.start.mkbox)
        self._runner = Runner(
            self.conn, self._view, scratch, Sweeper(self.start.mkbox), self._store, self.turns, self.timings
        )
        host = message.master.partition("@")[2].partition(":")[0]
        self._plan = BoxPlan(
            mkbox=self.start.mkbox,
            mountpoint=mountpoint,
            box_dir=box_dir,
            root=self._root,
            uid=self.start.uid,
            gid=self.start.gid,
            host=host,
            net_fd=self._net_fd,
            sources=tuple(paths.checked(source) for source in message.sources),
        )
        self._tell_daemon(control.Wants(message.jobs, message.master))
        await self._make_template()
        await self._first_grant.wait()  # a master that hears of no slots looks for them elsewhere
        self._reporter.start()
        log.info("mirror of %s is mounted", message.master)
        return MirrorOpened(name=self.start.name, jobs=self.turns.granted, arch=self.start.arch)

    def _place_of(self, hash: bytes, size: int) -> bytes:
        """Where contents can be read that a command has just made; nowhere if each of them is to be looked at."""
        return self._store.place_of(hash, size) if self._paranoia is None else b""

    async def _make_template(self) -> None:
        assert self._plan is not None and self._boxes is not None
        await self._ask_dir_async(b"")
        top = dict(self._cache.listing(b"") or {})
        template = await asyncio.to_thread(self._plan.build, top)
        self._place = TaskPlace(
            boxes=self._boxes,
            watch=self._watch,
            argv=self._plan.task_argv(FIRST_EXTRA),
            template=template,
            root=self._root,
            uid=self.start.uid,
            gid=self.start.gid,
            lower=self._lower,
            known=self._cache.lookup,
            store=self._store,
            timings=self.timings,
        )

    # -- questions to the master ---------------------------------------------------------------------

    def _took_listing(self, path: bytes, message: Message, _body: bytes) -> None:
        if isinstance(message, DirListing) and self._view is not None:
            self._view.put_listing(path, message)
            if self._paranoia is not None:
                self._paranoia.after_change("a listing")

    async def _ask_dir_async(self, path: bytes) -> None:
        """Asks for a listing; it is in the cache when this returns, put there in the order of arrival."""
        await self.conn.call(ReadDir(path), timeout_s=QUESTION_LIMIT_S, on_reply=partial(self._took_listing, path))

    def _ask_dir(self, path: bytes) -> None:
        """Blocking; on FUSE threads."""
        asyncio.run_coroutine_threadsafe(self._ask_dir_async(path), self._loop).result(QUESTION_LIMIT_S + 5)

    def _on_broken_store(self, error: StoreError) -> None:
        """Every command would read "Input/output error" from here on; better that they run elsewhere."""
        log.error("%s", error)
        if self._runner is not None:
            self._runner.cancel_all(error)

    async def _prefetch(self, message: Prefetch) -> Message:
        if self._view is None:
            raise WireError("Prefetch came before OpenMirror")
        await Ahead(self._view, self._store, self._ask_dir_async, self._files.obtain).fetch(message.paths)
        return Ok()

    # -- changes ---------------------------------------------------------------------------------------

    async def _update(self, message: Update) -> Message:
        await self._forget(message.changes, self._apply(message.changes))
        return Ok()

    def _apply(self, changes: list[Change]) -> list[Stale]:
        """Takes news, in the order of arrival; returns what the kernel must forget."""
        stale = self._view.apply(changes) if self._view is not None else []
        if self._paranoia is not None:
            self._paranoia.after_change(f"{len(changes)} changes")
        return stale

    def _forget_soon(self, stale: Sequence[Stale]) -> None:
        """Called wherever a question's answer brought news."""
        if self._notifier is not None:
            self._notifier.add(stale)

    async def _forget(self, changes: list[Change], stale: list[Stale]) -> None:
        """Makes the kernel drop what it may hold; makes the template anew when the top level changed."""
        if self._notifier is not None:
            if stale:
                self._notifier.add(stale)
            try:
                await self._notifier.wait()
            except BoxError as e:
                self.drain(str(e), again=True)
                raise
        if any(change.path and b"/" not in change.path and change.path != self._root for change in changes):
            await self._make_template()

    # -- tasks -----------------------------------------------------------------------------------------

    async def _run(self, run: Run, stale: list[Stale]) -> Reply:
        if self._place is None or self._runner is None:
            raise WireError("Run came before OpenMirror")
        with self.timings.measure("news"):
            await self._forget(run.changes, stale)
        reply = await self._runner.run(run, self._place)
        has_heard = self._notifier is None or self._notifier.is_idle
        if self._paranoia is not None and self._mount is not None and has_heard:
            self._paranoia.after_task(self._mount.mountpoint)
        self._end_if_worn(self._runner.done)
        return reply

    def _lower(self, path: bytes) -> FileAttr:
        """What stands at a path beneath the overlays, as the master has it; asks if need be, so not on the loop."""
        attr = self._cache.lookup(path)
        if attr is None and self._view is not None:
            self._view.look(path)
            attr = self._cache.lookup(path)
        return attr if attr is not None else ABSENT

    # -- leaving ---------------------------------------------------------------------------------------

    def drain(self, reason: str, again: bool = False) -> None:
        """Takes no new tasks; the others are finished, their results fetched, then the master closes.

        `again`: only this mirror ends, and the master may open another one at once.
        """
        if self.turns.closed and again:
            return
        log.info("no new tasks: %s", reason)
        self.turns.close(reason)
        self.conn.notify(Draining(reason, again))
        self._loop.call_later(QUIET_S, self._end_if_quiet)

    def _end_if_quiet(self) -> None:
        """For a master that does not close by itself."""
        if self.turns.running or (self._runner is not None and self._runner.results):
            self._loop.call_later(QUIET_S, self._end_if_quiet)
        else:
            self.ended.set()

    def _end_if_worn(self, done: int) -> None:
        """Makes way for a fresh process after so many tasks, or when this one has become too large."""
        start = self.start
        if start.reap_count and done >= start.reap_count:
            self.drain(f"{done} tasks were run here, a fresh mirror takes over", again=True)
        elif start.heap_bytes and done >= TASKS_BETWEEN_ENDS and (used := memory_used()) > start.heap_bytes:
            self.drain(f"the mirror takes {used >> 20} MB of memory, a fresh one takes over", again=True)

    # -- the daemon --------------------------------------------------------------------------------------

    def _tell_daemon(self, message: control.ControlMessage) -> None:
        with contextlib.suppress(OSError):
            self._control.send(control.encode(message))

    def on_control(self) -> None:
        """A packet from the daemon, or its end."""
        try:
            packet = self._control.recv(control.MAX_PACKET)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self.ended.set()
            return
        message = control.decode(packet)
        if isinstance(message, control.Grant):
            self.turns.grant(message.jobs)
            self._first_grant.set()
            self.conn.notify(Granted(message.jobs))
        elif isinstance(message, control.Drain):
            self.drain(message.reason)
        elif isinstance(message, control.Got):
            self.contents.on_got(message)
        elif isinstance(message, control.Stop):
            log.info("told to end: %s", message.reason)
            self.ended.set()

    def status(self) -> bytes:
        counters = self._view.counts() if self._view is not None else {}
        return msgspec.json.encode(
            {
                "granted": self.turns.granted,
                "running": self.turns.running,
                "done": self._runner.done if self._runner is not None else 0,
                "fuse": counters,
                "bytes": self._bytes(),
            }
        )

    def _bytes(self) -> dict[str, int]:
        counts = self.contents.as_dict()
        counts["from_store"] += self._files.cached_bytes
        return {**counts, "from_own": self._own.bytes if self._own is not None else 0}

    def report(self) -> MirrorReport:
        """For the pages."""
        runner = self._runner
        result_bytes = runner.result_bytes if runner is not None else 0
        return MirrorReport(
            granted=self.turns.granted,
            running=self.turns.running,
            waiting=self.turns.waiting,
            done=runner.done if runner is not None else 0,
            tasks=task_reports(runner.tasks.items() if runner is not None else ()),
            phases=self.timings.phases(),
            counts=mirror_counts(self._files.cached, self._files.asked, result_bytes, self._bytes()),
            file_system=self._view.counts() if self._view is not None else {},
        )

    async def close(self) -> None:
        """Kills the tasks, unmounts, removes the directory; nothing is left."""
        if self._runner is not None:
            self._runner.cancel_all()
        await self.conn.close("the mirror ends")
        self._reporter.stop()
        if self._boxes is not None:
            await self._boxes.close()
        if self._runner is not None:
            self._runner.stop()
        self._watch.close()
        if self._notifier is not None:
            self._notifier.close()
        if self._mount is not None:
            await asyncio.to_thread(self._mount.stop)
        await asyncio.to_thread(self._clear_up)

    def _clear_up(self) -> None:
        if self._runner is not None:
            self._runner.close()
        try:
            self._store.close()
        except StoreError as e:
            log.warning("%s", e)
        shutil.rmtree(self.start.directory, ignore_errors=True)


async def serve(start: control.Start, connection: socket.socket, control_socket: socket.socket, net_fd: int) -> None:
    """Lives until the master or the daemon goes."""
    loop = asyncio.get_running_loop()
    mirror = Mirror(start, control_socket, net_fd)
    connection.setblocking(False)
    control_socket.setblocking(False)
    conn = await Connection.from_socket(
        connection,
        Session.restore(start.session),
        mirror.handle,
        name="the master",
        heartbeat_s=start.heartbeat_s,
        silence_limit_s=start.silence_limit_s,
    )
    mirror.take(conn)
    loop.add_reader(control_socket, mirror.on_control)
    lost = loop.create_task(mirror.conn.wait_closed())
    ended = loop.create_task(mirror.ended.wait())
    await asyncio.wait({lost, ended}, return_when=asyncio.FIRST_COMPLETED)
    if lost.done():
        log.info("the master is gone: %s", mirror.conn.close_reason)
    loop.remove_reader(control_socket)
    lost.cancel()
    ended.cancel()
    await mirror.close()


def main() -> None:
    """`python -m termite.worker.mirror CONTROL_FD`, by the daemon only; with `Start` come two descriptors."""
    own_namespace()
    leave_signals_to_the_daemon()
    be_woken_soon()
    load_early()
    settle_memory()
    control_socket = socket.socket(fileno=int(sys.argv[1]))
    packet, fds, _, _ = socket.recv_fds(control_socket, control.MAX_PACKET, 2)
    if not packet:
        return  # never needed
    start = control.decode(packet)
    if not isinstance(start, control.Start) or len(fds) != 2:
        raise SystemExit("the first control message must be Start, with a connection and a network namespace")
    connection, network = socket.socket(fileno=fds[0]), fds[1]
    name = os.path.basename(start.directory).decode()
    start_logging(start.logfile, start.log_level <= logging.DEBUG, prefix=f"{name} ")
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(serve(start, connection, control_socket, network))
    except TermiteError as e:
        log.error("%s", e)
        raise SystemExit(e.exit_status) from None


if __name__ == "__main__":
    main()
