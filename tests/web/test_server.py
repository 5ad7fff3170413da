"""Pages over HTTP: what is answered, what is refused, and with which headers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from termite.errors import PeerLost, TermiteError
from termite.web import server
from termite.web.pages import Commands, Page, PageServer, Site, WebOptions
from termite.web.status import Record
from tests.web import records
from tests.wire.conftest import Run

PASSWORD = "a pässword"


class Running:
    """A site at work, and what it was told to do."""

    def __init__(self, template: str, record: Callable[[], Record], password: str = "") -> None:
        self.told: list[tuple[str, str]] = []
        pages = {
            "/": Page(template, lambda _: record()),
            "/log": Page("log.html", lambda _: records.log()),
            "/worker/{name:.+}": Page(
                "coordinator_worker.html", lambda name: records.listed() if name == records.NASTY else None
            ),
            "/broken": Page("log.html", lambda _: 1 / 0),  # type: ignore[arg-type, return-value]
        }
        commands = Commands(password, ("kill", "restart"), self._command) if password else None
        self.pages = PageServer(WebOptions("127.0.0.1", 0), Site("coordinator", pages, commands))

    async def _command(self, kind: str, worker: str) -> str:
        if worker == "unknown":
            raise KeyError(worker)
        if worker == "gone":
            raise PeerLost("lost <worker>")
        self.told.append((kind, worker))
        return "done"

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.pages.port}{path}"


@asynccontextmanager
async def serving(
    template: str = "coordinator.html", record: Callable[[], Record] = records.coordinator, password: str = ""
) -> AsyncIterator[tuple[Running, aiohttp.ClientSession]]:
    running = Running(template, record, password)
    running.pages.start()
    await running.pages.ready()
    try:
        async with aiohttp.ClientSession() as session:
            yield running, session
    finally:
        await running.pages.stop()


DAEMONS: list[tuple[str, Callable[[], Record]]] = [
    ("coordinator.html", records.coordinator),
    ("worker.html", records.worker),
    ("master.html", records.master),
]


@pytest.mark.parametrize(("template", "record"), DAEMONS)
def test_json_and_page_are_at_one_address(run: Run, template: str, record: Callable[[], Record]) -> None:
    async def scenario() -> None:
        async with serving(template, record) as (running, session):
            async with session.get(running.url("/?json")) as answer:
                assert answer.content_type == "application/json"
                assert msgspec.json.decode(await answer.read(), type=type(record())) == record()
            async with session.get(running.url("/"), headers={"Accept": "application/json"}) as answer:
                assert msgspec.json.decode(await answer.read(), type=type(record())) == record()
            async with session.get(running.url("/"), headers={"Accept": "text/html, application/json"}) as answer:
                assert answer.content_type == "text/html" and answer.headers["Vary"] == "Accept"

    run(scenario())


@pytest.mark.parametrize(("template", "record"), DAEMONS)
def test_prometheus_understands_the_metrics(run: Run, template: str, record: Callable[[], Record]) -> None:
    async def scenario() -> None:
        async with serving(template, record) as (running, session), session.get(running.url("/metrics")) as answer:
            families = {family.name: family for family in text_string_to_metric_families(await answer.text())}
        daemon = template.removesuffix(".html")
        assert f"termite_{daemon}_up_seconds" in families
        assert all(name.startswith(f"termite_{daemon}_") for name in families)
        if daemon == "coordinator":
            slots = families["termite_coordinator_worker_slots"].samples
            assert [(s.labels["worker"], s.value) for s in slots] == [(records.NASTY, 4), ("new", 4)]
        else:
            took = {s.name: s.value for s in families[f"termite_{daemon}_phase_seconds"].samples}
            assert took[f"termite_{daemon}_phase_seconds_count"] == 2
            assert took[f"termite_{daemon}_phase_seconds_sum"] == 2.0
        if daemon == "master":
            told = {s.labels.get("le"): s.value for s in families["termite_master_told_file_bytes"].samples}
            assert told["1.0"] == 2 and told["+Inf"] == 4

    run(scenario())


def test_everything_carries_the_headers_that_keep_pages_ours(run: Run) -> None:
    async def scenario() -> None:
        async with serving() as (running, session):
            for path in ("/", "/?json", "/metrics", "/nothing", "/static/style.css", "/broken"):
                async with session.get(running.url(path)) as answer:
                    assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'; ")
                    assert answer.headers["X-Content-Type-Options"] == "nosniff"
                    assert answer.headers["X-Frame-Options"] == "DENY"

    run(scenario())


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/nothing", 404, "there is no such page"),
        ("/worker/nobody", 404, "there is no &#39;nobody&#39; here"),
        ("/worker/%3Cscript%3Ex", 404, "&lt;script&gt;"),
        ("/worker/..%2F..%2Fetc%2Fpasswd", 404, "etc/passwd"),
        ("/static/../server.py", 404, "there is no such page"),
        ("/static/%2e%2e/server.py", 404, "there is no such page"),
        ("/%00", 404, "there is no such page"),
        ("/%ff%fe", 404, "there is no such page"),
        ("/broken", 500, "the log says why"),
        ("/command", 405, "with GET"),
    ],
)
def test_what_is_not_there_is_a_clear_page(run: Run, path: str, status: int, says: str) -> None:
    async def scenario() -> None:
        async with serving() as (running, session):
            url = aiohttp.client.URL(running.url(path), encoded=True)
            async with session.get(url) as answer:
                text = await answer.text()
                assert (answer.status, answer.content_type) == (status, "text/html")
                assert says in text and "Traceback" not in text and "<script>x" not in text
            async with session.get(url, headers={"Accept": "application/json"}) as answer:
                assert answer.status == status and set(await answer.json()) == {"error"}

    run(scenario())


def test_a_worker_with_a_hostile_name_has_a_page(run: Run) -> None:
    async def scenario() -> None:
        async with serving() as (running, session):
            name = "".join(f"%{byte:02X}" for byte in records.NASTY.encode())
            url = aiohttp.client.URL(running.url(f"/worker/{name}?json"), encoded=True)
            async with session.get(url) as answer:
                assert (await answer.json())["name"] == records.NASTY

    run(scenario())


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "POST"])
def test_nothing_but_get_is_taken(run: Run, method: str) -> None:
    async def scenario() -> None:
        async with serving() as (running, session), session.request(method, running.url("/")) as answer:
            assert answer.status == 405 and "GET" in answer.headers["Allow"]

    run(scenario())


async def raw(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        async with asyncio.timeout(10):
            return await reader.read(4096)
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 10_000 + b"\r\n\r\n", b"400"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: a<b>\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"403"),
        (b"GET / HTTP/1.1\r\nHost: localhost:1\r\n\r\n", b"200"),
    ],
)
def test_hostile_requests_are_refused_in_one_line(
    run: Run, caplog: pytest.LogCaptureFixture, request_bytes: bytes, status: bytes
) -> None:
    async def scenario() -> None:
        async with serving() as (running, _):
            answer = await raw(running.pages.port, request_bytes)
            assert answer.split(b" ", 2)[1] == status, answer
            assert b"Traceback" not in answer

    run(scenario())
    assert "Traceback" not in caplog.text


def test_the_longest_idle_connection_makes_way(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving() as (running, session):
            monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
            idle = [await asyncio.open_connection("127.0.0.1", running.pages.port) for _ in range(5)]
            async with asyncio.timeout(10):
                assert await idle[0][0].read() == b""
            async with session.get(running.url("/")) as answer:
                assert answer.status == 200
            for _, writer in idle:
                writer.close()

    run(scenario())


# -- commands ---------------------------------------------------------------------------------------


def form(do: str, password: str = PASSWORD) -> dict[str, str]:
    return {"do": do, "password": password}


def test_a_command_reaches_a_worker_or_all(run: Run) -> None:
    async def scenario() -> None:
        async with serving(password=PASSWORD) as (running, session):
            url = running.url("/command")
            async with session.post(url, data=form("kill a worker"), allow_redirects=False) as answer:
                assert (answer.status, answer.headers["Location"]) == (303, "/")
            origin = {"Origin": running.url(""), "Sec-Fetch-Site": "same-origin"}
            async with session.post(url, data=form("restart"), headers=origin) as answer:
                assert answer.status == 200
            assert running.told == [("kill", "a worker"), ("restart", "")]

    run(scenario())


@pytest.mark.parametrize(
    ("data", "headers", "query", "status"),
    [
        (form("kill w", "wrong"), {}, "", 403),
        (form("kill w", ""), {}, "", 403),
        ({"do": "kill w"}, {}, "", 403),
        (form("format w"), {}, "", 400),
        ({"password": PASSWORD}, {}, "", 400),
        (form("kill unknown"), {}, "", 404),
        (form("kill gone"), {}, "", 502),
        (form("kill w"), {"Origin": "http://evil.example"}, "", 403),
        (form("kill w"), {"Origin": "null"}, "", 403),
        (form("kill w"), {"Sec-Fetch-Site": "cross-site"}, "", 403),
        (form("kill w"), {}, "?password=x", 400),
        (form("x" * 10_000), {}, "", 413),
    ],
)
def test_a_command_is_refused_without_its_due(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    data: dict[str, str],
    headers: dict[str, str],
    query: str,
    status: int,
) -> None:
    monkeypatch.setattr(server, "WRONG_PASSWORD_PAUSE_S", 0.0)

    async def scenario() -> None:
        async with serving(password=PASSWORD) as (running, session):
            async with session.post(running.url("/command") + query, data=data, headers=headers) as answer:
                assert answer.status == status, await answer.text()
                assert PASSWORD not in await answer.text()
            assert running.told == []

    run(scenario())


def test_a_body_that_is_no_form_is_refused(run: Run) -> None:
    async def scenario() -> None:
        async with serving(password=PASSWORD) as (running, session):
            url = running.url("/command")
            async with session.post(url, json={"do": "kill"}) as answer:
                assert answer.status == 400
            upload = aiohttp.FormData(form("kill w"), default_to_multipart=True)
            async with session.post(url, data=upload) as answer:
                assert answer.status == 400
            assert running.told == []

    run(scenario())


def test_without_a_password_nothing_can_be_commanded(run: Run) -> None:
    async def scenario() -> None:
        async with serving() as (running, session):
            async with session.post(running.url("/command"), data=form("kill", "")) as answer:
                assert answer.status == 403 and "-web-password" in await answer.text()
            assert running.told == []

    run(scenario())


def test_who_guesses_waits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "WRONG_PASSWORD_PAUSE_S", 0.3)

    async def scenario() -> None:
        async with serving(password=PASSWORD) as (running, session):

            async def guess(password: str) -> int:
                async with session.post(running.url("/command"), data=form("kill", password)) as answer:
                    return answer.status

            assert sorted(await asyncio.gather(*(guess(str(n)) for n in range(4)))) == [403, 429, 429, 429]
            assert await guess(PASSWORD) == 200

    run(scenario())


# -- ports ------------------------------------------------------------------------------------------


def test_a_taken_port_is_an_error_when_it_was_asked_for_and_another_when_not(run: Run) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            site = Site("worker", {"/": Page("worker.html", lambda _: records.worker())})
            with pytest.raises(TermiteError, match="choose another -web-port"):
                PageServer(WebOptions("127.0.0.1", port), site).start()
            pages = PageServer(WebOptions("127.0.0.1", port, or_any=True), site)
            pages.start()
            assert pages.port not in (0, port)
            await pages.stop()
            off = PageServer(None, site)
            off.start()
            assert off.port == 0
            await off.stop()

    run(scenario())
