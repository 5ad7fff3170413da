"""termite-worker: offers this machine's cores to the masters that a coordinator brings."""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from termite.cli.coordinator import write_port_file
from termite.cli.flags import Flags
from termite.cli.run import Job, common_flags, run_program
from termite.errors import MountError, UsageError
from termite.mirror.fuse import check_fuse
from termite.wire.address import parse_address
from termite.wire.rpc import HEARTBEAT_S, SILENCE_LIMIT_S
from termite.worker.daemon import Worker, WorkerOptions

PROGRAM = "termite-worker"
COORDINATOR_PORT = 1233
_CAP_SYS_ADMIN = 21


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(PROGRAM, prepare, argv)


def prepare(argv: Sequence[str]) -> Job:
    """The worker that this command line asks for."""
    flags = Flags(
        PROGRAM,
        "Runs commands of masters, each in a box that sees the master's files and nothing of this machine.  Needs root "
        "for the mounts; the commands run as an ordinary user.  No toolchain is needed here.",
    )
    coordinators = flags.texts("coordinator", "where to register (default port 1233)", "HOST:PORT")
    jobs = flags.integer("jobs", os.cpu_count() or 1, "commands to run at once", 1, 4096, shown="the number of cores")
    port = flags.port("port", 1232, "TCP port for masters")
    retry = flags.integer("port-retry", 10, "how many ports after it to try if it is taken", 0, 1000)
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
    common = common_flags(flags)
    flags.parse(argv)
    if not coordinators.value:
        raise UsageError("-coordinator HOST:PORT is missing: the machine that runs termite-coordinator")
    account = _account(user.value)
    check_powers()
    options = WorkerOptions(
        key=common.key(),
        coordinators=[parse_address(text, COORDINATOR_PORT) for text in coordinators.value],
        host=listen.value,
        port=port.value,
        port_retry=retry.value if port.value else 0,
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
    )

    async def serve(stop: asyncio.Event) -> int:
        worker = Worker(options)
        try:
            await worker.start()
            if port_file.value:
                write_port_file(Path(port_file.value), listen.value or "localhost", worker.port)
            await stop.wait()
        finally:
            await worker.stop()
        return 0

    return common.job(serve)


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
