"""distcc and icecc, to be measured in the same run: installed if need be, with daemons of our own.

Both are used through their masquerade directories, so that the same configured tree is built.  The daemons are
started where a `Wrap` says: in a namespace of their own, or on emulated hosts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench_common import Skipped, Wrap, environment, here, run, say, wait_until

from termite.errors import TermiteError

DISTCC_MASQUERADE = "/usr/lib/distcc"
ICECC_MASQUERADE = "/usr/lib/icecc/bin"
_DISTCC_PORT = 3632
_SCHEDULER_PORT = 8765
_ICECC_PORT = 10245
_POLICY = Path("/usr/sbin/policy-rc.d")
_SERVICES = ["distcc.service", "iceccd.service", "icecc-scheduler.service"]
_IDLE = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /proc/stat && exec "$@"']
"""iceccd takes no work where the machine is busy, and this machine plays all the others as well."""
_STOP_S = 10.0
_SETTLE_S = 60.0


@dataclass(frozen=True)
class Place:
    """Where a daemon runs."""

    address: str
    wrap: Wrap = here
    name: str = "here"


# ---- installing ------------------------------------------------------------------------------------------------


def install(*packages: str) -> None:
    """Debian packages, without the services that would come with them; Skipped if they cannot be had."""
    missing = [p for p in packages if not _is_installed(p)]
    if not missing:
        return
    names = " ".join(missing)
    if shutil.which("apt-get") is None or os.geteuid():
        raise Skipped(f"{names}: not installed; as root, on Debian: apt-get install {names}")
    say(f"installing {names}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    forbids = not _POLICY.exists()
    if forbids:
        _POLICY.write_text("#!/bin/sh\nexit 101\n")  # tells Debian's scripts to start nothing
        _POLICY.chmod(0o755)
    try:
        subprocess.run(["apt-get", "-qq", "update"], env=env, stdout=subprocess.DEVNULL, check=False)
        run(["apt-get", "-qq", "install", "-y", "--no-install-recommends", *missing], Path("/"), env)
    except TermiteError as e:
        raise Skipped(f"{names} cannot be installed: {str(e).splitlines()[-1]}") from e
    finally:
        if forbids:
            _POLICY.unlink()
    if shutil.which("systemctl") is not None:  # nor at the next boot
        subprocess.run(["systemctl", "disable", *_SERVICES], capture_output=True, check=False)


def _is_installed(package: str) -> bool:
    if shutil.which("dpkg-query") is None:
        return shutil.which(package) is not None
    asked = subprocess.run(["dpkg-query", "-Wf${Status}", package], capture_output=True, check=False)
    return asked.stdout.endswith(b" installed")


def version_of(*command: str) -> str:
    """The first line that a program says of itself; empty if it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout or done.stderr).decode(errors="replace").partition("\n")[0].strip()


# ---- daemons ---------------------------------------------------------------------------------------------------


