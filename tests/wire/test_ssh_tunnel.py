"""The tunnel itself: handed over, held up, broken, and ended with its program."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import paramiko
import pytest

from termite.errors import PeerLost, WireError
from termite.wire import ssh, transport
from termite.wire.auth import Purpose
from termite.wire.framing import Session
from termite.wire.messages import Ok, ReadDir, StatusText
from termite.wire.rpc import Connection, Reply
from termite.wire.secret import load_secret
from termite.wire.transport import Accepted
from tests.wire.conftest import Pair, sessions, tcp_pair
from tests.wire.inside_ssh import (
    MIB,
    REPO,
    dial,
    echo,
    key_file,
    nothing_left,  # noqa: F401  (a fixture)
    pair,  # noqa: F401  (a fixture)
    relay,
    secret,
    serving,
    told,
    tunnel,
)
from tests.wire.test_transport import read_to_end

# -- the tunnel -----------------------------------------------------------------------------------


def test_a_handed_over_socket_goes_on_with_what_was_exported(run: Any) -> None:
    async def body() -> None:
        handed: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()

        def on_accept(accepted: Accepted) -> None:
            assert accepted.local_host == "127.0.0.1"
            with accepted.sock:
                handed.put_nowait((os.dup(accepted.sock.fileno()), accepted.session.export()))

        listener = await transport.listen("127.0.0.1", 0, secret(), on_accept)
        ours = await dial(listener, purpose=Purpose.MASTER_MIRROR)
        call = asyncio.create_task(ours.call(ReadDir(b"early"), timeout_s=5))  # before anyone reads it
        fd, state = await handed.get()
        await listener.close()
        theirs = await Connection.from_socket(socket.socket(fileno=fd), Session.restore(state), echo)
        assert (await call).message == StatusText(b"early")
        await ours.close()
        await theirs.wait_closed()

    run(body())


def test_another_process_carries_on_and_its_death_is_noticed(run: Any) -> None:
    program = (
        "import socket, sys\n"
        "sock = socket.socket(fileno=int(sys.argv[1]))\n"
        "sock.setblocking(True)\n"
        "sock.sendall(sock.recv(100).upper())\n"
    )

    async def body() -> None:
        a, b = await tunnel()
        child = subprocess.Popen([sys.executable, "-c", program, str(b.fileno())], pass_fds=[b.fileno()])
        b.close()
        a.setblocking(False)
        with a:
            await asyncio.get_running_loop().sock_sendall(a, b"hello")
            assert await read_to_end(a) == b"HELLO"
        assert child.wait(5) == 0

    run(body())


def test_all_that_was_written_before_the_end_arrives(run: Any) -> None:
    data = os.urandom(20 * MIB)

    async def body() -> None:
        loop = asyncio.get_running_loop()
        a, b = await tunnel()
        a.setblocking(False)
        b.setblocking(False)

        async def write() -> None:
            with a:
                await loop.sock_sendall(a, data)

        writing = asyncio.create_task(write())
        received = bytearray()
        with b:
            while piece := await loop.sock_recv(b, MIB):
                received += piece
        await writing
        assert received == data

    run(body())


def test_a_reader_that_stands_still_stops_the_writer(run: Any) -> None:
    async def body() -> None:
        a, b = await tunnel()
        a.settimeout(0.5)

        def write() -> int:
            written = 0
            try:
                while True:
                    written += a.send(bytes(MIB))
            except TimeoutError:
                return written

        written = await asyncio.to_thread(write)
        assert ssh._WINDOW_BYTES <= written < ssh._WINDOW_BYTES + 16 * MIB
        a.close()
        b.close()

    run(body())


def test_new_keys_are_agreed_on_while_both_ends_send(
    run: Any,
    pair: Pair,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agree, agreements = paramiko.Transport._send_kex_init, list[object]()
    monkeypatch.setattr(paramiko.Transport, "_send_kex_init", lambda self: (agreements.append(self), agree(self)))
    monkeypatch.setattr(ssh._Packetizer, "REKEY_BYTES", 2 * MIB)
    data = os.urandom(8 * MIB)

    async def body() -> None:
        async with pair(echo, echo) as (ours, theirs):
            for _ in range(2):
                replies = await asyncio.gather(
                    *(end.call(ReadDir(b"x"), body=data, timeout_s=20) for end in (ours, theirs) for _ in range(2))
                )
                assert all(reply.body == data for reply in replies)

    run(body())
    assert len(agreements) > 4  # two are the first ones


@pytest.mark.parametrize("how", ["the peer ends", "the network breaks"])
def test_an_end_in_the_middle_of_a_transfer_is_a_lost_peer(run: Any, how: str) -> None:
    async def body() -> None:
        ours, theirs = tcp_pair()
        far = tcp_pair()
        relays = [asyncio.create_task(relay(ours, far[0])), asyncio.create_task(relay(far[0], ours))]
        a, b = await asyncio.gather(ssh.dial(theirs, secret()), ssh.accept(far[1], secret()))
        session_a, session_b = sessions()
        begun = asyncio.Event()
        conn_a = await Connection.from_socket(a, session_a)
        conn_b = await Connection.from_socket(b, session_b, lambda *_: Reply(Ok(), bytes(100 * MIB)))
        call = asyncio.create_task(conn_a.call(Ok(), timeout_s=10, sink=lambda _: begun.set()))
        await begun.wait()
        if how == "the peer ends":
            conn_b.abort("gone")
        else:
            for sock in (ours, far[0]):
                sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(PeerLost):
            await call
        await conn_a.wait_closed()
        await conn_b.wait_closed()
        await asyncio.gather(*relays)
        ours.close()
        far[0].close()

    run(body())


def test_a_byte_changed_on_the_way_ends_the_tunnel_and_is_told(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        ours, theirs = tcp_pair()
        far = tcp_pair()
        relays = [
            asyncio.create_task(relay(ours, far[0], flip_at=500_000)),
            asyncio.create_task(relay(far[0], ours)),
        ]
        a, b = await asyncio.gather(ssh.dial(theirs, secret()), ssh.accept(far[1], secret()))
        loop = asyncio.get_running_loop()
        a.setblocking(False)
        b.setblocking(False)
        with a, b:
            sending = asyncio.create_task(loop.sock_sendall(a, b"w" * MIB))
            received = await read_to_end(b)
            assert len(received) < MIB and set(received) <= set(b"w")
            await asyncio.gather(sending, return_exceptions=True)
        await asyncio.gather(*relays)
        ours.close()
        far[0].close()
        await told(caplog, "the SSH tunnel with 127.0.0.1:")

    run(body())


def test_a_program_that_ends_has_said_goodbye(run: Any, tmp_path: Path) -> None:
    path = key_file(tmp_path / "key")
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from termite.wire import transport\n"
        "from termite.wire.secret import load_secret\n"
        "async def main():\n"
        "    key = load_secret(Path(sys.argv[1]))\n"
        "    conn = await transport.dial('127.0.0.1', int(sys.argv[2]), key, transport.Purpose.CONTROL)\n"
        "    await conn.close('bye for now')\n"
        "asyncio.run(main())\n"
    )

    async def body() -> None:
        ends: asyncio.Queue[str] = asyncio.Queue()

        async def on_accept(accepted: Accepted) -> None:
            conn = await accepted.connect()
            await conn.wait_closed()
            ends.put_nowait(conn.close_reason)

        listener = await transport.listen("127.0.0.1", 0, load_secret(path, {}), on_accept)
        arguments = (sys.executable, "-W", "error", "-c", program, path, str(listener.port))
        child = await asyncio.create_subprocess_exec(*arguments, cwd=REPO)
        assert await ends.get() == "closed by the other side: bye for now"
        assert await child.wait() == 0
        await listener.close()

    run(body())


def test_a_program_that_ends_is_not_held_up_by_its_tunnels(run: Any, tmp_path: Path) -> None:
    path = key_file(tmp_path / "key")
    program = (
        "import asyncio, sys, time\n"
        "from pathlib import Path\n"
        "from termite.wire import transport\n"
        "from termite.wire.secret import load_secret\n"
        "async def main():\n"
        "    key = load_secret(Path(sys.argv[1]))\n"
        "    return await transport.dial('127.0.0.1', int(sys.argv[2]), key, transport.Purpose.CONTROL)\n"
        "loop = asyncio.new_event_loop()\n"
        "conn = loop.run_until_complete(main())\n"
        "print('ends', flush=True)\n"
    )

    async def body() -> None:
        async with serving(load_secret(path, {})) as listener:
            arguments = (sys.executable, "-W", "ignore", "-c", program, path, str(listener.port))
            child = await asyncio.create_subprocess_exec(*arguments, cwd=REPO, stdout=subprocess.PIPE)
            assert child.stdout is not None
            assert await child.stdout.readline() == b"ends\n"
            assert await asyncio.wait_for(child.wait(), 5) == 0
            child._transport.close()  # type: ignore[attr-defined]

    run(body())


def test_a_thread_that_cannot_be_started_is_a_lost_peer(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def body() -> None:
        ours, theirs = tcp_pair()
        monkeypatch.setattr(ssh._Tunnel, "start", start)
        with theirs, pytest.raises(PeerLost, match="can't start new thread"):
            await ssh.dial(ours, secret())

    run(body())


def test_what_paramiko_stumbles_over_is_one_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: Any) -> None:
        raise paramiko.SSHException("two\nlines")

    async def body() -> None:
        ours, theirs = tcp_pair()
        monkeypatch.setattr(ssh, "_transport", stumble)
        with theirs, pytest.raises(WireError, match="broke the SSH protocol: two lines"):
            await ssh.dial(ours, secret())

    run(body())
