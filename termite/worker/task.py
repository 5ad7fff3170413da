"""Runs one command in a box and tells what it changed.

Starts mkbox, passes its output on while it runs, waits for its end through a pidfd, reaps the
overlay.  A task that is cancelled kills its box.  Loop only; a large result is reaped on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from termite.attr.fileattr import FileAttr
from termite.errors import BoxError, Canceled, TermiteError
from termite.mirror.box import Template, box_environment
from termite.mirror.overlay import NotAtOnce, Reaped, reap, reap_at_once
from termite.store.local import ContentStore
from termite.web.counting import Timings
from termite.wire.messages import Done, Output, Run
from termite.wire.rpc import Reply
from termite.worker.boxes import Boxes
from termite.worker.stdin import waits_for
from termite.worker.watching import Watch

log = logging.getLogger(__name__)

PIECE = 256 << 10
BACKLOG_BYTES = 4 << 20
"""A command that writes faster than its output is taken waits, once this much is waiting."""

STREAM_AFTER_S = 0.3
"""Output older than this is passed on while the command still runs."""

FINAL_BYTES = 256 << 10
"""Up to this much output travels with the answer itself."""

FIRST_LOOK_S, LAST_LOOK_S = 0.002, 0.05
"""How soon, and then how often, we look whether a command waits for its stdin."""

_STATUS = struct.Struct("<iQ")

Send = Callable[[Output, bytes], Awaitable[object]]
Stdin = Callable[[], Awaitable[bytes]]


class Stream:
    """One of a command's output pipes."""

    def __init__(self, number: int, task: TaskRun, skip: int) -> None:
        self.number = number
        self._skip = skip  # bytes that were sent before, by an earlier run
        self.read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.read_fd, False)
        self.waiting = bytearray()
        self._task = task
        self._watched = False

    def watch(self) -> None:
        """Begins to read; the writing end now belongs to the command alone."""
        os.close(self.write_fd)
        self.write_fd = -1
        self.resume()

    def resume(self) -> None:
        if not self._watched and self.read_fd >= 0:
            self._task.watch.add(self.read_fd, self._readable)
            self._watched = True

    def pause(self) -> None:
        if self._watched:
            self._task.watch.remove(self.read_fd)
            self._watched = False

    def _readable(self) -> None:
        try:
            piece = os.read(self.read_fd, PIECE)
        except BlockingIOError:
            return
        if not piece:
            self.pause()
            return
        self._take(piece)
        self._task.output_waits()
        if len(self.waiting) >= BACKLOG_BYTES:
            self.pause()

    def drain(self) -> None:
        """Everything that is left, once nobody writes any more."""
        self.pause()
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.read_fd, PIECE):
                self._take(piece)
        self.close()

    def _take(self, piece: bytes) -> None:
        skipped = min(self._skip, len(piece))
        self._skip -= skipped
        self.waiting += piece[skipped:] if skipped else piece

    def close(self) -> None:
        self.pause()
        for fd in (self.read_fd, self.write_fd):
            if fd >= 0:
                os.close(fd)
        self.read_fd = self.write_fd = -1


@dataclass(frozen=True)
class TaskPlace:
    """What a mirror gives its tasks, the same for all of them until its template changes."""

    boxes: Boxes
    watch: Watch
    argv: list[bytes]  # mkbox's, from BoxPlan.task_argv
    template: Template
    root: bytes
    uid: int
    gid: int
    lower: Callable[[bytes], FileAttr]  # what stands at a path beneath the overlay; may block
    known: Callable[[bytes], FileAttr | None]  # the same, or None if it would have to be asked for
    store: ContentStore
    timings: Timings = field(default_factory=Timings)


