"""The master's end of one mirror: asks it to run commands, answers its questions about files.

One link is one connection to one worker.  It owns the list of changes that this mirror has not heard
of yet; they travel with the next task.  Loop only.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable

from termite import paths
from termite.attr.fileattr import FileAttr, signature_of
from termite.errors import Leaving, PathError, PeerLost, PrivateError, Refused, TermiteError, WireError
from termite.master.export import INLINE_BYTES, SMALL_HASH_BYTES, Export, read_and_hash, read_whole
from termite.master.paranoia import check_path
from termite.master.peers import PeerBook
from termite.master.reading import answer
from termite.master.task import Task
from termite.wire import transport
from termite.wire.auth import Purpose
from termite.wire.messages import (
    Cancel,
    Change,
    Check,
    Direct,
    Done,
    Draining,
    Elsewhere,
    Failure,
    Fetch,
    Fetched,
    FileInfo,
    Granted,
    Have,
    Message,
    MirrorOpened,
    Ok,
    OpenFile,
    OpenMirror,
    Output,
    Peer,
    Prefetch,
    ReadDir,
    Run,
    Want,
    WantStdin,
    WorkerInfo,
)
from termite.wire.rpc import Connection, FileBody, Reply, Result, Sink

log = logging.getLogger(__name__)

NEW_S = 120.0
"""How long a mirror is new: what it asks for then, the next one will ask for, too."""

MAX_PENDING = 200_000
"""A mirror that missed more changes than this is closed; a new one asks afresh."""

_READ_TRIES = 5


class MirrorLink:
    """`on_granted(link)` is called when the number of slots changed, `on_draining(link)` when the worker
    asks for no more tasks, `on_lost(link, reason)` once at the end."""

    def __init__(
        self,
        info: WorkerInfo,
        export: Export,
        on_granted: Callable[[MirrorLink], None],
        on_lost: Callable[[MirrorLink, str], None],
        on_draining: Callable[[MirrorLink], None] = lambda link: None,
        peers: PeerBook | None = None,
        is_settled: Callable[[], bool] = lambda: True,
    ) -> None:
        self.info = info
        self.granted = 0
        self.tasks: dict[int, Task] = {}
        self._export = export
        self._on_granted = on_granted
        self._on_lost = on_lost
        self._on_draining = on_draining
        self._peers = peers if peers is not None else PeerBook()
        self._is_settled = is_settled  # does the master know of everything that happened on its disk?
        self.draining: Draining | None = None  # what the worker said when it asked for no more tasks
        self._pending: list[Change] = []
        self._position: dict[bytes, int] = {}  # path -> its place in _pending
        self._conn: Connection | None = None
        self._opened = time.monotonic()
        self._watch: asyncio.Task[None] | None = None
        self.bytes_served = 0

    @property
    def name(self) -> str:
        return self.info.name

    async def open(self, key: bytes, hello: OpenMirror, *, heartbeat_s: float, silence_limit_s: float) -> None:
        """Dials the worker and opens a mirror there; raises a TermiteError if that fails."""
        self._conn = await transport.dial(
            self.info.host,
            self.info.port,
            key,
            Purpose.MASTER_MIRROR,
            handler=self._handle,
            name=f"worker {self.name}",
            heartbeat_s=heartbeat_s,
            silence_limit_s=silence_limit_s,
        )
        try:
            reply = await self._conn.call(hello, timeout_s=30)
            if not isinstance(reply.message, MirrorOpened):
                raise WireError(f"worker {self.name} answered OpenMirror with {type(reply.message).__name__}")
            self.granted = max(self.granted, reply.message.jobs)
        except BaseException:
            self._conn.abort("opening the mirror failed")
            raise
        self._watch = asyncio.get_running_loop().create_task(self._watch_end(self._conn))

    async def _watch_end(self, conn: Connection) -> None:
        await conn.wait_closed()
        self._on_lost(self, conn.close_reason)

    async def close(self, reason: str) -> None:
        if self._conn is not None:
            await self._conn.close(reason)

    def abort(self, reason: str) -> None:
        if self._conn is not None:
            self._conn.abort(reason)

    def want(self, jobs: int) -> None:
        """Asks for another number of slots; the answer comes as `Granted`."""
        if self._conn is not None:
            self._conn.notify(Want(jobs))

    @property
    def offset_ns(self) -> int:
        """Our clock minus the worker's; 0 if it cannot be told from measurement noise."""
        if self._conn is None:
            return 0
        offset = -self._conn.clock_offset_ns
        return offset if abs(offset) > self._conn.rtt_s * 1e9 + 2_000_000 else 0

    # -- changes -------------------------------------------------------------------------------------

    def queue(self, changes: list[Change]) -> None:
        """Changes for this mirror to hear of before its next task."""
        for change in changes:
            place = self._position.get(change.path)
            if place is not None and _may_replace(self._pending[place].attr, change.attr):
                self._pending[place] = change
            else:
                self._position[change.path] = len(self._pending)
                self._pending.append(change)
        if len(self._pending) > MAX_PENDING and not self.tasks:
            self.abort("it missed too many changes; a new mirror will ask afresh")

    def _take_pending(self) -> list[Change]:
        pending, self._pending, self._position = self._pending, [], {}
        return pending

    # -- tasks ---------------------------------------------------------------------------------------

    async def run(self, task: Task) -> tuple[Done, bytes]:
        """Runs the task there; PeerLost, BoxError or Refused mean that it may be tried elsewhere.

        The body of the answer has yet to be compared with the hashes in it, which `Replayer` does.
        """
        if self._conn is None:
            raise PeerLost(f"worker {self.name} is not connected")
        if self.draining is not None:
            raise Leaving(f"worker {self.name} takes no new tasks: {self.draining.reason}")
        request, direct = task.request, task.direct()
        argv, env, instead = request.argv, task.env, None
        if direct is not None:
            argv, env = [*argv[:-1], direct.script], direct.environment(env)
            task.note("no shell is needed for it")
            instead = Direct(direct.says, direct.argv, direct.directory, direct.moved, direct.moved_to)
        run = Run(
            task=task.id,
            program=request.program,
            argv=argv,
            env=env,
            cwd=task.cwd,
            umask=request.umask,
            merged=task.merged,
            stdin=task.has_stdin,
            changes=self._take_pending(),
            debug=task.debug,
            direct=instead,
        )
        self.tasks[task.id] = task
        task.sent_ns = time.time_ns()
        try:
            reply = await self._conn.call(run, timeout_s=None, compares=True)
        except asyncio.CancelledError:
            self._conn.notify(Cancel(task.id))
            raise
        finally:
            task.received_ns = time.time_ns()
            del self.tasks[task.id]
        if not isinstance(reply.message, Done):
            raise WireError(f"worker {self.name} answered Run with {type(reply.message).__name__}")
        assert isinstance(reply.body, bytes)
        for result in reply.message.files:
            if result.attr.size > INLINE_BYTES and result.attr.hash:
                self._peers.has(result.attr.hash, self.name, self._address, result.attr.size)
        return reply.message, reply.body

    @property
    def _address(self) -> Peer:
        return Peer(self.info.host, self.info.port)

    async def prefetch(self, wanted: list[bytes]) -> None:
        """Has the mirror fetch these directories and contents as far as it lacks them; cancelling stops it."""
        if self._conn is None:
            raise PeerLost(f"worker {self.name} is not connected")
        await self._conn.call(Prefetch(wanted), timeout_s=None)

    async def fetch(self, digest: bytes, path: bytes, sink: Sink) -> None:
        """Contents that a task left on the worker, streamed into `sink`."""
        if self._conn is None:
            raise PeerLost(f"worker {self.name} is not connected")
        await self._conn.call(Fetch(digest, path), timeout_s=None, sink=sink)

    # -- the mirror's questions ------------------------------------------------------------------------

    async def _handle_output(self, message: Output, body: bytes) -> Message:
        task = self.tasks.get(message.task)
        if task is not None:
            await task.output(message.stream, body)
        return Ok()

    async def _handle_stdin(self, message: WantStdin) -> Reply:
        task = self.tasks.get(message.task)
        return Reply(Ok(), await task.read_stdin() if task is not None else b"")

    def _handle(self, conn: Connection, message: Message, body: bytes) -> Result | Awaitable[Result]:
        match message:
            case ReadDir():
                return answer(self._export, message.path)
            case OpenFile():
                return self._open_file(message.path)
            case Fetch():
                return self._fetch(message)
            case Have():
                for digest in message.hashes:
                    self._peers.has(digest, self.name, self._address)
                return Ok()
            case Check():
                settled = self._is_settled() and message.path not in self._position
                return check_path(self._export, message.path, settled)
            case Draining():
                self.draining = message
                self._on_draining(self)
                return Ok()
            case Output():
                return self._handle_output(message, body)
            case WantStdin():
                return self._handle_stdin(message)
            case Granted():
                self.granted = message.jobs
                self._on_granted(self)
                return Ok()
            case _:
                return Failure("WireError", f"a master does not answer {type(message).__name__}")

    def _open_file(self, path: bytes) -> Result | Awaitable[Result]:
        try:
            fd, st = self._export.open_for_reading(path)
        except (OSError, PathError, PrivateError) as e:
            return _file_failure(path, e)
        if self._export.on_question is not None and time.monotonic() - self._opened < NEW_S:
            self._export.on_question(path)
        digest = self._export.known_hash(path, st)
        if digest and st.st_size > INLINE_BYTES:
            os.close(fd)
            return self._file_info(self._export.remember_hash(path, st, digest))
        if st.st_size > SMALL_HASH_BYTES:
            return self._open_large(path, fd, st)
        try:
            if digest and not self._export.hashes.is_racy(path):
                data = read_whole(fd, st)
            else:
                known = digest
                data, digest = read_and_hash(fd, st)
                self._export.hashes.count(path, st.st_size, again=bool(known))
        except Refused:
            return self._open_large(path, fd, st)  # written to just now: read it with more patience
        os.close(fd)
        attr = self._export.remember_hash(path, st, digest)
        if len(data) > INLINE_BYTES:
            return FileInfo(attr)
        self.bytes_served += len(data)
        self._export.served.add(len(data))
        return Reply(FileInfo(attr, inline=True), data)

    def _file_info(self, attr: FileAttr) -> Result:
        """The answer for a file that does not travel with it."""
        manifest = self._export.hashes.manifests.get(attr.hash)
        return FileInfo(attr) if manifest is None else Reply(FileInfo(attr, pieces=True), manifest.encode())

    async def _open_large(self, path: bytes, fd: int, st: os.stat_result) -> Result:
        """Hashes on a thread, again if the file was written to meanwhile."""
        try:
            for attempt in range(_READ_TRIES):
                digest = self._export.known_hash(path, st)
                if not digest:
                    digest = await asyncio.to_thread(self._export.hashes.hash_contents, path, fd, st.st_size)
                    self._export.hashes.count(path, st.st_size)
                after = os.fstat(fd)
                if signature_of(after) == signature_of(st):
                    return self._file_info(self._export.remember_hash(path, st, digest))
                st = after
                await asyncio.sleep(0.02 * 2**attempt)
        except OSError as e:
            return _file_failure(path, e)
        finally:
            os.close(fd)
        return Failure("Refused", f"{paths.for_people(paths.absolute(path))} keeps changing while it is read")

    async def _fetch(self, message: Fetch) -> Result:
        """Contents by hash, or who else has them."""
        peers = await self._peers.elsewhere(message.hash, self.name, message.failed)
        return Elsewhere(peers) if peers else self._serve_contents(message)

    def _serve_contents(self, message: Fetch) -> Result:
        """Only of a file that was hashed and has not changed since."""
        path = message.path or self._export.path_of(message.hash)
        if path is None:
            return Failure("Refused", f"no file with contents {message.hash.hex()[:16]} is known here")
        try:
            fd, st = self._export.open_for_reading(path)
        except (OSError, PathError, PrivateError) as e:
            return _file_failure(path, e)
        start, size = self._where(message, self._export.known_hash(path, st), st.st_size)
        if message.offset > size:
            os.close(fd)
            return Failure("Refused", f"{paths.for_people(paths.absolute(path))} has other contents now")
        left = size - message.offset
        self.bytes_served += left
        self._export.served.add(left)
        self._peers.fetching(message.hash, self.name, size)
        return Reply(Fetched(size), FileBody(fd, start + message.offset, left))

    def _where(self, message: Fetch, digest: bytes, size: int) -> tuple[int, int]:
        """(offset, length) in a file of this hash and size of what is asked for; length -1: it is not there."""
        if message.piece < 0:
            return (0, size) if digest == message.hash else (0, -1)
        manifest = self._export.hashes.manifests.get(digest)
        if manifest is None or manifest.pieces[message.piece : message.piece + 1] != (message.hash,):
            return 0, -1
        return manifest.range_of(message.piece)


def _may_replace(old: FileAttr, new: FileAttr) -> bool:
    """A directory's removal must not be hidden by what comes to stand there later."""
    return old.exists() and not old.is_dir() and not new.is_dir()


def _file_failure(path: bytes, error: Exception) -> Failure:
    if isinstance(error, TermiteError):
        return Failure(type(error).__name__, str(error))
    code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    return Failure("Refused", f"{paths.for_people(paths.absolute(path))}: {os.strerror(code)}")
