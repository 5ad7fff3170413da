"""Somebody on the way changes what passes: builds still end with the right bytes, and say what happened."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.farm import Farm, free_port

PATTERN = b"contents of a file! "
LARGE, LARGER = 20_000, 60_000
"""Times PATTERN: too much for one message and for one piece, and too much to come with an answer."""


def changed(data: bytes) -> bytes:
    return data.replace(PATTERN, PATTERN.swapcase(), 1)


def pump(source: socket.socket, sink: socket.socket, change: Callable[[bytes], bytes]) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(change(data))
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


@contextmanager
def man_in_the_middle(port: int, to_worker: bool) -> Iterator[None]:
    """On 127.0.0.2 he passes on what is meant for 127.0.0.1, and changes contents on their way to or from the worker."""
    listening = socket.create_server(("127.0.0.2", port))
    ends: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                master, _ = listening.accept()
            except OSError:
                return
            worker = socket.create_connection(("127.0.0.1", port))
            ends.extend((master, worker))
            for source, sink, change in [(master, worker, to_worker), (worker, master, not to_worker)]:
                args = (source, sink, changed if change else bytes)
                threading.Thread(target=pump, args=args, daemon=True).start()

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    try:
        yield
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        serving.join(10)
        for end in ends:
            end.close()


@pytest.mark.parametrize("times", [100, LARGE, LARGER])
@pytest.mark.parametrize("to_worker", [True, False], ids=["to the worker", "from the worker"])
def test_changed_contents_cost_a_try_and_never_arrive(to_worker: bool, times: int) -> None:
    farm = Farm()  # never inside SSH: there he would see nothing that he could change
    try:
        farm.coordinator()
        port = free_port()
        with man_in_the_middle(port, to_worker):
            farm.worker(2, "-advertise", "127.0.0.2", "-port", str(port))
            root = farm.dir / "project"
            root.mkdir()
            (root / "input").write_bytes(PATTERN * times)
            farm.master(root, "-fallback=fail")
            bad = farm.remote(root, "cat input input > output")
            assert bad.returncode != 0, "its only worker cannot be believed"
            assert not (root / "output").exists()
            assert str(port).encode() in bad.stderr and b"trying again elsewhere" in bad.stderr
            farm.worker(2)
            good = farm.remote(root, "cat input input > output")
        assert good.returncode == 0, good.stderr
        assert (root / "output").read_bytes() == PATTERN * times * 2
    finally:
        farm.close()
