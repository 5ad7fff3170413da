"""The HTTP server of one daemon: GET of its pages, POST of a command, and nothing else.

What is asked costs little (a page is made at most twice a second, whoever asks), what is sent is
bounded, and whatever goes wrong is a page that says so.  Pages are for everyone who can reach the
port; a command needs the password, in the body, from a page of ours.  Loop only.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import socket
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from importlib.resources import files

import msgspec
from aiohttp import web

from termite.errors import TermiteError
from termite.web import render
from termite.web.metrics import CONTENT_TYPE, Exposition
from termite.web.pages import Commands, Page, Site
from termite.web.status import Record

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
MAX_BODY_BYTES = 4096
MAX_LINE_BYTES = 4096
BODY_LIMIT_S = 5.0
FRESH_S = 0.5
"""A page that is younger than this is shown again."""

WRONG_PASSWORD_PAUSE_S = 1.0
_KEPT_PAGES = 64
_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:\d{1,5})?", re.ASCII)
_FORM = "application/x-www-form-urlencoded"
_JSON = "application/json"
_STATIC = {"style.css": "text/css", "live.js": "text/javascript", "icon.svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_http_log = logging.getLogger("termite.web.http")
_http_log.setLevel(logging.CRITICAL)  # what strangers send is theirs to worry about

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """One daemon's pages on one listening socket."""

    def __init__(self, site: Site, is_private: bool) -> None:
        self._site = site
        self._is_private = is_private  # reachable on this machine only
        self._metrics = Exposition(self._front)
        self._made: dict[tuple[str, ...], tuple[float, bytes]] = {}  # pages: when, and what
        self._wrong = asyncio.Lock()  # held while a wrong password is pondered
        self._runner = web.AppRunner(
            self._application(),
            access_log=None,
            logger=_http_log,
            handle_signals=False,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            keepalive_timeout=30.0,
            shutdown_timeout=0.5,
        )
        self._listener: asyncio.Server | None = None

    async def start(self, sock: socket.socket) -> None:
        await self._runner.setup()
        server = self._runner.server
        assert server is not None

        def accept() -> asyncio.Protocol:
            if len(held := server.connections) >= MAX_CONNECTIONS:
                held[0].force_close()  # the one that has been here for longest
            protocol: asyncio.Protocol = server()
            return protocol

        self._listener = await asyncio.get_running_loop().create_server(accept, sock=sock)

    async def stop(self) -> None:
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()

    def _front(self) -> Record:
        record = self._site.pages["/"].record("")
        assert record is not None
        return record

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        for route, page in self._site.pages.items():
            application.router.add_get(route, self._page_handler(page))
        application.router.add_get("/metrics", self._serve_metrics)
        for name, kind in _STATIC.items():
            application.router.add_get(f"/static/{name}", _static_handler(name, kind))
        application.router.add_post("/command", self._serve_command)
        return application

    # -- around every request ------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answers what is wrong with a page, and puts the headers on everything."""
        try:
            self._check_host(request)
            response = await handler(request)
        except web.HTTPException as error:
            response = self._error(request, error.status, error.text or "")
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except Exception as error:
            log.exception("%s %s", request.method, request.rel_url.raw_path, exc_info=error)
            response = self._error(request, 500, "this page could not be made; the log says why")
        response.headers.update(_HEADERS)
        return response

    def _check_host(self, request: web.Request) -> None:
        """A page that only this machine may see is not for web sites whose name was made to lead here."""
        host = request.headers.get("Host", "")
        if not _HOST.fullmatch(host):
            raise web.HTTPBadRequest(text="the Host header is missing or makes no sense")
        if self._is_private and not _is_loopback(_host_name(request)):
            raise web.HTTPForbidden(text="ask for it as localhost: these pages are for this machine only")

    def _error(self, request: web.Request, status: int, text: str) -> web.Response:
        title = HTTPStatus(status).phrase
        text = text if text and not text.startswith(f"{status}:") else _EXPLAINED.get(status, title)
        if _wants_json(request):
            body = msgspec.json.encode({"error": text})
            return web.Response(status=status, body=body, content_type=_JSON)
        html = render.error_page(self._site.program, title, text)
        return web.Response(status=status, text=html, content_type="text/html")

    # -- what there is ---------------------------------------------------------------------------------

    def _page_handler(self, page: Page) -> Handler:
        async def handler(request: web.Request) -> web.Response:
            name = request.match_info.get("name", "")
            here, is_json = _host_name(request), _wants_json(request)
            key = (page.template, name, "json" if is_json else here)
            body = self._kept(key)
            if body is None:
                record = page.record(name)
                if record is None:
                    raise web.HTTPNotFound(text=f"there is no {name[:80]!r} here, or no longer")
                body = msgspec.json.encode(record) if is_json else self._html(page, record, here, request.path)
                self._keep(key, body)
            response = web.Response(body=body, content_type=_JSON if is_json else "text/html", charset="utf-8")
            response.headers["Cache-Control"] = "no-store"
            response.headers["Vary"] = "Accept"
            return response

        return handler

    def _html(self, page: Page, record: Record, here: str, path: str) -> bytes:
        commands = self._site.commands
        html = render.page(
            page.template,
            program=self._site.program,
            status=record,
            here=here,
            path=path,
            kinds=commands.kinds if commands is not None else (),
        )
        return html.encode("utf-8", "backslashreplace")

    def _kept(self, key: tuple[str, ...]) -> bytes | None:
        made, body = self._made.get(key, (0.0, b""))
        return body if body and time.monotonic() - made < FRESH_S else None

    def _keep(self, key: tuple[str, ...], body: bytes) -> None:
        if len(self._made) >= _KEPT_PAGES:
            self._made.clear()
        self._made[key] = time.monotonic(), body

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        body = self._kept(("metrics",))
        if body is None:
            body = self._metrics.text()
            self._keep(("metrics",), body)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})

    # -- commands --------------------------------------------------------------------------------------

    async def _serve_command(self, request: web.Request) -> web.Response:
        """`do` is a kind, or a kind, a space and a worker; without the worker it goes to all."""
        commands = self._site.commands
        if commands is None:
            raise web.HTTPForbidden(text="commands are off: this program was started without -web-password")
        _check_origin(request)
        form = await _form(request)
        await self._check_password(commands, form.get("password", ""))
        kind, _, worker = form.get("do", "").partition(" ")
        if kind not in commands.kinds:
            raise web.HTTPBadRequest(text=f"there is no command {kind[:40]!r}, only {render.names(commands.kinds)}")
        try:
            said = await commands.run(kind, worker)
        except KeyError:
            raise web.HTTPNotFound(text=f"there is no worker {worker[:80]!r} here, or no longer") from None
        except TermiteError as error:
            raise web.HTTPBadGateway(text=str(error)) from None
        self._made.clear()
        log.info("from a page, by %s: %s", request.remote, said)
        if _wants_json(request):
            return web.Response(body=msgspec.json.encode({"done": said}), content_type=_JSON)
        return web.Response(status=303, headers={"Location": "/"})

    async def _check_password(self, commands: Commands, given: str) -> None:
        """One wrong one per second, over all who try."""
        if self._wrong.locked():
            raise web.HTTPTooManyRequests(text="somebody has just given a wrong password; try again in a second")
        if _is_same(given, commands.password):
            return
        async with self._wrong:
            log.warning("a page was sent a wrong password")
            await asyncio.sleep(WRONG_PASSWORD_PAUSE_S)
        raise web.HTTPForbidden(text="the password is wrong; it is the one given as -web-password")


