"""The pages of one daemon: which there are, where they are served, and when.

Light to import: the server behind it (`server.py`, a fifth of a second of imports) is loaded on a
thread once the port is taken, so that a daemon is ready for its work first.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from termite.errors import TermiteError
from termite.web.status import Record
from termite.wire.address import bind, format_address

log = logging.getLogger(__name__)

BACKLOG = 64


@dataclass(frozen=True)
class WebOptions:
    """Where to serve pages; a daemon that has None of it serves none."""

    host: str  # address to listen on; empty: all
    port: int  # 0: any free one
    retries: int = 0  # ports after it to try
    or_any: bool = False  # if it is taken: any free one, instead of an error
    flag: str = "-web-port"  # to be named in messages


@dataclass(frozen=True)
class Page:
    """`record` gets the name in the address ("" where there is none); None: there is no such thing."""

    template: str
    record: Callable[[str], Record | None]


@dataclass(frozen=True)
class Commands:
    """What the pages may be used to do, by whoever knows the password."""

    password: str = field(repr=False)
    kinds: tuple[str, ...]
    run: Callable[[str, str], Awaitable[str]]  # (kind, worker; "": all) -> what was done; TermiteError if it was not


@dataclass(frozen=True)
class Site:
    """`pages` by route: "/", "/log", "/worker/{name}"; the record of "/" is what `/metrics` shows."""

    program: str
    pages: Mapping[str, Page]
    commands: Commands | None = None


class Served(Protocol):
    """A server at work."""

    async def stop(self) -> None: ...


class PageServer:
    """`start`, then `stop`."""

    def __init__(self, options: WebOptions | None, site: Site) -> None:
        self.port = 0  # 0: no pages
        self.host = ""
        self._options = options
        self._site = site
        self._serving: asyncio.Task[Served] | None = None

    def start(self) -> None:
        """Takes the port; TermiteError with the remedy if it cannot be had.  Pages are there a moment later."""
        options = self._options
        if options is None:
            return
        try:
            sock = bind(options.host, options.port, options.retries, BACKLOG, options.flag)
        except TermiteError:
            if not options.or_any:
                raise
            sock = bind(options.host, 0, 0, BACKLOG, options.flag)
        self.host, self.port = sock.getsockname()[:2]
        self._serving = asyncio.get_running_loop().create_task(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> Served:
        try:
            server = await asyncio.to_thread(importlib.import_module, "termite.web.server")
            served: Served = await server.serve(self._site, sock)
        except BaseException:
            sock.close()
            raise
        shown = "localhost" if self.host in ("::", "0.0.0.0") else self.host
        log.info("pages at http://%s/", format_address(shown, self.port))
        return served

    async def ready(self) -> None:
        """Returns when pages are served."""
        if self._serving is not None:
            await asyncio.shield(self._serving)

    async def stop(self) -> None:
        serving, self._serving = self._serving, None
        if serving is None:
            return
        try:
            served = await serving
        except Exception as error:
            log.error("no pages: %s", error)
            return
        await served.stop()
