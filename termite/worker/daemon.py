"""The worker: offers job slots, and gives each master a mirror process of its own.

Authenticates connections and hands them, still warm, to mirror processes; shares the slots among
them; tells the coordinators that it lives.  Knows nothing of files or tasks.  Loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import shutil
import signal
import socket
from array import array
from collections.abc import Coroutine
from dataclasses import dataclass, replace

import msgspec

from termite import __version__
from termite.errors import Leaving, Refused, TermiteError, WireError
from termite.mirror.network import load_early, make_network
from termite.store.local import ContentStore
from termite.web.logtail import LogTail
from termite.web.pages import PageServer, WebOptions
from termite.web.status import WorkerStatus
from termite.wire import transport
from termite.wire.address import is_loopback
from termite.wire.auth import Purpose
from termite.wire.coordination import CoordinatorLink
from termite.wire.framing import Session
from termite.wire.messages import Message, Peer, Register, WorkerCommand, WorkerInfo, WorkerReport
from termite.wire.rpc import Connection, Result
from termite.worker import control
from termite.worker.overview import MirrorFacts, Overview, WorkerFacts
from termite.worker.peers import Peers
from termite.worker.reporting import decode_report
from termite.worker.scratch import open_result
from termite.worker.slots import share
from termite.worker.spare import Spare
from termite.worker.workdir import WorkDir, clear_leftovers

log = logging.getLogger(__name__)

TRIM_EVERY_S = 30.0
WEB_OFFSET = 100
"""Our pages are this many ports above the one for masters, unless told otherwise."""

TURN_AWAY_S = 5.0
MIRROR_END_LIMIT_S = 10.0
"""How long a mirror process may take to clear up after itself before it is killed."""


@dataclass(frozen=True)
class WorkerOptions:
    key: bytes
    coordinators: list[tuple[str, int]]
    host: str  # address to listen on; empty: all
    port: int
    port_retry: int
    advertise: str  # address for masters to dial; empty: as the coordinator sees us
    jobs: int
    cachedir: str
    cache_bytes: int
    tmpdir: str
    uid: int  # of the tasks
    gid: int
    mkbox: str
    heartbeat_s: float = 2.0
    silence_limit_s: float = 10.0
    log_level: int = logging.INFO
    logfile: str = ""  # where the mirrors log; empty: stderr
    paranoia: bool = False
    own_files: bool = True  # large files come from this machine where they are the same
    heap_bytes: int = 0  # memory after which a mirror makes way for a fresh one; 0: no bound
    reap_count: int = 0  # tasks after which a mirror makes way for a fresh one; 0: no bound
    web: WebOptions | None = None  # None: no pages; its port -1: `WEB_OFFSET` above ours


class MirrorProcess:
    """The daemon's end of one mirror process."""

    def __init__(
        self, process: asyncio.subprocess.Process, channel: socket.socket, directory: str, host: str
    ) -> None:
        self.process = process
        self.channel = channel
        self.directory = directory
        self.host = host  # of the master
        self.wanted = 0
        self.granted = 0
        self.master = ""

    def send(self, message: control.ControlMessage, *fds: int) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        with contextlib.suppress(OSError):
            self.channel.sendmsg([control.encode(message)], rights)


