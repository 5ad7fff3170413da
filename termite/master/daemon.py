"""The master: serves the wrappers in one project, and the files of this machine to its workers.

Ties together the socket (`local.py`), the rules, the shortcuts, the dispatcher and the coordinator
link.  Decides one thing itself: whether a command runs on a worker, here, or is answered at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import socket
import stat
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial

import msgspec

from termite import paths
from termite.command.localrc import RulesFile
from termite.errors import NoWorker, UsageError
from termite.master.builds import ANSWERED, REMOTE
from termite.master.dispatch import Dispatcher, DispatchOptions
from termite.master.export import Export
from termite.master.hashfile import HashFile
from termite.master.local import SOCKET_NAME, Caller, Kind, LocalRequest, LocalServer
from termite.master.localruns import LocalRuns
from termite.master.overview import Overview
from termite.master.pool import Pool
from termite.master.progress import ProgressLines
from termite.master.reading import readings_end
from termite.master.recollection import Recollection
from termite.master.refresh import Refresh
from termite.master.replay import Replayer
from termite.master.results import Results, names_of
from termite.master.shortcuts import find_shortcut
from termite.master.suspicion import Suspicion
from termite.master.task import Task
from termite.master.upkeep import LOCAL_AS_ASKED, Upkeep
from termite.web.pages import PageServer, WebOptions
from termite.web.status import MasterStatus
from termite.wire.auth import Purpose
from termite.wire.coordination import CoordinatorLink
from termite.wire.messages import OpenMirror, Subscribe, WorkerInfo

log = logging.getLogger(__name__)

RULES_NAME = b".termite-localrc"


@dataclass(frozen=True)
class MasterOptions:
    root: bytes  # absolute path of the writable root
    socket: bytes  # absolute path of the socket
    key: bytes
    coordinators: list[tuple[str, int]]
    jobs: int
    exclude: list[bytes]  # absolute paths
    retry: int
    keepalive_s: float
    fallback: str  # "local", "wait" or "fail"
    no_worker_patience_s: float = 3.0
    busy_patience_s: float = 30.0
    heartbeat_s: float = 2.0
    silence_limit_s: float = 10.0
    sources: tuple[bytes, ...] = ()  # absolute paths of other directories of the project
    xattrs: bool = True  # keep hashes of the project's files there
    cachedir: bytes = b""  # absolute path of where hashes of the system's files are kept; empty: nowhere
    fetch_all: bool = False
    paranoia: bool = False
    household_s: float = 5.0
    web: WebOptions | None = None  # None: no pages


def check_root(root: bytes) -> None:
    """UsageError if workers could not see the directory, naming the private part of its path."""
    path = b""
    for part in [b"", *paths.relative(root).split(b"/")]:
        path = paths.join(path, part) if part else b""
        try:
            st = os.stat(paths.absolute(path))
        except OSError as e:
            raise UsageError(f"{paths.for_people(paths.absolute(path))}: {e.strerror}") from e
        if not stat.S_ISDIR(st.st_mode):
            raise UsageError(f"{paths.for_people(paths.absolute(path))} is not a directory")
        if st.st_mode & 0o077 == 0:
            shown = paths.for_people(paths.absolute(path))
            raise UsageError(
                f"the directory {shown} is private (mode {stat.S_IMODE(st.st_mode):04o}); workers never see what is "
                f"private; run `chmod go+x {shown}` or build elsewhere"
            )


class Master:
    """`start`, then `stop`; `stopped` is set when a wrapper asked for the shutdown."""

    def __init__(self, options: MasterOptions) -> None:
        self.options = options
        self.stopped = asyncio.Event()
        root = paths.relative(options.root)
        self.root = root
        sources = [paths.relative(source) for source in options.sources]
        self.export = Export(
            root,
            [paths.relative(e) for e in options.exclude],
            sources,
            xattrs=options.xattrs,
            hash_file=HashFile(options.cachedir) if options.cachedir else None,
        )
        self.pool = Pool(jobs=options.jobs, arch=platform.machine(), keepalive_s=options.keepalive_s)
        self._protected = frozenset([SOCKET_NAME, os.path.basename(options.socket)])
        self.replayer = Replayer(paths.absolute(root), protected=self._protected)
        self.results = Results(self.replayer, self.export)
        self.progress_lines = ProgressLines()
        self.local_runs = LocalRuns(os.cpu_count() or 1)
        self.rules = RulesFile(os.path.join(options.root, RULES_NAME))
        self._server = LocalServer(options.socket, self.serve)
        self._ids = iter(range(1, 1 << 62))
        self._refreshing: asyncio.Task[None] | None = None
        self._links: list[CoordinatorLink] = []
        self._listed: dict[int, list[WorkerInfo]] = {}
        self._household: asyncio.Task[None] | None = None
        self._told_no_worker = False
        self._hidden: dict[bytes, bool] = {}  # directory -> may workers not see it? As of the last refresh
        name = f"{_user()}@{socket.gethostname()}:{paths.for_people(options.root)}"
        self.dispatcher = Dispatcher(
            self.pool,
            self.export,
            self.results,
            options.key,
            OpenMirror(master=name, root=root, uid=os.getuid(), gid=os.getgid(), jobs=0, sources=sources),
            DispatchOptions(
                retry=options.retry,
                no_worker_patience_s=options.no_worker_patience_s,
                busy_patience_s=options.busy_patience_s,
                heartbeat_s=options.heartbeat_s,
                silence_limit_s=options.silence_limit_s,
                wait_for_ever=options.fallback == "wait",
            ),
            is_settled=self._is_settled,
        )
        self.name = name
        self.upkeep = Upkeep(
            self.export,
            Recollection(root, options.cachedir, self.export.is_excluded),
            lambda: self.dispatcher.served_bytes,
            self._is_busy,
            fetch_all=options.fetch_all,
        )
        self.counts = self.upkeep.builds.total.counts
        self.dispatcher.on_opened = self.upkeep.mirror_opened
        self.dispatcher.on_closed = self.upkeep.mirror_lost
        self.export.on_question = self.upkeep.asked_for
        self.suspicion: Suspicion | None = None
        if options.paranoia:
            self.suspicion = Suspicion(self.export, [self.pool.check, self.results.conflicts.check])
            self.dispatcher.on_changes = self.suspicion.changed

        self.overview = Overview(name, self.pool, self.dispatcher, self.results, self.export, self.counts)
        self.pages = PageServer(options.web, self.overview.site(self.status))
        self._sampling: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Checks the directory and the rules, opens the socket, looks for the coordinator."""
        for directory in (self.options.root, *self.options.sources):
            check_root(directory)
        self.rules.current()
        await self._server.start()
        self.pages.start()
        for index, (host, port) in enumerate(self.options.coordinators):
            link = CoordinatorLink(
                host,
                port,
                self.options.key,
                Purpose.MASTER_SUBSCRIBE,
                Subscribe(master=self.name),
                partial(self._on_workers, index),
            )
            self._links.append(link)
            link.start()
        self._household = asyncio.get_running_loop().create_task(self._keep_house())
        self._sampling = asyncio.get_running_loop().create_task(self.overview.watch())
        log.info("serving %s", paths.for_people(self.options.socket))

    async def stop(self) -> None:
        """Ends tasks and connections and removes the socket."""
        for repeated in (self._household, self._sampling):
            if repeated is not None:
                repeated.cancel()
        await self.pages.stop()
        for link in self._links:
            await link.stop()
        await self.dispatcher.close()
        await self._server.last_words()
        await self._server.stop()
        await self.upkeep.close()
        await self.progress_lines.close()
        self.local_runs.close()

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(min(self.options.household_s, self.options.keepalive_s))
            self.dispatcher.release_idle()
            await self.upkeep.household()

    def _on_workers(self, index: int, infos: list[WorkerInfo]) -> None:
        self._listed[index] = infos
        merged = {info.name: info for listed in self._listed.values() for info in listed}
        self.dispatcher.set_workers(list(merged.values()))

    # -- requests of wrappers ------------------------------------------------------------------------

    async def serve(self, request: LocalRequest, caller: Caller) -> None:
        """Answers one wrapper."""
        self.upkeep.quiet.disturb()
        match request.kind:
            case Kind.RUN:
                await self._run(request, caller)
            case Kind.LOCAL:
                self.upkeep.count(self.upkeep.builds.of(request.env), LOCAL_AS_ASKED)
                self._run_here(caller, recurse=True, makes_stale=True)
            case Kind.SUMMARY:
                self.upkeep.summarize(request, caller)
            case Kind.REFRESH:
                self.upkeep.build_begins(request, caller)
                self.rules.current()
                self.local_runs.stale = True
                await self._fresh()
                caller.exit_status(0)
            case Kind.SHUTDOWN:
                caller.exit_status(0)
                log.info("told to shut down by pid %d", caller.pid)
                self.stopped.set()
            case Kind.INSPECT if not request.argv:
                caller.output(1, self._inspect_all() + b"\n")
                caller.exit_status(0)
            case Kind.INSPECT:
                for name in request.argv:
                    caller.output(1, self._inspect(os.path.join(request.cwd, name)).encode() + b"\n")
                caller.exit_status(0)

    async def _run(self, request: LocalRequest, caller: Caller) -> None:
        task = Task(next(self._ids), request, caller)
        decision = self.rules.current().decide(task.text)
        task.debug |= decision.debug
        if task.debug:
            rule = f"rule {decision.rule!r}" if decision.rule else "no rule"
            task.note(f"{'local' if decision.local else 'not local'}, {rule}; {task.origin()}: {task.label()}")
        if decision.local:
            self._note_local(task, "local by rule")
            self._run_here(caller, recurse=decision.recurse, makes_stale=not decision.skip_refresh)
            return
        if self._answer_at_once(request, task):
            return
        if (reason := self._unseen(request)) is not None:
            self._note_local(task, "local, not visible to workers")
            caller.message(f"{reason}; running it here: {task.label()}")
            self._run_here(caller, recurse=False, makes_stale=True)
            return
        await self._run_remotely(task)

    def _answer_at_once(self, request: LocalRequest, task: Task) -> bool:
        """Does mkdir, mv, echo, progress lines of cmake and the like itself; False if the command is no such thing."""
        command = request.program, request.argv, request.cwd, request.umask, request.env
        shortcut = find_shortcut(*command) or self.progress_lines.find(*command)
        if shortcut is None or self.results.replays_aside:
            return False
        self.local_runs.notice_ends()
        result = shortcut.perform(self.options.root, self._protected)
        if result is None:
            return False
        for path in result.arrived:
            self.replayer.note_arrival(path, time.time_ns())
        task.note(f"answered here: {task.label()}")
        self.dispatcher.tell_mirrors(self.export.note(result.changed_paths, {}))
        self.results.report_conflicts(task, result.files())
        self._count(task, ANSWERED)
        task.show(1, result.stdout)
        task.show(2, result.stderr)
        task.caller.exit_status(result.status)
        return True

    def _unseen(self, request: LocalRequest) -> str | None:
        """Why workers could not run this: its directory or its program is hidden from them."""
        directories = [(request.cwd, "the directory")]
        if request.program.startswith(b"/"):
            directories.append((os.path.dirname(request.program), "the program's directory"))
        for directory, what in directories:
            hidden = self._hidden.get(directory)
            if hidden is None:
                hidden = self._hidden[directory] = self.export.is_hidden(paths.relative(os.path.realpath(directory)))
            if hidden:
                return f"{what} {paths.for_people(directory)} is private or excluded"
        return None

    async def _run_remotely(self, task: Task) -> None:
        caller = task.caller
        try:
            status = await self._while_wanted(caller, self._dispatch(task))
        except NoWorker as e:
            trouble = [link.trouble for link in self._links if link.trouble]
            await self._without_worker(
                task, "; ".join([*trouble, str(e)]) if len(trouble) == len(self._links) else str(e)
            )
        except asyncio.CancelledError:
            log.info("task %d: its caller is gone; cancelled: %s", task.id, task.label())
            self._count(task, "cancelled")
        else:
            self._told_no_worker = False
            self._count(task, REMOTE)
            await caller.drained()
            caller.exit_status(status)

    @staticmethod
    async def _while_wanted(caller: Caller, running: Coroutine[object, object, int]) -> int:
        """CancelledError as soon as the caller is gone."""
        this = asyncio.current_task()
        assert this is not None
        if caller.gone:
            running.close()
            raise asyncio.CancelledError
        caller.on_gone = this.cancel
        try:
            return await running
        finally:
            caller.on_gone = None

    async def _dispatch(self, task: Task) -> int:
        await self._fresh()
        started = time.monotonic()
        done = await self.dispatcher.run(task)
        self.overview.ended(task, done.status)
        took_ms = (time.monotonic() - started) * 1e3
        task.note(f"status {done.status}, {took_ms:.1f} ms, on {task.worker}: {task.label()}")
        if task.debug:
            task.note(f"changed {names_of(done.files)}")
        return done.status

    async def _without_worker(self, task: Task, reason: str) -> None:
        """What `-fallback` says; "wait" never gets here for want of workers."""
        caller = task.caller
        if self.options.fallback != "local" or task.stdin_read:
            self._count(task, "failed, no worker")
            caller.message(f"no worker for: {task.label()} ({reason})")
            caller.exit_status(1 << 8)
            return
        await self.local_runs.slot()
        if caller.gone:
            self.local_runs.give_back()
            return
        self._note_local(task, "local, no worker")
        if not self._told_no_worker or task.tried:
            self._told_no_worker = True
            caller.message(f"no worker ({reason}); running commands here until one is found")
        self._run_here(caller, recurse=False, makes_stale=True, holds_slot=True)

    def _count(self, task: Task, what: str) -> None:
        build = self.upkeep.builds.of(task.request.env)
        self.upkeep.count(build, what)
        build.received += task.brought_bytes
        build.conflicts += task.conflicts
        if task.worker and what == REMOTE:
            build.workers.add(task.worker)

    def _note_local(self, task: Task, why: str) -> None:
        self._count(task, why)
        task.note(f"{why}: {task.label()}")

    def _run_here(self, caller: Caller, *, recurse: bool, makes_stale: bool, holds_slot: bool = False) -> None:
        self.local_runs.watch(caller.pid, makes_stale=makes_stale, holds_slot=holds_slot)
        caller.run_locally(recurse)

    def _is_busy(self) -> bool:
        return bool(self.dispatcher.running or self.local_runs.running or self._refreshing is not None)

    # -- freshness -----------------------------------------------------------------------------------

    def _is_settled(self) -> bool:
        """True if nothing happens on this machine that mirrors have yet to hear of."""
        return not self.local_runs.stale and not self.local_runs.running and self._refreshing is None

    async def _fresh(self) -> None:
        """Returns when what the mirrors were told is what the disk holds, as far as anyone could know."""
        self.local_runs.notice_ends()
        while self.local_runs.stale or self._refreshing is not None:
            if self._refreshing is None:
                self.local_runs.stale = False
                self._refreshing = asyncio.get_running_loop().create_task(self._refresh())
            await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        started = time.monotonic()
        began_ns = time.time_ns()
        self._hidden.clear()
        try:
            await readings_end(self.export)
            found = await Refresh(self.export).run(self.dispatcher.tell_mirrors)
        finally:
            self._refreshing = None
        if self.suspicion is not None:
            self.suspicion.refreshed(began_ns)
        took_s = time.monotonic() - started
        self.results.timings.add("refresh", took_s)
        log.info("refresh: %d changes, %.1f ms", found, took_s * 1e3)

    # -- for people ----------------------------------------------------------------------------------

    def _inspect(self, abspath: bytes) -> str:
        """One line on what workers are told of a file."""
        path = paths.relative(abspath)
        shown = paths.for_people(paths.absolute(path))
        directory, name = paths.split(path)
        if self.export.is_excluded(path):
            return f"{shown}: excluded"
        attr = self.export.read_dir(directory).entries.get(name)
        if attr is None:
            return f"{shown}: not there, or not visible to workers"
        told = f"mode {attr.mode:o}, {attr.size} bytes, modified {attr.mtime_ns / 1e9:.6f}"
        if attr.is_symlink():
            told += f", -> {paths.for_people(attr.target)}"
        if attr.is_private() and not attr.is_symlink():
            told += ", private: contents are never shown"
        if attr.hash:
            told += f", sha256 {attr.hash.hex()}"
        return f"{shown}: {told}"

    def status(self) -> MasterStatus:
        """As the pages show it."""
        return self.overview.status(list(self.suspicion.breaches) if self.suspicion is not None else None)

    def _inspect_all(self) -> bytes:
        """Everything countable, as JSON."""
        served = {"bytes": self.dispatcher.served_bytes, **self.dispatcher.peers.status()}
        return msgspec.json.encode({**msgspec.to_builtins(self.status()), **self.upkeep.status(), "served": served})


def _user() -> str:
    return os.environ.get("USER") or str(os.getuid())