class _Daemons:
    """Ended in the reverse order, whatever happens."""

    def __init__(self) -> None:
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self, place: Place, command: Sequence[str], log: Path, **more: str) -> None:
        with open(log, "ab") as out:
            process = subprocess.Popen(
                place.wrap(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=log.parent,
                env={**os.environ, **more}, start_new_session=True,
            )  # fmt: skip
        self._running.append((command[0], process))

    def check(self) -> None:
        for name, process in self._running:
            if process.poll() is not None:
                raise Skipped(f"{name} ended with status {process.returncode}")

    def pids(self) -> list[int]:
        return [process.pid for _, process in self._running]

    def stop(self) -> None:
        while self._running:
            _, process = self._running.pop()
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass
class Peer:
    """One that runs: `env` for builds, in each of its settings; `wrap` is to be put around what uses it."""

    name: str
    settings: dict[str, dict[str, str]]
    wrap: Wrap
    pids: list[int]  # its daemons on the machine that builds
    served: Callable[[], dict[str, int]]  # compilations so far by daemon, if that is known


@contextmanager
def distcc(work: Path, client: Place, servers: Sequence[Place], jobs: int, at_once: int) -> Iterator[Peer]:
    """One distccd per place, each with that many jobs; `at_once`: compilations to be sent to each."""
    install("distcc")
    own = work / "distcc"
    own.mkdir()
    own.chmod(0o777)  # distccd gives up root
    daemons = _Daemons()
    try:
        for server in servers:
            log = own / f"{server.name}.log"
            log.touch()
            log.chmod(0o666)
            command = [
                "distccd", "--no-detach", "--daemon", "--listen", server.address, "--port", str(_DISTCC_PORT),
                "--allow", client.address, "--jobs", str(jobs), "--log-file", str(log), "--log-level", "warning",
            ]  # fmt: skip
            daemons.start(server, command, own / f"{server.name}.out", TMPDIR=str(own))
        hosts = " ".join(f"{server.address}:{_DISTCC_PORT}/{at_once}" for server in servers)
        env = environment(DISTCC_HOSTS=hosts, DISTCC_DIR=str(own), DISTCC_FALLBACK="0")
        env["PATH"] = f"{DISTCC_MASQUERADE}:{env['PATH']}"
        _warm_up(own, client, env, daemons, len(servers) * jobs)
        yield Peer("distcc", {"distcc": env}, client.wrap, [], dict)
    finally:
        daemons.stop()
        shutil.rmtree(own, ignore_errors=True)


@contextmanager
def icecc(work: Path, client: Place, servers: Sequence[Place], jobs: int, at_once: int) -> Iterator[Peer]:
    """A scheduler and a daemon that compiles for nobody else where the build runs, and one more daemon per place.

    How many compilations are sent to each is the scheduler's business.
    """
    install("icecc")
    own = work / "icecc"
    own.mkdir()
    own.chmod(0o777)
    daemons = _Daemons()
    network = f"termite-bench-{os.getpid()}"
    socket_of = {place.name: own / f"{place.name}.socket" for place in [client, *servers]}
    try:
        log = own / "scheduler.log"
        scheduler = ["icecc-scheduler", "-n", network, "-p", str(_SCHEDULER_PORT), "-l", str(log), "-vvv"]
        idle = own / "stat"
        idle.write_text("cpu  1 0 1 1000000000 0 0 0 0 0 0\n")
        daemons.start(client, scheduler, own / "scheduler.out")
        time.sleep(0.5)
        for index, place in enumerate([client, *servers]):
            is_client = place is client
            port = _ICECC_PORT + (index if place.address == client.address else 0)
            own_log = own / f"{place.name}.log"
            own_log.touch()
            own_log.chmod(0o666)
            base = own / f"{place.name}-envs"
            command = [
                "iceccd", "-n", network, "-s", f"{client.address}:{_SCHEDULER_PORT}", "-p", str(port), "-b", str(base),
                "-l", str(own_log), "-N", place.name, "-m", str(jobs), "-vv",
                *(["--no-remote"] if is_client else []),
            ]  # fmt: skip
            daemons.start(
                place,
                [*_IDLE, str(idle), *command],
                own / f"{place.name}.out",
                ICECC_TEST_SOCKET=str(socket_of[place.name]),
            )
        env = environment(ICECC_TEST_SOCKET=str(socket_of[client.name]), ICECC_TEST_REMOTEBUILD="1")
        if len(servers) == 1:
            env["ICECC_PREFERRED_HOST"] = servers[0].name
        env["PATH"] = f"{ICECC_MASQUERADE}:{env['PATH']}"
        logs = [own / f"{name}.log" for name in socket_of]
        wait_until("connection of icecc's daemons to their scheduler", lambda: all(map(_is_connected, logs)))
        _warm_up(own, client, env, daemons, 2 * len(servers) * jobs)
        if not any(place.name in _served(log) for place in servers):
            raise Skipped("icecc compiles everything on the machine that builds, for reasons of its own")
        settings = {"icecc": env, "icecc, ICECC_REMOTE_CPP=0": {**env, "ICECC_REMOTE_CPP": "0"}}
        yield Peer("icecc", settings, client.wrap, daemons.pids()[:2], lambda: _served(log))
    finally:
        daemons.stop()
        shutil.rmtree(own, ignore_errors=True)


def _is_connected(log: Path) -> bool:
    return b"Connected to scheduler" in log.read_bytes()


def _warm_up(own: Path, client: Place, env: dict[str, str], daemons: _Daemons, at_once: int) -> None:
    """Compiles a little until that works on all servers at once; Skipped with the reason if it never does."""
    (own / "warm.c").write_text("int f(void) { return 1; }\n")
    (own / "warm.cc").write_text("int g() { return 1; }\n")
    objects = [f"w{n}.o" for n in range(2 * at_once)]
    rules = "".join(f"{o}:\n\t{'gcc -c warm.c' if n % 2 else 'g++ -c warm.cc'} -o $@\n" for n, o in enumerate(objects))
    (own / "Makefile").write_text(f"all: {' '.join(objects)}\n{rules}")
    until = time.monotonic() + _SETTLE_S
    while True:
        daemons.check()
        try:
            run(client.wrap(["make", "-s", f"-j{at_once}"]), own, env, _SETTLE_S)
            return
        except TermiteError as e:
            if time.monotonic() > until:
                raise Skipped(f"a first compilation does not work: {str(e).splitlines()[-1]}") from e
            time.sleep(1.0)


def _served(log: Path) -> dict[str, int]:
    """How many compilations each of icecc's daemons has done."""
    counts: dict[str, int] = {}
    for line in log.read_text(errors="replace").splitlines():
        if " END " in line:
            name = line.rpartition("server=")[2]
            counts[name] = counts.get(name, 0) + 1
    return counts