_EXPLAINED = {
    400: "the request makes no sense",
    404: "there is no such page here",
    405: "pages are for looking at, with GET",
    413: "the request is too long",
}


async def serve(site: Site, sock: socket.socket) -> Server:
    """Serves on a listening socket, which is the server's from now on."""
    sock.setblocking(False)
    server = Server(site, _is_loopback(sock.getsockname()[0]))
    await server.start(sock)
    return server


def _static_handler(name: str, kind: str) -> Handler:
    body = (files("termite.web") / "static" / name).read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'

    async def handler(request: web.Request) -> web.Response:
        headers = {"Cache-Control": "no-cache", "ETag": tag}
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)

    return handler


def _wants_json(request: web.Request) -> bool:
    accept = request.headers.get("Accept", "")
    return "json" in request.rel_url.query or (_JSON in accept and "text/html" not in accept)


def _host_name(request: web.Request) -> str:
    """As the browser calls us, without the port."""
    found = _HOST.fullmatch(request.headers.get("Host", ""))
    return found[1].strip("[]") if found else ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in ("localhost", "ip6-localhost")


def _check_origin(request: web.Request) -> None:
    """A form on somebody else's page must not command here, whatever password it found."""
    origin = request.headers.get("Origin")
    if origin is not None and origin != f"http://{request.headers.get('Host')}":
        raise web.HTTPForbidden(text="this form came from another web site")
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        raise web.HTTPForbidden(text="this form came from another web site")


async def _form(request: web.Request) -> dict[str, str]:
    if request.query_string.replace("json", ""):
        raise web.HTTPBadRequest(text="a command has no parameters in its address")
    if request.content_type != _FORM:
        raise web.HTTPBadRequest(text=f"send a form, as {_FORM}")
    try:
        async with asyncio.timeout(BODY_LIMIT_S):
            form = await request.post()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text="the form did not arrive in time") from None
    except (ValueError, LookupError):
        raise web.HTTPBadRequest(text="the form makes no sense") from None
    return {name: value for name, value in form.items() if isinstance(value, str)}


def _is_same(given: str, expected: str) -> bool:
    """Takes the same time, however much of it is right."""
    digests = [hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (given, expected)]
    return hmac.compare_digest(*digests)