class TaskRun:
    """One run; `run` may be called once.

    `expected`: directories that the command will probably change, from `Habits`.
    `skip`: bytes of stdout and stderr (by number) that an earlier run of the same task has sent.
    """

    def __init__(
        self,
        run: Run,
        place: TaskPlace,
        directory: bytes,
        root_attr: FileAttr,
        expected: Sequence[tuple[bytes, FileAttr]],
        send: Send,
        stdin: Stdin,
        skip: list[int],
    ) -> None:
        self.request = run
        self.sent = list(skip)  # by stream number, over all runs of this task
        self.stdin_read = False
        self.started = time.monotonic()
        self._place = place
        self.watch = place.watch
        self.directory = directory
        self._looks = [(b"u", root_attr), *((b"u/" + path, attr) for path, attr in expected)]
        self._send = send
        self._stdin = stdin
        self._skip = skip
        self._streams: list[Stream] = []
        self._pump: asyncio.Task[None] | None = None
        self._stream_timer: asyncio.TimerHandle | None = None
        self._feeder: asyncio.Task[None] | None = None
        self._box = 0  # 0: not started, or ended
        self._trouble = ""  # why the box could not be started
        self._ended_by: TermiteError | None = None  # why it was ended from outside

    async def run(self) -> tuple[Reply, Reaped]:
        """The answer to `Run`, and what was reaped; BoxError if the command was never started."""
        self._make_directory()
        started_ns = time.time_ns()
        timings = self._place.timings
        with timings.measure("run"):
            status, cpu_us = await self._run_box()
        ended_ns = time.time_ns()
        with timings.measure("reap"):
            reaped = await self._reap()
        with timings.measure("output"):
            await self._finish_output()
        done = Done(
            status=status,
            files=reaped.files,
            stdout=self._rest(1),
            stderr=self._rest(2),
            started_ns=started_ns,
            ended_ns=ended_ns,
            cpu_us=cpu_us,
        )
        return Reply(done, reaped.body, hashed=True), reaped

    def cancel(self, reason: TermiteError | None = None) -> None:
        """Ends the command now, with everything it started; `run` raises the reason."""
        self._ended_by = self._ended_by or reason or Canceled("cancelled")
        if self._box:
            self._place.boxes.kill(self._box)

    # -- before ----------------------------------------------------------------------------------------

    def _make_directory(self) -> None:
        """The overlay's directories; in the upper one each looks like what it stands for."""
        try:
            os.mkdir(self.directory, 0o755)
            os.mkdir(os.path.join(self.directory, b"w"), 0o755)
            for name, _ in self._looks:
                os.mkdir(os.path.join(self.directory, name), 0o755)
            for name, attr in reversed(self._looks):  # making a child changes its parent's time
                path = os.path.join(self.directory, name)
                os.chown(path, attr.uid, attr.gid)
                os.chmod(path, stat.S_IMODE(attr.mode))
                os.utime(path, ns=(attr.mtime_ns, attr.mtime_ns))
        except OSError as e:
            raise BoxError(f"cannot make a task directory in {os.fsdecode(self.directory)}: {e.strerror}") from e

    def _start(self, stdin_fd: int, status_fd: int, error_fd: int) -> int:
        """The number of the box."""
        run, place = self.request, self._place
        env_fd = os.memfd_create("environment", os.MFD_CLOEXEC)
        task_dir_fd = os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.write(env_fd, box_environment(run.env, place.root))
            program = (b"-B", run.program) if run.program else ()
            argv = [*place.argv, b"--umask", b"%o" % run.umask, b"-d", b"/" + run.cwd, *program]
            if (direct := run.direct) is not None:
                argv += [b"--say", direct.says] if direct.says else []
                argv += [b"--enter", direct.directory] if direct.directory else []
                argv += [b"--from", direct.moved, b"--move", direct.moved_to] if direct.moved else []
                argv += [b"--direct", b"%d" % len(direct.argv), b"--", *direct.argv]
            argv += [b"--", *run.argv]
            stdio = (stdin_fd, self._streams[0].write_fd, self._streams[-1].write_fd)
            extra = (env_fd, status_fd, error_fd, task_dir_fd, *place.template.fds)
            return place.boxes.start(argv, stdio, extra, self._not_started)
        finally:
            os.close(env_fd)
            os.close(task_dir_fd)

    def _not_started(self, reason: str) -> None:
        self._trouble = reason

    # -- during ----------------------------------------------------------------------------------------

    async def _run_box(self) -> tuple[int, int]:
        """(raw wait status, CPU microseconds) of the command."""
        if self._ended_by is not None:
            raise self._ended_by
        numbers = (1,) if self.request.merged else (1, 2)
        self._streams = [Stream(number, self, self._skip[number]) for number in numbers]
        status_read, status_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        error_read, error_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        stdin_read, stdin_write = self._open_stdin()
        try:
            self._box = self._start(stdin_read, status_write, error_write)
            for fd in (status_write, error_write, stdin_read):
                os.close(fd)
            status_write = error_write = stdin_read = -1
            for stream in self._streams:
                stream.watch()
            if stdin_write >= 0:
                self._feeder = asyncio.get_running_loop().create_task(self._feed(stdin_write))
            status = await self._status(status_read)
            return self._outcome(status, error_read)
        except BaseException:
            for stream in self._streams:
                stream.close()
            raise
        finally:
            if self._feeder is not None:
                self._feeder.cancel()
            for fd in (status_read, status_write, error_read, error_write, stdin_read):
                if fd >= 0:
                    os.close(fd)

    def _open_stdin(self) -> tuple[int, int]:
        """(the command's stdin, our end of it or -1)."""
        if self.request.stdin:
            return os.pipe2(os.O_CLOEXEC)
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), -1

    async def _feed(self, fd: int) -> None:
        """Passes the caller's stdin on, a piece whenever the command waits for one."""
        os.set_blocking(fd, False)
        pipe = os.fstat(fd)
        pause = FIRST_LOOK_S
        try:
            while True:
                await asyncio.sleep(pause)
                if not waits_for(os.getpid(), pipe):
                    pause = min(2 * pause, LAST_LOOK_S)
                    continue
                self.stdin_read = True
                piece = await self._stdin()
                if not piece:
                    return
                await self._write_all(fd, piece)
                pause = FIRST_LOOK_S
        except BrokenPipeError:
            pass  # the command does not want more
        finally:
            os.close(fd)

    @staticmethod
    async def _write_all(fd: int, piece: bytes) -> None:
        loop = asyncio.get_running_loop()
        while piece:
            try:
                piece = piece[os.write(fd, piece) :]
            except BlockingIOError:
                writable = asyncio.Event()
                loop.add_writer(fd, writable.set)
                try:
                    await writable.wait()
                finally:
                    loop.remove_writer(fd)

    async def _status(self, fd: int) -> bytes:
        """What mkbox says of the command's end, when everything in the box is dead; b"" if it says nothing."""
        told: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def readable() -> None:
            with contextlib.suppress(BlockingIOError):
                status = os.read(fd, _STATUS.size)
                self.watch.remove(fd)
                if not told.done():
                    told.set_result(status)

        self.watch.add(fd, readable)
        try:
            return await told
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            self.watch.remove(fd)
            self._place.boxes.ended(self._box)
            self._box = 0

    def _outcome(self, status: bytes, error_fd: int) -> tuple[int, int]:
        if self._ended_by is not None:
            raise self._ended_by
        if len(status) == _STATUS.size:
            raw, cpu_us = _STATUS.unpack(status)
            return raw, cpu_us
        try:
            text = os.read(error_fd, 4096).decode("utf-8", "replace").strip()
        except BlockingIOError:
            text = self._trouble
        raise BoxError(text or "the box ended without telling its command's status (killed? out of memory?)")

    # -- output ----------------------------------------------------------------------------------------

    def output_waits(self) -> None:
        """Called whenever output has been read: sends it now if there is much, soon if there is little."""
        if self._pump is not None:
            return
        if any(len(s.waiting) >= PIECE for s in self._streams):
            self._start_pump()
        elif self._stream_timer is None:
            self._stream_timer = asyncio.get_running_loop().call_later(STREAM_AFTER_S, self._start_pump)

    def _start_pump(self) -> None:
        self._stop_timer()
        if self._pump is None and self._box:
            self._pump = asyncio.get_running_loop().create_task(self._send_waiting())

    def _stop_timer(self) -> None:
        if self._stream_timer is not None:
            self._stream_timer.cancel()
            self._stream_timer = None

    async def _send_waiting(self, leave: int = 0) -> None:
        """Sends what waits, one piece at a time, until at most `leave` bytes of each stream are left."""
        try:
            while stream := next((s for s in self._streams if len(s.waiting) > leave), None):
                piece = bytes(stream.waiting[:PIECE])
                del stream.waiting[: len(piece)]
                self.sent[stream.number] += len(piece)
                await self._send(Output(self.request.task, stream.number), piece)
                if self._box and len(stream.waiting) < BACKLOG_BYTES:
                    stream.resume()
        finally:
            self._pump = None

    async def _finish_output(self) -> None:
        self._stop_timer()
        if self._pump is not None:
            await self._pump
        for stream in self._streams:
            stream.drain()
        if any(len(s.waiting) > FINAL_BYTES for s in self._streams):
            await self._send_waiting(FINAL_BYTES)

    def _rest(self, number: int) -> bytes:
        return next((bytes(s.waiting) for s in self._streams if s.number == number), b"")

    # -- after -----------------------------------------------------------------------------------------

    async def _reap(self) -> Reaped:
        place = self._place
        upper = os.path.join(self.directory, b"u")
        try:
            return reap_at_once(upper, place.root, place.known, place.store, lower_fd=place.template.lower_fd)
        except NotAtOnce:
            pass
        return await asyncio.to_thread(
            reap, upper, place.root, place.lower, place.store, lower_fd=place.template.lower_fd
        )
