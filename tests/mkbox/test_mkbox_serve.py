"""mkbox --serve: boxes made by a server are like any other, and leave the server as it was."""

from __future__ import annotations

import array
import inspect
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.mkbox import test_mkbox, test_mkbox_direct
from tests.mkbox.boxing import PATH, PROJECT, Argument, Boxes, Finished, mounts, processes_with

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="making a box needs root"),
    pytest.mark.timeout(120),
]

PACKET_LIMIT = 256 * 1024
DESCRIPTOR_LIMIT = 93
ENV, STATUS, ERROR, TASK, MNT_NS, NET_NS, LOWER = range(10, 17)


def until_end(fd: int) -> bytes:
    """Everything until nobody holds the other end; closes ours."""
    with os.fdopen(fd, "rb", buffering=0) as pipe:
        return pipe.read()


class Server:
    def __init__(self, program: str, inherited: Sequence[int] = ()) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_LIMIT)
        self.socket.settimeout(30)
        fds = [theirs.fileno(), *inherited]
        self.process = subprocess.Popen([program, "--serve", str(fds[0])], env={}, pass_fds=fds, restore_signals=False)
        theirs.close()

    def send(self, packet: bytes, descriptors: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.socket.sendmsg([packet], rights)

    def kill(self, number: int) -> None:
        self.send(b"K" + struct.pack("<I", number))

    def answer(self) -> tuple[int, str]:
        packet = self.socket.recv(4096)
        assert packet[:1] == b"E", packet
        return struct.unpack_from("<I", packet, 1)[0], packet[5:].decode()

    def descriptors(self) -> dict[str, str]:
        directory = f"/proc/{self.process.pid}/fd"
        return {name: os.readlink(f"{directory}/{name}").split(":")[0] for name in os.listdir(directory)}

    def children(self) -> str:
        return Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()

    def close(self) -> None:
        self.socket.close()
        self.process.wait(30)


@dataclass
class Running:
    """A box that has been asked for, and our ends of its pipes."""

    number: int
    stdout: int
    stderr: int
    status: int
    error: int

    def finish(self) -> Finished:
        with ThreadPoolExecutor(4) as pool:
            out, err, told, error = pool.map(until_end, (self.stdout, self.stderr, self.status, self.error))
        assert len(told) in (0, 12)
        status, cpu_us = struct.unpack("<iQ", told) if told else (None, 0)
        return Finished(0 if told else 125, out, err, status, cpu_us, error)


@dataclass
class ServedBoxes(Boxes):
    server: Server = field(kw_only=True)

    def packet(
        self, number: int, argv: Sequence[Argument], options: Sequence[Argument] = (), project: bytes = PROJECT
    ) -> bytes:
        own = ["--upper", f"/proc/self/fd/{TASK}/u", "--work", f"/proc/self/fd/{TASK}/w"]
        own += ["--status-fd", str(STATUS), "--error-fd", str(ERROR)]
        given = Boxes(self.mkbox, self.base, MNT_NS, NET_NS)
        line = given.command_line(argv, [*own, *options], LOWER, ENV, project)
        return b"R" + struct.pack("<I", number) + b"".join(os.fsencode(word) + b"\0" for word in line)

    def start(
        self,
        *argv: Argument,
        options: Sequence[Argument] = (),
        env: Sequence[bytes] = (PATH,),
        project: bytes = PROJECT,
        lower: bytes | None = None,
        stdin: int = subprocess.DEVNULL,
        extra_fds: Sequence[int] = (),
        number: int | None = None,
    ) -> Running:
        (out, out_w), (err, err_w), (status, status_w), (error, error_w) = (os.pipe() for _ in range(4))
        null, env_fd = os.open("/dev/null", os.O_RDONLY), os.memfd_create("environment")
        os.write(env_fd, b"".join(entry + b"\0" for entry in env))
        task = os.open(self.new_task(), os.O_PATH)
        lower_fd = os.open(lower if lower is not None else self.outside(project), os.O_PATH)
        passed = [null if stdin == subprocess.DEVNULL else stdin, out_w, err_w]
        passed += [env_fd, status_w, error_w, task, self.mnt_ns, self.net_ns, lower_fd, *extra_fds]
        number = len(self.tasks) if number is None else number
        self.server.send(self.packet(number, argv, options, project), passed)
        for fd in (null, out_w, err_w, env_fd, status_w, error_w, task, lower_fd):
            os.close(fd)
        return Running(number, out, err, status, error)

    def run(self, *argv: Argument, close_status: bool = False, **how: object) -> Finished:
        assert not close_status
        return self.start(*argv, **how).finish()  # type: ignore[arg-type]


@pytest.fixture
def served(boxes: Boxes) -> Iterator[ServedBoxes]:
    server = Server(boxes.mkbox)
    yield ServedBoxes(boxes.mkbox, boxes.base, boxes.mnt_ns, boxes.net_ns, boxes.tasks, server=server)
    server.close()


# -- as the plain mode ---------------------------------------------------------------------------------

OF_THE_PLAIN_MODE_ALONE = {
    test_mkbox.test_a_parent_that_died_before_mkbox_could_notice_is_noticed,
    test_mkbox.test_two_hundred_boxes_leave_no_mount_and_no_process,  # the server stays
}


def facts_about_boxes() -> list[Callable[[ServedBoxes], None]]:
    """Every test of the plain mode that wants boxes and nothing else."""
    plain = {**vars(test_mkbox), **vars(test_mkbox_direct)}
    tests = [each for name, each in plain.items() if name.startswith("test_")]
    return [t for t in tests if list(inspect.signature(t).parameters) == ["boxes"] and t not in OF_THE_PLAIN_MODE_ALONE]


@pytest.mark.parametrize("fact", facts_about_boxes(), ids=lambda fact: fact.__name__.removeprefix("test_"))
def test_a_served_box_is_like_any_other(fact: Callable[[ServedBoxes], None], served: ServedBoxes) -> None:
    fact(served)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_status_tells_the_signal(served: ServedBoxes, number: int) -> None:
    done = served.sh(f"kill -{int(number)} $$")
    assert done.status is not None and os.WTERMSIG(done.status) == number


def test_a_box_that_cannot_be_made_is_told_through_its_error_descriptor(served: ServedBoxes) -> None:
    done = served.run("true", options=["--proc", "/nowhere"])
    assert done.status is None and done.error.startswith(b"mkbox: cannot mount proc on /nowhere: ")
    assert served.sh("exit 4").status == 4 << 8


@pytest.mark.parametrize("option", ["--hold", "--explain", "--nonsense", "--serve=10"])
def test_options_that_make_no_sense_are_told_on_the_commands_standard_error(served: ServedBoxes, option: str) -> None:
    done = served.run("true", options=[option])
    assert done.status is None and done.stdout == b""
    assert done.stderr.startswith(b"mkbox: ") and done.stderr.count(b"\n") == 1


def test_descriptors_that_the_server_inherited_can_be_named(boxes: Boxes) -> None:
    secret = os.open("/etc/passwd", os.O_RDONLY)
    high = [os.dup2(boxes.mnt_ns, 150), os.dup2(boxes.net_ns, 151), os.dup2(secret, 152)]
    server = Server(boxes.mkbox, high)
    for fd in (secret, *high):
        os.close(fd)
    served = ServedBoxes(boxes.mkbox, boxes.base, boxes.mnt_ns, boxes.net_ns, boxes.tasks, server=server)
    done = served.sh("ls /proc/self/fd; pwd", options=["--mnt-ns", "150", "--net-ns", "151"])
    server.close()
    assert done.stdout.split() == [b"0", b"1", b"2", b"3", PROJECT], done


# -- several boxes -------------------------------------------------------------------------------------


def test_boxes_run_side_by_side_and_each_ends_when_it_ends(served: ServedBoxes) -> None:
    gates = [os.pipe() for _ in range(2)]
    first, second = (served.start("sh", "-c", "read line; echo $line", stdin=read) for read, _ in gates)
    for (read, write), box, other in zip(gates, (first, second), (second, first), strict=True):
        os.close(read)
        os.write(write, b"go\n")
        os.close(write)
        assert served.run("true").status == 0
        done = box.finish()  # all its pipes end, though the other one has been started after it
        assert (done.status, done.stdout) == (0, b"go\n")
        assert other.number != box.number


def test_many_boxes_at_once(served: ServedBoxes) -> None:
    running = [served.start("sh", "-c", f"echo {i}; exit {i}") for i in range(40)]
    done = [box.finish() for box in running]
    assert [(d.stdout, d.status) for d in done] == [(b"%d\n" % i, i << 8) for i in range(40)]


def test_a_killed_box_has_left_nothing_when_its_status_pipe_ends(served: ServedBoxes) -> None:
    gate, opened = os.pipe()
    bystander = served.start("sh", "-c", "read line", stdin=gate)
    victim = served.start("sh", "-c", "(setsid sleep 86431 &); echo up; sleep 86431")
    assert os.read(victim.stdout, 3) == b"up\n"
    served.server.kill(victim.number)
    assert os.read(victim.status, 12) == b""
    assert processes_with(b"86431") == []
    assert victim.finish().error == b""
    served.server.kill(victim.number)  # it has ended: no effect
    served.server.kill(4_000_000_000)  # there never was one
    os.write(opened, b"\n")
    assert bystander.finish().status == 0
    os.close(gate)
    os.close(opened)


def test_an_id_is_good_for_one_box_at_a_time(served: ServedBoxes) -> None:
    gate, opened = os.pipe()
    first = served.start("sh", "-c", "read line", stdin=gate, number=7)
    again = served.start("true", number=7).finish()
    assert again.status is None
    assert served.server.answer() == (7, "a box of this id is running")
    os.write(opened, b"\n")
    assert first.finish().status == 0
    assert served.start("true", number=7).finish().status == 0
    os.close(gate)
    os.close(opened)


# -- how it ends ---------------------------------------------------------------------------------------


def test_the_end_of_the_socket_ends_the_boxes_and_then_the_server(served: ServedBoxes) -> None:
    box = served.start("sh", "-c", "(setsid sleep 86432 &); echo up; sleep 86432")
    assert os.read(box.stdout, 3) == b"up\n"
    served.server.socket.close()
    assert served.server.process.wait(30) == 0
    assert processes_with(b"86432") == []
    assert box.finish().status is None


def test_the_boxes_end_with_sigkill_of_the_server(served: ServedBoxes) -> None:
    box = served.start("sh", "-c", "(setsid sleep 86433 &); echo up; sleep 86433")
    assert os.read(box.stdout, 3) == b"up\n"
    served.server.process.kill()
    assert box.finish().stdout == b""  # everybody who held it is dead
    assert processes_with(b"86433") == []


def test_the_server_and_its_boxes_end_with_sigkill_of_the_parent(boxes: Boxes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line = [boxes.mkbox, "--serve", str(theirs.fileno())]
    parent = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys; subprocess.Popen(sys.argv[1:], close_fds=False).wait()", *line],
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    ours.settimeout(30)
    server = Server.__new__(Server)
    server.socket, server.process = ours, parent
    served = ServedBoxes(boxes.mkbox, boxes.base, boxes.mnt_ns, boxes.net_ns, boxes.tasks, server=server)
    box = served.start("sh", "-c", "(setsid sleep 86434 &); echo up; sleep 86434")
    assert os.read(box.stdout, 3) == b"up\n"
    parent.kill()
    parent.wait()
    assert box.finish().stdout == b""
    assert ours.recv(1) == b""  # the server is gone, too
    assert processes_with(b"86434") == []
    ours.close()


# -- packets -------------------------------------------------------------------------------------------

ID = struct.pack("<I", 0x01020384)


@pytest.mark.parametrize(
    ("packet", "count", "number", "named"),
    [
        (b"X", 0, 0, "not a packet"),
        (b"X" + ID + b"mkbox\0", 3, 0x01020384, "not a packet"),
        (b"K" + ID + b"\0", 0, 0x01020384, "not a packet"),
        (b"R" + ID, 3, 0x01020384, "not a packet"),
        (b"R" + ID + b"no end", 3, 0x01020384, "not a packet"),
        (b"R" + ID + b"mkbox\0", 0, 0x01020384, "no descriptors"),
        (b"R" + ID + b"mkbox\0", 2, 0x01020384, "too few descriptors"),
        (b"R" + ID + b"mkbox\0", DESCRIPTOR_LIMIT + 1, 0x01020384, "too many descriptors"),
        (b"R" + ID + b"mkbox\0", 253, 0x01020384, "too many descriptors"),
        (b"R" + ID + b"x" * (PACKET_LIMIT - 5) + b"\0", 5, 0x01020384, f"longer than {PACKET_LIMIT} bytes"),
        (b"R" + ID + b"x" * (PACKET_LIMIT + 9000) + b"\0", 5, 0x01020384, f"longer than {PACKET_LIMIT} bytes"),
    ],
)  # fmt: skip
def test_a_packet_that_cannot_be_served_is_refused_and_its_descriptors_are_closed(
    served: ServedBoxes, packet: bytes, count: int, number: int, named: str
) -> None:
    assert served.run("true").status == 0
    before = served.server.descriptors()
    read, write = os.pipe()
    served.server.send(packet, [write] * count)
    os.close(write)
    answered, text = served.server.answer()
    assert answered == number and named in text
    assert until_end(read) == b""
    assert served.run("true").status == 0
    assert served.server.descriptors() == before


def test_the_longest_packet_and_the_most_descriptors_are_served(served: ServedBoxes) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    command = ["printf", "%s", *["x" * 999] * 200]
    left = PACKET_LIMIT - len(served.packet(1, [*command, ""]))
    done = served.start(*command, "y" * left, extra_fds=[null] * (DESCRIPTOR_LIMIT - 10), number=1).finish()
    os.close(null)
    assert (done.status, done.stdout) == (0, ("x" * 999 * 200 + "y" * left).encode()), done
    assert served.start(*command, "y" * (left + 1), number=2).finish().status is None
    assert served.server.answer() == (2, f"the packet is longer than {PACKET_LIMIT} bytes")


def test_a_dead_reader_of_answers_does_not_stop_the_server(served: ServedBoxes) -> None:
    for _ in range(2000):
        served.server.send(b"X")
    assert served.run("true").status == 0


# -- what is left --------------------------------------------------------------------------------------


def test_an_idle_server_has_its_socket_and_itself_open_and_nothing_of_its_callers(boxes: Boxes) -> None:
    secret = os.open("/etc/passwd", os.O_RDONLY)
    server = Server(boxes.mkbox, [secret])
    os.close(secret)
    server.send(b"X")
    server.answer()  # so it has finished starting
    assert sorted(server.descriptors(), key=int) == [*map(str, range(3, 10)), "200"]
    server.close()
    assert server.process.returncode == 0


def test_five_hundred_boxes_leave_the_server_as_it_was(served: ServedBoxes) -> None:
    server, threads = served.server, threading.active_count()
    assert served.run("true").status == 0
    before = (server.descriptors(), mounts())
    for i in range(500):
        box = served.start("/usr/bin/true")
        if i % 50 == 0:
            server.kill(box.number)
        assert box.finish().status in (0, None)
    assert (server.descriptors(), mounts()) == before
    assert server.children() == ""  # not even a zombie
    assert threading.active_count() == threads


@pytest.mark.parametrize("arguments", [["--serve", "0"], ["--serve", "99"], ["-q", "--serve", "0"], ["--serve", "me"]])
def test_a_server_without_a_proper_socket_is_one_line_and_status_two(mkbox: str, arguments: list[str]) -> None:
    done = subprocess.run([mkbox, *arguments], stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 2
    assert done.stdout == b"" and done.stderr.startswith(b"mkbox: ") and done.stderr.count(b"\n") == 1
