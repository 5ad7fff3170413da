"""termite-worker: offers this machine's cores to the masters that a coordinator brings."""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import re
import shutil
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from termite.cli.flags import Flags
from termite.cli.restart import kept_socket, restart
from termite.cli.run import Job, common_flags, run_program, web_options, write_port_file
from termite.errors import MountError, UsageError
from termite.mirror.fuse import check_fuse
from termite.wire.address import check_host, parse_address
from termite.wire.rpc import HEARTBEAT_S, SILENCE_LIMIT_S
from termite.wire.transport import listening_socket
from termite.worker.daemon import WEB_OFFSET, Worker, WorkerOptions

PROGRAM = "termite-worker"
COORDINATOR_PORT = 1233
_CAP_SYS_ADMIN = 21


class Afterwards:
    """What is to be done once the worker has ended."""

    def __init__(self) -> None:
        self.restarts = False
        self.sock: socket.socket | None = None  # the listening one, for the successor


def main(argv: Sequence[str] | None = None) -> int:
    afterwards = Afterwards()
    status = run_program(PROGRAM, partial(prepare, afterwards=afterwards), argv)
    if afterwards.restarts and not status:
        restart(afterwards.sock)
    return status


def prepare(argv: Sequence[str], afterwards: Afterwards | None = None) -> Job:
    """The worker that this command line asks for."""
    then = afterwards or Afterwards()
    flags = Flags(
        PROGRAM,
        "Runs commands of masters, each in a box that sees the master's files and nothing of this machine.  Needs root "
        "for the mounts; the commands run as an ordinary user.  No toolchain is needed here.",
    )
    coordinators = flags.texts("coordinator", "where to register (default port 1233)", "HOST:PORT")
    jobs = flags.integer("jobs", os.cpu_count() or 1, "commands to run at once", 1, 4096, shown="the number of cores")
    port = flags.port("port", 1232, "TCP port for masters")
    retry = flags.integer("port-retry", 10, "how many ports after it to try if it is taken", 0, 1000)
    web_port = flags.page_port(
        "web-port",
        -1,
        "TCP port of the pages (load, mirrors, commands, the log); with -port-retry as for -port",
        f"{WEB_OFFSET} above the one for masters",
    )
    listen = flags.text("listen", "", "address to listen on", "ADDRESS", "all addresses of this machine")
    advertise = flags.text(
        "advertise", "", "address for masters to dial", "ADDRESS", "the one the coordinator sees us come from"
    )
    cachedir = flags.text("cachedir", "/var/cache/termite", "where contents of files are kept, across restarts", "DIR")
    cachesize = flags.size("cachesize", "10G", "how much of them at most", 1 << 20)
    tmpdir = flags.text("tmpdir", "/var/tmp", "where mirrors and running commands have their directories", "DIR")
    user = flags.text("user", "nobody", "user that the commands run as; never root", "NAME")
    mkbox = flags.text(
        "mkbox_path", "", "the program that makes the boxes", "FILE", "termite-mkbox beside this program"
    )
    port_file = flags.text("port-file", "", "write the address that is listened on to this file once it is", "FILE")
    silence = flags.duration(
        "time.silence", f"{SILENCE_LIMIT_S:g}s", "a master that sends nothing for this long is lost", 0.1, 3600
    )
    drain = flags.duration(
        "time.drain",
        "5m",
        "how long running commands may take to end after SIGTERM, or after kill or restart by the coordinator; a "
        "second SIGTERM ends them at once",
        0,
        86400,
    )
    paranoia = flags.switch(
        "paranoia",
        False,
        "check the cache after every change, one in eight of the files that are read against the master's disk, and "
        "after each command a sample of names, as a box shows them, against what the master told; what is wrong is an "
        "ERROR in the log",
    )
    own_files = flags.switch(
        "own-files",
        True,
        "large programs and libraries that this machine has itself, at the same place and with the same contents "
        "(compared by hash), are read from here instead of sent by the master",
    )
    heap_size = flags.size(
        "heap-size",
        "0",
        "a mirror process that takes more memory than this makes way for a fresh one after its tasks; 0: no bound",
    )
    reap_count = flags.integer(
        "reap-count", 0, "a mirror process makes way for a fresh one after this many tasks; 0: never", 0, 1 << 30
    )
    flags.obsolete("cpus", "-jobs says how many commands run at once, taskset(1) on which cores")
    stderr = flags.text("stderr", "", "append what goes to stderr to this file; SIGHUP opens it anew", "FILE", "stderr")
    common = common_flags(flags)
    common.logfile.help += (
        "; %h in it is the name of this host and %p the port, so that several workers can share a command line; "
        "the mirror processes write to it as well"
    )
    flags.parse(argv)
    if not coordinators.value:
        raise UsageError("-coordinator HOST:PORT is missing: the machine that runs termite-coordinator")
    if advertise.value:
        check_host("-advertise", advertise.value)
    account = _account(user.value)
    check_powers()
    retries = retry.value if port.value else 0
    sock = kept_socket(port.value)
    if sock is None and "%p" in common.logfile.value:
        sock = listening_socket(listen.value, port.value, retries)
    logfile = unique_name(common.logfile.value, sock)
    options = WorkerOptions(
        key=common.key(),
        coordinators=[parse_address(text, COORDINATOR_PORT) for text in coordinators.value],
        host=listen.value,
        port=port.value,
        port_retry=retries,
        advertise=advertise.value,
        jobs=jobs.value,
        cachedir=cachedir.value,
        cache_bytes=cachesize.value,
        tmpdir=tmpdir.value,
        uid=account.pw_uid,
        gid=account.pw_gid,
        mkbox=_find_mkbox(mkbox.value),
        heartbeat_s=min(HEARTBEAT_S, silence.value / 4),
        silence_limit_s=silence.value,
        log_level=logging.DEBUG if common.debug.value else logging.INFO,
        logfile=os.path.abspath(logfile) if logfile else "",
        paranoia=paranoia.value,
        own_files=own_files.value,
        heap_bytes=heap_size.value,
        reap_count=reap_count.value,
        web=web_options(web_port, listen.value, retry.value if web_port.value else 0),
    )

    async def serve(stop: asyncio.Event) -> int:
        worker = Worker(options, sock)
        try:
            await worker.start()
            if port_file.value:
                write_port_file(Path(port_file.value), listen.value or "localhost", worker.port)
            await wait_for_end(worker, stop, drain.value)
            if worker.command == "restart" and not stop.is_set():
                then.restarts = True
                then.sock = worker.keep_socket()
        finally:
            await worker.stop()
        return 0

    return Job(serve, logfile, common.debug.value, stderr.value)


