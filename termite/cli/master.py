"""termite-master: runs in a project's root and hands its commands to workers."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from termite import paths
from termite.cli.flags import Flags
from termite.cli.run import Job, common_flags, run_program, web_options
from termite.errors import UsageError
from termite.master.daemon import Master, MasterOptions, check_root
from termite.master.local import SOCKET_NAME
from termite.wire.address import parse_address
from termite.wire.rpc import HEARTBEAT_S, SILENCE_LIMIT_S

PROGRAM = "termite-master"
COORDINATOR_PORT = 1233


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(PROGRAM, prepare, argv)


def prepare(argv: Sequence[str]) -> Job:
    """The master that this command line asks for."""
    flags = Flags(
        PROGRAM,
        "Run it in the root of a project, then build there with termite-make: commands run on workers, which see this "
        "machine's files (never those without group or other permission), and the files they change come back here.  "
        "Commands can change files below this directory only.  The file .termite-localrc says what to run locally.",
    )
    coordinators = flags.texts(
        "coordinator", "who knows the workers; without it $TERMITE_COORDINATOR, else localhost:1233", "HOST:PORT"
    )
    jobs = flags.integer(
        "jobs", 2 * (os.cpu_count() or 1), "commands to have on workers at once", 1, 65536, shown="twice the cores"
    )
    port = flags.page_port("port", 1231, "TCP port of this master's pages, for this machine only")
    socket = flags.text(
        "socket", "", "where termite-make and its commands find this master", "FILE", "./.termite-socket"
    )
    exclude = flags.texts(
        "exclude", "never show this directory to workers (/proc, /sys, /dev, /tmp, /var/tmp never are)", "DIR"
    )
    sourcedir = flags.text(
        "sourcedir",
        "",
        "the sources, if they lie outside of this directory, where the build is to happen; commands cannot change "
        "anything there, and like here, hashes are kept with the files",
        "DIR",
    )
    xattr = flags.switch(
        "xattr",
        True,
        "keep the hashes of the project's files in their xattr user.termattr, so that the next master need not read "
        "them again (git looks once at files that got one)",
    )
    fetch_all = flags.switch(
        "fetch-all", False, "while nothing is to do, let workers fetch all of the project, not only what is asked for"
    )
    retry = flags.integer("retry", 3, "how often a command that was lost with its worker is tried again", 0, 100)
    keepalive = flags.duration("time.keepalive", "60s", "give a worker's slots back after this long without work", 0.1)
    fallback = flags.choice(
        "fallback", "local", ["local", "wait", "fail"], "what becomes of a command when there is no worker"
    )
    household = flags.duration(
        "time.household", "5s", "how often to tidy up: give back idle slots, set xattrs", 0.1, 3600
    )
    paranoia = flags.switch(
        "paranoia", False, "check everything that is remembered after every change, and samples of it against the disk"
    )
    cachedir = flags.text(
        "cachedir",
        "",
        "remember here which contents the system's large files have, so that the next master need not read them again, "
        "and which files new workers ask for, so that the next one gets them at once; no contents are kept: files are "
        "served from where they lie",
        "DIR",
        shown="~/.cache/termite",
    )
    patience = flags.duration("time.patience", "3s", "how long to hope for a worker when there is none", 0)
    silence = flags.duration(
        "time.silence", f"{SILENCE_LIMIT_S:g}s", "a worker that sends nothing for this long is lost", 0.1, 3600
    )
    common = common_flags(flags)
    flags.parse(argv)
    named = coordinators.value or [os.environ.get("TERMITE_COORDINATOR") or "localhost"]
    root = os.getcwdb()
    excluded = _excluded(exclude.value, root)
    path = os.fsencode(socket.value) if socket.value else SOCKET_NAME
    options = MasterOptions(
        root=root,
        socket=os.path.join(root, path),
        key=common.key(),
        coordinators=[parse_address(text, COORDINATOR_PORT) for text in named],
        jobs=jobs.value,
        exclude=excluded,
        sources=_sources(sourcedir.value, root, excluded),
        xattrs=xattr.value,
        cachedir=_cachedir(cachedir.value),
        fetch_all=fetch_all.value,
        paranoia=paranoia.value,
        household_s=household.value,
        retry=retry.value,
        keepalive_s=keepalive.value,
        fallback=fallback.value,
        no_worker_patience_s=patience.value,
        heartbeat_s=min(HEARTBEAT_S, silence.value / 4),
        silence_limit_s=silence.value,
        web=web_options(port, "127.0.0.1"),
    )
    for directory in (root, *options.sources):
        check_root(directory)

    async def serve(stop: asyncio.Event) -> int:
        master = Master(options)
        try:
            await master.start()
            told = asyncio.ensure_future(master.stopped.wait())
            asked = asyncio.ensure_future(stop.wait())
            await asyncio.wait({told, asked}, return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
            asked.cancel()
        finally:
            await master.stop()
        return 0

    return common.job(serve)


def _cachedir(named: str) -> bytes:
    """What -cachedir means."""
    if named:
        return os.path.abspath(os.fsencode(named))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(os.path.abspath(os.fsencode(base)), b"termite")


def _excluded(named: Sequence[str], root: bytes) -> list[bytes]:
    """What -exclude means; UsageError if nothing could be built then."""
    for directory in named:
        path = os.path.abspath(os.fsencode(directory))
        if path in (b"/", root):
            what = "the project" if path == root else "everything"
            raise UsageError(f"-exclude {directory}: that is {what}; name a directory that no command needs")
    return [os.path.abspath(os.fsencode(directory)) for directory in named]


def _sources(named: str, root: bytes, excluded: Sequence[bytes]) -> tuple[bytes, ...]:
    """What -sourcedir means; UsageError if that contradicts something else."""
    if not named:
        return ()
    source = os.path.realpath(os.fsencode(named))
    if paths.is_inside(source, root):
        return ()  # part of the project already
    if source.split(b"/")[1] in (b"", b"proc", b"sys", b"dev"):
        raise UsageError(f"-sourcedir {named}: name the directory of one project's sources")
    for directory in excluded:
        if paths.is_inside(source, directory):
            raise UsageError(f"-sourcedir {named} and -exclude {os.fsdecode(directory)} contradict each other")
    return (source,)


if __name__ == "__main__":
    sys.exit(main())
