from __future__ import annotations

import os
import socket
import subprocess
import sys

from termite.cli.restart import VARIABLE, kept_socket

PROGRAM = """
import socket, sys
from termite.cli.restart import kept_socket, restart
sock = kept_socket(0)
if sock is None:
    sock = socket.create_server(("127.0.0.1", 0))
    socket.create_connection(sock.getsockname()).sendall(b"waited")
    print(sock.getsockname()[1], flush=True)
    restart(sock)
print(sock.getsockname()[1], sock.accept()[0].recv(10).decode(), sys.argv[1:])
"""


def test_a_restarted_program_keeps_its_arguments_and_the_connections_that_wait() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "-flag", "a b"], capture_output=True, text=True, timeout=30, check=True
    )
    first, second = done.stdout.splitlines()
    assert second == f"{first} waited ['-flag', 'a b']"


def test_a_socket_meant_for_another_process_is_not_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        environ = {VARIABLE: f"{os.getpid() + 1}:{sock.fileno()}"}
        assert kept_socket(0, environ) is None
        assert VARIABLE not in environ


def test_nonsense_is_not_taken() -> None:
    for value in ("", "x", f"{os.getpid()}:", f"{os.getpid()}:x", f"{os.getpid()}:99999", f"{os.getpid()}:-1"):
        assert kept_socket(0, {VARIABLE: value}) is None, value


def test_a_socket_that_does_not_listen_is_not_taken() -> None:
    sock = socket.socket()
    number = sock.detach()
    assert kept_socket(0, {VARIABLE: f"{os.getpid()}:{number}"}) is None