async def wait_for_end(worker: Worker, stop: asyncio.Event, limit_s: float) -> None:
    """Returns when the worker is to end and has no task left, or none it may wait for."""
    stopping, told = asyncio.create_task(stop.wait()), asyncio.create_task(worker.told.wait())
    try:
        await asyncio.wait([stopping, told], return_when=asyncio.FIRST_COMPLETED)
        if worker.command == "kill-now":
            return
        reason = "the worker restarts" if worker.command == "restart" and not stop.is_set() else "the worker ends"
        draining = asyncio.create_task(worker.drain(reason, limit_s))
        try:
            while not draining.done() and worker.command != "kill-now":
                worker.told.clear()
                told.cancel()
                told = asyncio.create_task(worker.told.wait())
                await asyncio.wait([draining, told], return_when=asyncio.FIRST_COMPLETED)
        finally:
            draining.cancel()
    finally:
        stopping.cancel()
        told.cancel()


def unique_name(pattern: str, sock: socket.socket | None) -> str:
    """%h: the host's name; %p: the port of the socket; %%: %."""
    port = str(sock.getsockname()[1]) if sock is not None else ""
    pieces = {"%h": socket.gethostname(), "%p": port, "%%": "%"}
    return re.sub("%[hp%]", lambda found: pieces[found[0]], pattern)


def check_powers() -> None:
    """MountError, with what to do, if this process could not mount a mirror."""
    check_fuse()
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    if not effective >> _CAP_SYS_ADMIN & 1:
        raise MountError("not permitted to mount: run termite-worker as root (in a container: with CAP_SYS_ADMIN)")


def _account(name: str) -> pwd.struct_passwd:
    try:
        account = pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"-user {name}: there is no such user here") from None
    if account.pw_uid == 0 or account.pw_gid == 0:
        raise UsageError(f"-user {name}: commands never run as root; name an ordinary user")
    return account


def _find_mkbox(named: str) -> str:
    beside = Path(sys.argv[0]).resolve().parent / "termite-mkbox"
    for place in [named] if named else [str(beside), str(Path(sys.executable).parent / "termite-mkbox")]:
        if os.access(place, os.X_OK):
            return os.path.abspath(place)
    found = shutil.which("termite-mkbox") if not named else None
    if found is None:
        raise UsageError(f"termite-mkbox is not {named or f'at {beside}'}, nor on PATH; name it with -mkbox_path FILE")
    return found


if __name__ == "__main__":
    sys.exit(main())
