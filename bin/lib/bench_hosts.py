"""Emulated hosts on this machine: each a network namespace with its own address, a CPU quota, and a wire to the rest.

Nothing outlives the process that made them: namespaces and devices are held by its descriptors, and the control
groups are removed by `Hosts.close`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bench_cgroups import CpuGroup, cpu_controller
from bench_common import Skipped
from pyroute2 import IPRoute

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_NETWORK = "10.77.0"
_MTU = 1500
_PROBES = 21
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise Skipped(f"cannot {what}: {os.strerror(code)}; run as root")


def _in_thread(action: Callable[[], T]) -> T:
    """Runs it in a thread that ends with it: what it does to its namespace is gone for the rest of us."""
    results: list[T] = []
    trouble: list[Exception] = []

    def work() -> None:
        try:
            results.append(action())
        except Exception as e:
            trouble.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if trouble:
        raise trouble[0]
    return results[0]


class Namespace:
    """A network namespace with loopback, and with one device more if it has an `address`."""

    def __init__(self, address: str = "") -> None:
        self.address = address
        self.tun = -1
        self.fd = _in_thread(self._make)

    def _make(self) -> int:
        _checked(_libc.unshare(_CLONE_NEWNET), "make a network namespace")
        with IPRoute() as route:
            route.link("set", index=1, state="up")
            if self.address:
                self.tun = _open_tun()
                index = route.link_lookup(ifname="wire")[0]
                route.addr("add", index=index, address=self.address, prefixlen=24)
                route.link("set", index=index, mtu=_MTU, state="up")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command line that runs it in there."""
        return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self.fd}", "--", *command]

    def inside(self, action: Callable[[], T]) -> T:
        """Runs a function of ours in there."""

        def work() -> T:
            _checked(_libc.setns(self.fd, _CLONE_NEWNET), "enter a network namespace")
            return action()

        return _in_thread(work)

    def close(self) -> None:
        for fd in (self.fd, self.tun):
            if fd >= 0:
                os.close(fd)


def _open_tun() -> int:
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH14x", b"wire", _IFF_TUN | _IFF_NO_PI))
    except OSError as e:
        raise Skipped(f"cannot make a network device with /dev/net/tun: {e.strerror}; load the module tun") from e
    return fd


class Host:
    """`cores`: the CPU it has once `Hosts.throttle` says so."""

    def __init__(self, name: str, cores: float, namespace: Namespace, group: CpuGroup) -> None:
        self.name = name
        self.cores = cores
        self.group = group
        self.namespace = namespace
        self.address = namespace.address

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command line that runs it on this host; it dies with the process that starts it."""
        enter = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.group.procs)]
        return self.namespace.wrap([*enter, *command])


class Hosts:
    """To be closed whatever happens; the wire between them is laid by `set_round_trip`."""

    def __init__(self) -> None:
        directory, is_v2 = cpu_controller()
        self._hosts: list[Host] = []
        self._wire: subprocess.Popen[bytes] | None = None
        self._top = CpuGroup(directory / f"termite-bench-{os.getpid()}", is_v2)
        self._is_v2 = is_v2
        if is_v2:
            self._top.let_below()

    def add(self, name: str, cores: float) -> Host:
        """One more host; lay the wire anew afterwards."""
        namespace = Namespace(f"{_NETWORK}.{len(self._hosts) + 1}")
        host = Host(name, cores, namespace, CpuGroup(self._top.directory / name, self._is_v2))
        self._hosts.append(host)
        return host

    def throttle(self, wanted: bool) -> None:
        """Gives every host its own number of cores, or all that there are."""
        for host in self._hosts:
            host.group.set_quota(host.cores if wanted else None)

    def set_round_trip(self, seconds: float) -> float:
        """What was reached, as measured: what the wire itself takes is part of the time."""
        first, *_, last = self._hosts
        self._lay(0.0)
        own = self.round_trip_s(first, last)
        self._lay(max(0.0, seconds - own) / 2)
        return self.round_trip_s(first, last)

    def _lay(self, delay_s: float) -> None:
        self._cut()
        fds = {host.address: host.namespace.tun for host in self._hosts}
        ends = [f"{address}={fd}" for address, fd in fds.items()]
        script = str(Path(__file__).with_name("bench_wire.py"))
        command = ["nice", "-n", "-10", sys.executable, script, str(delay_s), *ends]
        self._wire = subprocess.Popen(command, pass_fds=list(fds.values()))

    def round_trip_s(self, a: Host, b: Host) -> float:
        """As measured, the median: b says at once that nobody listens."""

        def probe() -> float:
            started = time.monotonic()
            with socket.socket() as s:
                s.settimeout(10)
                try:
                    s.connect((b.address, 9))
                except ConnectionRefusedError:
                    pass
            return time.monotonic() - started

        return sorted(a.namespace.inside(probe) for _ in range(_PROBES))[_PROBES // 2]

    def _cut(self) -> None:
        if self._wire is not None:
            self._wire.kill()
            self._wire.wait()
            self._wire = None

    def close(self) -> None:
        self.throttle(False)
        for host in self._hosts:
            host.group.close()
            host.namespace.close()
        self._cut()
        self._top.close()
