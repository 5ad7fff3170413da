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
import sys
from collections.abc import Coroutine
from dataclasses import dataclass

from termite import __version__
from termite.errors import TermiteError, WireError
from termite.mirror.network import make_network
from termite.store.local import ContentStore
from termite.wire import transport
from termite.wire.auth import Purpose
from termite.wire.coordination import CoordinatorLink
from termite.wire.framing import Session
from termite.wire.messages import Register, WorkerInfo
from termite.worker import control
from termite.worker.slots import share
from termite.worker.workdir import WorkDir, clear_leftovers

log = logging.getLogger(__name__)

TRIM_EVERY_S = 30.0
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


class MirrorProcess:
    """The daemon's end of one mirror process."""

    def __init__(self, process: asyncio.subprocess.Process, channel: socket.socket, directory: str) -> None:
        self.process = process
        self.channel = channel
        self.directory = directory
        self.wanted = 0
        self.granted = 0
        self.master = ""

    def send(self, message: control.ControlMessage) -> None:
        with contextlib.suppress(OSError):
            self.channel.send(control.encode(message))


class Worker:
    """`start`, then `stop`."""

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options
        self.name = ""
        self.port = 0
        self._mirrors: dict[int, MirrorProcess] = {}
        self._serial = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: list[CoordinatorLink] = []
        self._workdir: WorkDir | None = None
        self._store: ContentStore | None = None
        self._listener: transport.Listener | None = None

    async def start(self) -> None:
        """Clears what a predecessor left, opens the store, listens, registers."""
        clear_leftovers(self.options.tmpdir)
        self._store = ContentStore(os.fsencode(self.options.cachedir), self.options.cache_bytes)
        self._workdir = WorkDir(self.options.tmpdir)
        self._listener = await transport.listen(
            self.options.host,
            self.options.port,
            self.options.key,
            self._on_master,
            retries=self.options.port_retry,
            purposes={Purpose.MASTER_MIRROR},
        )
        self.port = self._listener.port
        self.name = f"{socket.gethostname()}:{self.port}"
        info = WorkerInfo(
            name=self.name,
            host=self.options.advertise,
            port=self.port,
            jobs=self.options.jobs,
            arch=platform.machine(),
            version=__version__,
        )
        for host, port in self.options.coordinators:
            link = CoordinatorLink(host, port, self.options.key, Purpose.WORKER_REGISTER, Register(info=info))
            self._links.append(link)
            link.start()
        self._spawn(self._trim_now_and_then())
        log.info("listening on port %d, %d slots", self.port, self.options.jobs)

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Ends the mirrors and removes everything but the content store."""
        for link in self._links:
            await link.stop()
        if self._listener is not None:
            await self._listener.close()
        await asyncio.gather(*(self._end(mirror) for mirror in list(self._mirrors.values())))
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

    async def _on_master(self, accepted: transport.Accepted) -> None:
        """A master that has proven itself gets a mirror process, which takes the connection over."""
        assert self._workdir is not None
        self._serial += 1
        directory = os.path.join(self._workdir.path, f"mirror-{self._serial}")
        os.mkdir(directory, 0o755)
        ours, theirs = control.pair()
        network = make_network()
        inherited = (accepted.sock.fileno(), theirs.fileno(), network)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "termite.worker.mirror"),
                *(str(fd) for fd in inherited),
                pass_fds=inherited,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                env={**_python_environment(), "PATH": os.defpath},
            )
        finally:
            accepted.sock.close()
            theirs.close()
            os.close(network)
        ours.setblocking(False)
        mirror = MirrorProcess(process, ours, directory)
        mirror.send(self._start_message(accepted.session, directory))
        self._mirrors[self._serial] = mirror
        log.info("mirror %d for %s", self._serial, accepted.address)
        self._spawn(self._watch(self._serial, mirror))

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
        )

    async def _watch(self, serial: int, mirror: MirrorProcess) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(mirror.channel, self._on_packet, mirror)
        try:
            status = await mirror.process.wait()
        finally:
            loop.remove_reader(mirror.channel)
            mirror.channel.close()
            self._mirrors.pop(serial, None)
        if status:
            log.warning("mirror %d of %s ended with status %d", serial, mirror.master or "?", status)
        else:
            log.info("mirror %d of %s ended", serial, mirror.master or "?")
        await asyncio.to_thread(_remove_tree, mirror.directory)
        self._share_slots()

    def _on_packet(self, mirror: MirrorProcess) -> None:
        try:
            packet = mirror.channel.recv(control.MAX_PACKET)
            if not packet:
                asyncio.get_running_loop().remove_reader(mirror.channel)
                return
            message = control.decode(packet)
        except (BlockingIOError, ConnectionError):
            return
        except WireError as e:
            log.warning("%s", e)
            return
        if isinstance(message, control.Wants):
            mirror.wanted = max(0, message.jobs)
            mirror.master = message.master or mirror.master
            self._share_slots()

    def _share_slots(self) -> None:
        granted = share(self.options.jobs, {serial: m.wanted for serial, m in self._mirrors.items()})
        for serial, jobs in granted.items():
            mirror = self._mirrors[serial]
            if mirror.granted != jobs:
                mirror.granted = jobs
                mirror.send(control.Grant(jobs))


def _python_environment() -> dict[str, str]:
    """What a child interpreter needs to find this very package, and nothing else of ours."""
    return {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONDONTWRITEBYTECODE": "1"}


def _remove_tree(directory: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
