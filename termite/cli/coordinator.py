"""termite-coordinator: knows which workers live, and tells the masters."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from termite.cli.flags import Flags
from termite.cli.run import Job, common_flags, run_program, web_options, write_port_file
from termite.coordinator.daemon import Coordinator, CoordinatorOptions
from termite.errors import UsageError
from termite.wire.rpc import HEARTBEAT_S, SILENCE_LIMIT_S

PROGRAM = "termite-coordinator"


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(PROGRAM, prepare, argv)


def prepare(argv: Sequence[str]) -> Job:
    """The coordinator that this command line asks for."""
    flags = Flags(
        PROGRAM,
        "Keeps the list of live workers and sends it to the masters.  One is enough; it can be restarted at any time "
        "without disturbing a build, because workers and masters come back to it by themselves.",
    )
    port = flags.port("port", 1233, "TCP port for workers and masters")
    listen = flags.text("listen", "", "address to listen on", "ADDRESS", "all addresses of this machine")
    web_port = flags.page_port("web-port", 1230, "TCP port of the pages (which workers live, what they do)")
    web_password = flags.text(
        "web-password", "", "lets whoever knows it end and restart workers from the pages", "TEXT", "nobody can"
    )
    port_file = flags.text("port-file", "", "write the address that is listened on to this file once it is", "FILE")
    silence = flags.duration(
        "time.silence", f"{SILENCE_LIMIT_S:g}s", "a worker that sends nothing for this long is lost", 0.1, 3600
    )
    common = common_flags(flags)
    flags.parse(argv)
    if web_password.is_given and not web_password.value:
        raise UsageError("-web-password is empty; give one, or leave the flag out so that the pages take no commands")
    if web_password.is_given and web_port.value is None:
        raise UsageError("-web-password without pages: there are none with -web-port off; leave one of the two out")
    options = CoordinatorOptions(
        key=common.key(),
        host=listen.value,
        port=port.value,
        heartbeat_s=min(HEARTBEAT_S, silence.value / 4),
        silence_limit_s=silence.value,
        greeting_limit_s=10.0,
        web=web_options(web_port, listen.value),
        web_password=web_password.value,
    )

    async def serve(stop: asyncio.Event) -> int:
        coordinator = Coordinator(options)
        await coordinator.start()
        try:
            if port_file.value:
                write_port_file(Path(port_file.value), coordinator.host, coordinator.port)
            await stop.wait()
        finally:
            await coordinator.stop()
        return 0

    return common.job(serve)


if __name__ == "__main__":
    sys.exit(main())
