"""Gets each task onto a worker, again if that worker dies, and its results into the tree.

Joins the pool (who), the links (how) and the results (what came back).  Every wait in here has a
bound: a task for which no worker can be found ends in `NoWorker`, and the caller decides whether it
runs locally.  Loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from termite.errors import (
    AuthError,
    BoxError,
    Canceled,
    Leaving,
    MountError,
    NoWorker,
    PeerLost,
    Refused,
    StoreError,
    TermiteError,
)
from termite.master.export import Export
from termite.master.link import MirrorLink
from termite.master.peers import PeerBook
from termite.master.pool import Pool
from termite.master.results import Results
from termite.master.task import Task
from termite.wire.messages import Change, Done, OpenMirror, WorkerInfo

log = logging.getLogger(__name__)

TRY_ELSEWHERE = (PeerLost, BoxError, Refused, StoreError, MountError)
"""Failures that say something of the worker, not of the command."""


@dataclass(frozen=True)
class DispatchOptions:
    retry: int  # how many times a lost task is tried again
    no_worker_patience_s: float  # how long to hope for a first worker
    busy_patience_s: float  # how long to wait while others hold every slot
    heartbeat_s: float
    silence_limit_s: float
    wait_for_ever: bool  # -fallback=wait


class Dispatcher:
    """`now` is the clock of all decisions (monotonic seconds)."""

    def __init__(
        self,
        pool: Pool,
        export: Export,
        results: Results,
        key: bytes,
        hello: OpenMirror,
        options: DispatchOptions,
        now: Callable[[], float] = time.monotonic,
        is_settled: Callable[[], bool] = lambda: True,
    ) -> None:
        self.pool = pool
        self.peers = PeerBook()
        self._is_settled = is_settled
        self._closing: set[asyncio.Task[None]] = set()
        self.links: dict[str, MirrorLink] = {}
        self.last_trouble = ""  # why the latest worker was lost; empty: none was
        self.list_trouble = ""  # why the list of workers may be wanting
        self._export = export
        self._results = results
        self._key = key
        self._hello = hello
        self._options = options
        self._now = now
        self._waiting: deque[tuple[Task, asyncio.Future[MirrorLink], float]] = deque()
        self._opening: set[asyncio.Task[None]] = set()
        self._hearing: set[MirrorLink] = set()  # links that have asked, or may have asked, about files
        self._is_closed = False
        self._hopeless_since: float | None = now()
        self._timer: asyncio.TimerHandle | None = None
        self.running = 0
        self.on_opened: Callable[[MirrorLink], None] | None = None
        self.on_closed: Callable[[MirrorLink], None] | None = None
        self.on_changes: Callable[[list[Change]], None] | None = None  # they are about to be told
        self._served_before = 0  # bytes that links sent which are gone

    # -- the life of a task --------------------------------------------------------------------------

    async def run(self, task: Task) -> Done:
        """Runs the task remotely and replays what it changed; NoWorker if that cannot be had."""
        again = False
        timings = self._results.timings
        while True:
            with timings.measure("dispatch"):
                link = await self._slot(task, first=again)
            self.running += 1
            task.worker = link.name
            self._results.conflicts.sent(task.id, time.monotonic_ns())
            try:
                with timings.measure("run"):
                    done, body = await link.run(task)
                await self._results.take(task, link, done, body, self.tell_mirrors)
                task.show(1, done.stdout)
                task.show(2, done.stderr)
                return done
            except Leaving as e:
                log.info("task %d: not begun on %s: %s", task.id, link.name, e)
                again = True
            except TRY_ELSEWHERE as e:
                self._lost(task, link, e)
            finally:
                self._results.conflicts.ended(task.id)
                self.running -= 1
                self.pool.ended(link.name, self._now())
                self._close_if_drained(link)
                self.kick()

    def _lost(self, task: Task, link: MirrorLink, error: TermiteError) -> None:
        """Notes a failed try; raises NoWorker when it was the last."""
        if self._is_closed:
            raise _shutting_down(task)
        task.tried.add(link.name)
        task.last_failure = f"{link.name}: {error}"
        self.last_trouble = f"worker {task.last_failure}"
        log.warning("task %d: lost on %s: %s", task.id, link.name, error)
        if not isinstance(error, PeerLost):
            link.abort(str(error))
        self._on_lost(link, str(error))  # before the task looks for a worker again
        if task.stdin_read:
            raise NoWorker(f"worker {link.name} was lost after the command had read its stdin: {error}")
        task.failures += 1
        if task.failures > self._options.retry:
            raise NoWorker(f"lost {task.failures} times; last on {task.last_failure}")
        task.begin_try()
        task.caller.message(f"worker {task.last_failure}; trying again elsewhere: {task.label()}")

    async def _slot(self, task: Task, first: bool = False) -> MirrorLink:
        """The link to run the task on, its slot taken in the pool.  `first`: it has waited before."""
        if self._is_closed:
            raise _shutting_down(task)
        future: asyncio.Future[MirrorLink] = asyncio.get_running_loop().create_future()
        if first:
            self._waiting.appendleft((task, future, self._now()))
        else:
            self._waiting.append((task, future, self._now()))
        self.kick()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.pool.ended(future.result().name, self._now())
                self.kick()
            raise

    # -- decisions -----------------------------------------------------------------------------------

    def kick(self) -> None:
        """Opens what should be opened, hands out what can be handed out, gives up what must be.

        In this order, as a task does not queue behind another one while a further worker is being opened.
        """
        self._grow()
        while self._waiting:
            task, future, _ = self._waiting[0]
            if future.done():  # cancelled
                self._waiting.popleft()
                continue
            name = self.pool.pick(frozenset(task.tried), task.request.worker.decode("utf-8", "replace"))
            if name is None:
                break
            self._waiting.popleft()
            self.pool.started(name)
            future.set_result(self.links[name])
        self._give_up()

    def _grow(self) -> None:
        if not self._waiting:
            return  # what queues at a worker stays there
        need = self.pool.running() + self.waiting
        while (more := self.pool.to_ask(need)) is not None:
            self.links[more[0]].want(more[1])
        while (found := self.pool.to_open(need, self._now())) is not None:
            opening = asyncio.get_running_loop().create_task(self._open(*found))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)

    def _give_up(self) -> None:
        """Fails the waiting tasks when nothing can be hoped for; otherwise sees that we look again."""
        now = self._now()
        if self.pool.is_hopeless() or self.pool.all_paused(now):
            if self._hopeless_since is None:
                self._hopeless_since = now
        else:
            self._hopeless_since = None
        if not self._waiting or self._options.wait_for_ever:
            return
        hopeless = self._hopeless_since is not None and now - self._hopeless_since >= self._options.no_worker_patience_s
        starved = self.running == 0 and now - self._waiting[0][2] >= self._options.busy_patience_s
        if hopeless or starved:
            lack = self.list_trouble or self.last_trouble or "the coordinator lists no worker"
            reason = lack if hopeless else "every worker's slots are taken by others"
            while self._waiting:
                _, future, _ = self._waiting.popleft()
                if not future.done():
                    future.set_exception(NoWorker(reason))
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(0.25, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.kick()

    # -- workers ---------------------------------------------------------------------------------------

    def set_workers(self, infos: list[WorkerInfo]) -> None:
        """The coordinator's list has changed."""
        self.pool.set_workers(infos)
        self.list_trouble = ""
        strangers = [info for info in infos if info.arch != self.pool.arch]
        if infos and self.pool.is_hopeless():
            if strangers:
                architectures = ", ".join(sorted({i.arch for i in strangers}))
                self.list_trouble = f"all {len(strangers)} workers have another architecture ({architectures})"
            else:
                self.list_trouble = "all workers are about to leave"
        self.kick()

    async def _open(self, info: WorkerInfo, jobs: int) -> None:
        hello = OpenMirror(
            master=self._hello.master, root=self._hello.root, uid=self._hello.uid, gid=self._hello.gid, jobs=jobs,
            sources=self._hello.sources,
        )  # fmt: skip
        link = MirrorLink(
            info,
            self._export,
            self._on_granted,
            self._on_lost,
            on_draining=self._on_draining,
            peers=self.peers,
            is_settled=self._is_settled,
        )
        self._hearing.add(link)
        try:
            await link.open(
                self._key,
                hello,
                heartbeat_s=self._options.heartbeat_s,
                silence_limit_s=self._options.silence_limit_s,
            )
        except Leaving as e:
            log.info("worker %s takes no new tasks: %s", info.name, e)
            self._hearing.discard(link)
            self.pool.left(info.name, self._now(), again=False)
        except TermiteError as e:
            self.last_trouble = f"worker {info.name}: {e}"
            log.log(logging.ERROR if isinstance(e, AuthError) else logging.WARNING, "%s", self.last_trouble)
            self._hearing.discard(link)
            self.pool.lost(info.name, self._now())
        else:
            log.info("worker %s: mirror open, %d slots", info.name, link.granted)
            self.links[info.name] = link
            self.pool.opened(info.name, link.granted, self._now())
            if self.on_opened is not None:
                self.on_opened(link)
            if link.draining is not None:
                self._on_draining(link)
        self.kick()

    def _on_granted(self, link: MirrorLink) -> None:
        if self.links.get(link.name) is link:
            self.pool.granted(link.name, link.granted)
            self.kick()

    def _on_lost(self, link: MirrorLink, reason: str) -> None:
        """Told by the link itself, and by each task that was lost with it: the first counts."""
        if link not in self._hearing:
            return
        self._hearing.discard(link)
        self._served_before += link.bytes_served
        if self.on_closed is not None:
            self.on_closed(link)
        if self.links.get(link.name) is not link:
            return
        del self.links[link.name]
        self.peers.lost(link.name)
        drained = link.draining
        if drained is not None:
            log.info("worker %s has left: %s", link.name, drained.reason)
            self.last_trouble = f"worker {link.name} has left: {drained.reason}"
            self.pool.left(link.name, self._now(), drained.again)
        else:
            self.last_trouble = f"worker {link.name}: {reason}"
            log.warning("worker %s lost: %s", link.name, reason)
            self.pool.lost(link.name, self._now())
        self.kick()

    def _on_draining(self, link: MirrorLink) -> None:
        assert link.draining is not None
        if self.links.get(link.name) is not link:
            return  # it is being opened: `_open` comes back to this
        log.info("worker %s takes no new tasks: %s", link.name, link.draining.reason)
        self.pool.drains(link.name)
        self._close_if_drained(link)
        self.kick()

    def _close_if_drained(self, link: MirrorLink) -> None:
        """Lets a worker that wants to leave go, once all results are here."""
        if link.draining is not None and self.links.get(link.name) is link and self.pool.drains(link.name):
            closing = asyncio.get_running_loop().create_task(link.close("all results are here"))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    @property
    def waiting(self) -> int:
        """Tasks without a slot."""
        return sum(not future.done() for _, future, _ in self._waiting)

    @property
    def served_bytes(self) -> int:
        """Contents that were sent to workers so far."""
        return self._served_before + sum(link.bytes_served for link in self.links.values())

    def tell_mirrors(self, changes: list[Change]) -> None:
        """Queues changes of the tree for every mirror."""
        if changes:
            if self.on_changes is not None:
                self.on_changes(changes)
            for link in list(self._hearing):
                link.queue(changes)

    def release_idle(self) -> None:
        """Gives back the slots of mirrors that had nothing to do for the keepalive time."""
        for name in self.pool.to_release(self._now()):
            log.info("worker %s: idle, slots given back", name)
            self.links[name].want(0)

    async def close(self) -> None:
        """Ends every connection; all tasks end in `Canceled`."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for opening in list(self._opening):
            opening.cancel()
        while self._waiting:
            task, future, _ = self._waiting.popleft()
            if not future.done():
                future.set_exception(_shutting_down(task))
        links, self.links = list(self.links.values()), {}
        await asyncio.gather(*(link.close("the master is shutting down") for link in links), return_exceptions=True)


def _shutting_down(task: Task) -> Canceled:
    return Canceled(f"the master is shutting down; not finished: {task.label()}")
