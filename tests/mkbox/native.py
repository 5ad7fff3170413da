"""A master made of a few functions, for tests of the programs around make.

It listens on a real `.termite-socket`, keeps every request, and lets the test's own function answer.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "mkbox"
RUN, REFRESH, SHUTDOWN, INSPECT, LOCAL, SUMMARY = 1, 2, 3, 4, 5, 6
DEBUG, MERGED, STDIN = 1, 2, 4
RECURSE = 1


def build(into: Path) -> Path:
    """Compiles the programs around make as CMakeLists.txt does; returns INTO."""
    shared = [SOURCES / "client.c", SOURCES / "inplace.c"]
    interposer = [SOURCES / "interpose.c", SOURCES / "summary.c"]
    flags = ["-O2", "-Wall", "-Wextra", "-Werror"]
    static = [*flags, "-static", "-no-pie"]
    commands: list[list[str | Path]] = [
        ["gcc", *static, "-o", into / "termite-shell-wrapper", SOURCES / "shell_wrapper.c", *shared],
        ["gcc", *static, "-o", into / "termite-make", SOURCES / "launch.c", *shared],
        ["gcc", *static, "-DLAUNCH_RUN", "-o", into / "termite-run", SOURCES / "launch.c", *shared],
        ["gcc", *flags, "-shared", "-fPIC", "-o", into / "libtermite-interpose.so", *interposer, "-ldl"],
    ]
    for command in commands:
        subprocess.run(command, check=True, timeout=100)
    return into


@dataclass
class Request:
    kind: int
    flags: int
    umask: int
    cwd: bytes
    program: bytes
    worker: bytes
    argv: list[bytes]
    env: dict[bytes, bytes]

    @classmethod
    def parse(cls, body: bytes) -> Request:
        kind, flags, reserved, umask, argc, envc = struct.unpack_from("<BBHIII", body)
        strings = body[16:].split(b"\0")
        assert reserved == 0
        assert strings.pop() == b"", "the last string ends with NUL"
        assert len(strings) == 3 + argc + envc
        env = dict(entry.split(b"=", 1) for entry in strings[3 + argc :])
        return cls(kind, flags, umask, strings[0], strings[1], strings[2], strings[3 : 3 + argc], env)


class Caller:
    """The wrapper's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def frame(self, kind: bytes, payload: bytes = b"") -> None:
        self.sock.sendall(kind + struct.pack("<I", len(payload)) + payload)

    def exit(self, status: int) -> None:
        self.frame(b"X", struct.pack("<i", status))

    def local(self, flags: int = 0) -> None:
        self.frame(b"L", bytes([flags]))

    def want_stdin(self) -> bytes:
        self.frame(b"W")
        kind, length = struct.unpack("<cI", self.exactly(5))
        assert kind == b"S"
        return self.exactly(length)

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def wait_for_hangup(self) -> None:
        assert self.sock.recv(1) == b""


Answer = Callable[[Request, Caller], None]


class FakeMaster:
    """Listens in DIRECTORY until closed; each connection in a thread of its own."""

    def __init__(self, directory: Path | str, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.summary = b""  # what a build hears of itself at its end
        self.summaries: list[Request] = []  # who asked for that
        self.failures: list[BaseException] = []
        self.path = os.path.join(directory, ".termite-socket")
        self._listener = socket.socket(socket.AF_UNIX)
        at = os.open(directory, os.O_PATH)
        try:
            self._listener.bind(f"/proc/self/fd/{at}/.termite-socket")  # the path itself may be too long
        finally:
            os.close(at)
        self._listener.listen(64)
        self._listener.settimeout(60)
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(60)
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                caller = Caller(sock)
                magic, length = struct.unpack("<4sI", caller.exactly(8))
                assert magic == b"TMW1"
                request = Request.parse(caller.exactly(length))
                if request.kind == SUMMARY:
                    self.summaries.append(request)
                    if self.summary:
                        caller.frame(b"M", self.summary)
                    caller.exit(0)
                    return
                self.requests.append(request)
                self.answer(request, caller)
            except BrokenPipeError:
                pass
            except BaseException as e:  # a thread's failure must fail its test
                self.failures.append(e)

    def of_kind(self, kind: int) -> list[Request]:
        return [request for request in self.requests if request.kind == kind]

    @property
    def commands(self) -> list[list[bytes]]:
        """argv of everything that was to be run."""
        return [request.argv for request in self.of_kind(RUN)]

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(60)
        assert not self.failures, self.failures


def execute(request: Request, caller: Caller) -> None:
    """A master that is its own worker: runs the command as the request says, recursive makes in place."""
    if request.kind == LOCAL:
        return caller.local()
    if request.kind != RUN:
        return caller.exit(0)
    if any(b"termite-make" in arg for arg in request.argv):
        return caller.local(RECURSE)
    ours = (b"LD_PRELOAD", b"TERMITE_WRAPPER", b"TERMITE_SOCKET")
    result = subprocess.run(
        request.argv,
        executable=request.program or None,
        cwd=request.cwd,
        env={name: value for name, value in request.env.items() if name not in ours} | {b"DISTRIBUTED": b"yes"},
        umask=request.umask,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=60,
    )
    caller.frame(b"O", result.stdout)
    caller.frame(b"E", result.stderr)
    status = result.returncode
    return caller.exit(-status if status < 0 else status << 8)