class Worker:
    """`start`; then, when a person or the coordinator wants it to end, `drain` if there is time; then `stop`.

    `sock`: one that listens on our port already, from a predecessor or because its number had to be known.
    """

    def __init__(self, options: WorkerOptions, sock: socket.socket | None = None) -> None:
        self.options = options
        self.told = asyncio.Event()  # set once there is a `command`
        self.command = ""  # what the coordinator wants: "kill", "restart" or "kill-now"; empty: nothing
        self.draining = ""  # why no new tasks are taken; empty: they are
        self.peers: Peers | None = None
        self._sock = sock
        self._starting = 0  # mirror processes that are being started
        self._an_end = asyncio.Event()  # set whenever a mirror has ended
        self._info: WorkerInfo | None = None
        self.name = ""
        self.port = 0
        self._mirrors: dict[int, MirrorProcess] = {}
        self._serial = 0
        self._spare = Spare(lambda: self.overview.running > 0)
        self._tasks: set[asyncio.Task[object]] = set()
        self._links: list[CoordinatorLink] = []
        self._workdir: WorkDir | None = None
        self._store: ContentStore | None = None
        self._listener: transport.Listener | None = None
        self.overview = Overview(self._facts, self._tell_coordinators)
        self._log_tail = LogTail(options.logfile)
        self.pages = PageServer(None, self.overview.site(self._log_tail))

    async def start(self) -> None:
        """Clears what a predecessor left, opens the store, listens, registers."""
        clear_leftovers(self.options.tmpdir)
        self._store = ContentStore(os.fsencode(self.options.cachedir), self.options.cache_bytes)
        self._workdir = WorkDir(self.options.tmpdir)
        self._listener = await transport.listen(
            self.options.host,
            self.options.port,
            self.options.key,
            self._on_accepted,
            retries=self.options.port_retry,
            sock=self._sock,
            purposes={Purpose.MASTER_MIRROR, Purpose.PEER_FETCH},
        )
        self.peers = Peers(self._store, self.options.key, recent=self._open_recent)
        self.port = self._listener.port
        self.name = f"{socket.gethostname()}:{self.port}"
        self._start_pages()
        self._info = info = WorkerInfo(
            name=self.name,
            host=self.options.advertise,
            port=self.port,
            jobs=self.options.jobs,
            arch=platform.machine(),
            version=__version__,
            web_port=self.pages.port,
        )
        for host, port in self.options.coordinators:
            link = CoordinatorLink(
                *(host, port, self.options.key, Purpose.WORKER_REGISTER, Register(info=info)),
                on_message=self._on_message,
            )
            self._links.append(link)
            link.start()
        self._spare.prepare()
        self._spawn(self._trim_now_and_then())
        self._spawn(asyncio.to_thread(load_early))
        self._spawn(self.overview.watch())
        log.info("listening on port %d, %d slots", self.port, self.options.jobs)

    def _spawn(self, coroutine: Coroutine[object, object, object]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- pages -----------------------------------------------------------------------------------------

    def _start_pages(self) -> None:
        web = self.options.web
        if web is not None and web.port < 0:
            near = self.port + WEB_OFFSET
            web = replace(web, port=near if near <= 65535 else 0)
        self._log_tail.start()
        self.pages = PageServer(web, self.overview.site(self._log_tail))
        self.pages.start()

    def status(self) -> WorkerStatus:
        return self.overview.status()

    def _facts(self) -> WorkerFacts:
        return WorkerFacts(
            name=self.name,
            state=f"leaving: {self.draining}" if self.draining else "running",
            jobs=self.options.jobs,
            cache_dir=self.options.cachedir,
            cache_bytes=self._store.held_bytes if self._store is not None else 0,
            cache_limit=self.options.cache_bytes,
            coordinators=[link.trouble or f"{link.where}: connected" for link in self._links],
            mirrors={serial: MirrorFacts(m.master, m.wanted, m.granted) for serial, m in self._mirrors.items()},
        )

    def _tell_coordinators(self, report: WorkerReport) -> None:
        for link in self._links:
            link.tell(report)

    # -- leaving ---------------------------------------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        """From a coordinator."""
        if not isinstance(message, WorkerCommand):
            raise Refused(f"a worker does not serve {type(message).__name__}")
        self.on_command(message.kind)

    def on_command(self, kind: str) -> None:
        """"kill" and "restart" let the tasks finish, "kill-now" does not; Refused for anything else."""
        if kind not in ("kill", "restart", "kill-now"):
            raise Refused(f"a worker knows the commands kill, restart and kill-now, not {kind[:40]!r}")
        log.info("told by the coordinator: %s", kind)
        if self.command != "kill-now":
            self.command = kind
        self.told.set()

    async def drain(self, reason: str, limit_s: float) -> bool:
        """Takes no new tasks and waits for the others; False if some still ran at the limit."""
        self.draining = reason
        log.info("%s: no new tasks from now on, at most %g s for the others", reason, limit_s)
        assert self._info is not None
        leaving = Register(info=msgspec.structs.replace(self._info, jobs=0))
        for link in self._links:
            link.greet_anew(leaving)
        for mirror in self._mirrors.values():
            mirror.send(control.Drain(reason))
        try:
            async with asyncio.timeout(limit_s):
                while self._mirrors or self._starting:
                    self._an_end.clear()
                    await self._an_end.wait()
        except TimeoutError:
            log.warning("tasks for %d masters still ran after %g s and are ended", len(self._mirrors), limit_s)
            return False
        return True

    def keep_socket(self) -> socket.socket | None:
        """Before `stop`: the listening socket, for a successor; connections wait in it meanwhile."""
        return self._listener.duplicate() if self._listener is not None else None

    async def stop(self) -> None:
        """Ends the mirrors and removes everything but the content store."""
        for link in self._links:
            await link.stop()
        await self.pages.stop()
        self._log_tail.stop()
        if self._listener is not None:
            await self._listener.close()
        await asyncio.gather(self._spare.close(), *(self._end(mirror) for mirror in list(self._mirrors.values())))
        if self.peers is not None:
            await self.peers.close()
        for task in list(self._tasks):
            task.cancel()
        if self._workdir is not None:
            self._workdir.remove()

    async def _end(self, mirror: MirrorProcess) -> None:
        mirror.send(control.Stop("the worker stops"))
        try:
            await asyncio.wait_for(mirror.process.wait(), MIRROR_END_LIMIT_S)
        except TimeoutError:
            log.warning("a mirror did not end in %.0f s; killed", MIRROR_END_LIMIT_S)
            mirror.process.send_signal(signal.SIGKILL)
            await mirror.process.wait()

    async def _trim_now_and_then(self) -> None:
        assert self._store is not None
        while True:
            try:
                await asyncio.to_thread(self._store.trim)
            except TermiteError as e:
                log.warning("%s", e)
            await asyncio.sleep(TRIM_EVERY_S)

    # -- mirrors ---------------------------------------------------------------------------------------

    async def _on_accepted(self, accepted: transport.Accepted) -> None:
        assert self.peers is not None
        if accepted.purpose is Purpose.PEER_FETCH:
            await self.peers.serve(accepted)
        elif self.draining:
            await self._turn_away(accepted)
        else:
            self._starting += 1
            try:
                await self._on_master(accepted)
            finally:
                self._starting -= 1
                self._an_end.set()

    async def _turn_away(self, accepted: transport.Accepted) -> None:
        """Tells a master that comes too late why it had better go elsewhere."""

        def leaving(conn: Connection, message: Message, body: bytes) -> Result:
            raise Leaving(f"worker {self.name}: {self.draining}")

        conn = await accepted.connect(leaving)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(conn.wait_closed(), TURN_AWAY_S)
        await conn.close(self.draining)

    async def _on_master(self, accepted: transport.Accepted) -> None:
        """A master that has proven itself gets a mirror process, which takes the connection over."""
        assert self._workdir is not None
        self._serial += 1
        directory = os.path.join(self._workdir.path, f"mirror-{self._serial}")
        os.mkdir(directory, 0o755)
        network = make_network()
        try:
            process, channel = await self._spare.take()
            mirror = MirrorProcess(process, channel, directory, accepted.host)
            mirror.send(self._start_message(accepted.session, directory), accepted.sock.fileno(), network)
        finally:
            accepted.sock.close()
            os.close(network)
        if not self.draining:
            self._spare.prepare_later()
        self._mirrors[self._serial] = mirror
        log.info("mirror %d for %s", self._serial, accepted.address)
        self._spawn(self._watch(self._serial, mirror))
        if self.draining:
            mirror.send(control.Drain(self.draining))

    def _open_recent(self, hash: bytes) -> int:
        """What a command here has made lately, from the memory of its mirror; KeyError if none has it."""
        for mirror in self._mirrors.values():
            with contextlib.suppress(OSError):
                return open_result(mirror.process.pid, mirror.directory, hash)
        raise KeyError(hash)

    def _start_message(self, session: Session, directory: str) -> control.Start:
        return control.Start(
            name=self.name,
            session=session.export(),
            directory=os.fsencode(directory),
            store=os.fsencode(self.options.cachedir),
            store_bytes=self.options.cache_bytes,
            mkbox=os.fsencode(self.options.mkbox),
            uid=self.options.uid,
            gid=self.options.gid,
            jobs=self.options.jobs,
            arch=platform.machine(),
            heartbeat_s=self.options.heartbeat_s,
            silence_limit_s=self.options.silence_limit_s,
            log_level=self.options.log_level,
            logfile=self.options.logfile,
            paranoia=self.options.paranoia,
            own_files=self.options.own_files,
            heap_bytes=self.options.heap_bytes,
            reap_count=self.options.reap_count,
        )

    async def _watch(self, serial: int, mirror: MirrorProcess) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(mirror.channel, self._on_packet, serial, mirror)
        try:
            status = await mirror.process.wait()
        finally:
            while self._on_packet(serial, mirror):
                pass  # its last words
            loop.remove_reader(mirror.channel)
            mirror.channel.close()
            self._mirrors.pop(serial, None)
            self.overview.ended(serial)
        if status:
            log.warning("mirror %d of %s ended with status %d", serial, mirror.master or "?", status)
        else:
            log.info("mirror %d of %s ended", serial, mirror.master or "?")
        await asyncio.to_thread(_remove_tree, mirror.directory)
        self._an_end.set()
        self._share_slots()

    def _on_packet(self, serial: int, mirror: MirrorProcess) -> bool:
        """False if there was none."""
        try:
            packet = mirror.channel.recv(control.MAX_PACKET)
            if not packet:
                asyncio.get_running_loop().remove_reader(mirror.channel)
                return False
            message = control.decode(packet)
            if isinstance(message, control.Report):
                self.overview.reported(serial, decode_report(message))
        except (BlockingIOError, ConnectionError):
            return False
        except WireError as e:
            log.warning("%s", e)
            return True
        if isinstance(message, control.Wants):
            before = mirror.granted
            mirror.wanted = max(0, message.jobs)
            mirror.master = message.master or mirror.master
            self._share_slots()
            if mirror.granted == before:  # every wish is answered
                mirror.send(control.Grant(before))
        elif isinstance(message, control.Get):
            self._spawn(self._get(mirror, message))
        return True

    async def _get(self, mirror: MirrorProcess, message: control.Get) -> None:
        """Contents that a mirror needs, from other workers."""
        assert self.peers is not None
        found = False
        try:
            named = [Peer(_as_seen_from(host, mirror.host), port) for host, port in message.peers]
            found = await self.peers.get(message.hash, message.size, named)
        finally:
            mirror.send(control.Got(message.number, found))

    def _share_slots(self) -> None:
        granted = share(self.options.jobs, {serial: m.wanted for serial, m in self._mirrors.items()})
        for serial, jobs in granted.items():
            mirror = self._mirrors[serial]
            if mirror.granted != jobs:
                mirror.granted = jobs
                mirror.send(control.Grant(jobs))


def _as_seen_from(host: str, master: str) -> str:
    """A worker beside its master is known to it by a loopback address; others find it where they find the master."""
    return master if is_loopback(host) and not is_loopback(master) else host


def _remove_tree(directory: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
