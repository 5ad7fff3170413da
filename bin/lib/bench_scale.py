"""How builds get faster with more hosts: a slow master and slow workers, emulated, at two round-trip times.

The hosts are so slow that all of them together do not need more than this machine has.  Daemons start and caches fill
at full speed; the quotas apply while builds are timed.  The master's host runs make, its wrappers and the master.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench_client import ask
from bench_common import Skipped, cpu_s, environment, run, say, timed, wait_until
from bench_hosts import Host, Hosts
from bench_peers import Peer, Place, distcc, icecc

from termite.cli.session import program
from termite.errors import TermiteError
from termite.master.local import Kind

MASTER_CORES = 0.4
WORKER_CORES = 0.1
COMMAND_S = 0.2
"""CPU of the command that does nothing else."""
ROUND_TRIPS_S = (0.0005, 0.02)
PER_WORKER = 8
"""Commands for each worker; as many are under way as there are jobs twice over."""
_PORT = 1233
_STOP_S = 20.0
_PATIENT = "-time.silence=120s"
"""A host with a tenth of a core may be silent for a while."""


@dataclass
class Scale:
    system: str  # "termite", "distcc", ...
    command: str  # "fixed CPU" or "compile"
    workers: int
    wanted_round_trip_s: float
    round_trip_s: float  # as measured
    commands: int
    wall_s: float
    alone_s: float  # wall seconds per command on the master's host alone
    master_ms: float  # CPU of the master's host per command: make, wrappers, client; for termite with the master
    daemon_ms: float = 0.0  # of that, the master process
    served: dict[str, int] = field(default_factory=dict)

    def speed_up(self) -> float:
        return self.alone_s * self.commands / self.wall_s

    def ideal(self) -> float:
        return self.workers * WORKER_CORES / MASTER_CORES


class EmulatedFarm:
    """Coordinator and master on one host, and as many workers as have been added."""

    def __init__(self, hosts: Hosts, work: Path, root: Path) -> None:
        self._hosts = hosts
        self._dir = work / "farm"
        self._dir.mkdir()
        self.root = root
        self.head = hosts.add("master", MASTER_CORES)
        self.workers: list[Host] = []
        self._running: list[subprocess.Popen[bytes]] = []
        secret = self._dir / "secret"
        secret.touch(0o600)
        secret.write_text(secrets.token_hex(32))
        self._secret = ["-secret", str(secret)]
        self.master: subprocess.Popen[bytes] | None = None

    def start(self, jobs: int) -> None:
        """Coordinator and master."""
        address = f"{self.head.address}:{_PORT}"
        ready = self._dir / "coordinator"
        flags = ["-listen", self.head.address, "-web-port", "off", "-port-file", str(ready), _PATIENT]
        self._start(self.head, "termite-coordinator", [*flags, "-port", str(_PORT)])
        wait_until("coordinator", ready.exists)
        flags = ["-coordinator", address, "-jobs", str(jobs), "-port", "off", "-fallback=fail", _PATIENT]
        self.master = self._start(self.head, "termite-master", [*flags, "-time.patience=60s"])
        wait_until("master", self._answers)

    def add_worker(self, host: Host) -> None:
        """A worker on it; its first command will wait until it is there."""
        own = self._dir / host.name
        own.mkdir()
        ready = own / "ready"
        flags = ["-coordinator", f"{self.head.address}:{_PORT}", "-listen", host.address, "-jobs", "1", _PATIENT]
        flags += ["-cachedir", str(own / "cache"), "-tmpdir", str(own), "-port-file", str(ready), "-web-port", "off"]
        self._start(host, "termite-worker", flags)
        wait_until(f"worker on {host.name}", ready.exists)
        self.workers.append(host)

    def _start(self, host: Host, name: str, flags: Sequence[str]) -> subprocess.Popen[bytes]:
        with open(self._dir / f"{host.name}-{name}.log", "ab") as log:
            process = subprocess.Popen(
                host.wrap([program(name), *self._secret, *flags]), cwd=self.root, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._running.append(process)
        return process

    def _answers(self) -> bool:
        try:
            ask(self.root, Kind.INSPECT, ["."])
        except TermiteError:
            return False
        return True

    def stop(self) -> None:
        for process in reversed(self._running):
            process.terminate()
        for process in self._running:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._dir, ignore_errors=True)


def scale(
    work: Path, counts: Sequence[int], compile_counts: Sequence[int], per_worker: int = PER_WORKER
) -> list[Scale]:
    """`counts`: numbers of workers, rising; `compile_counts`: with how many of them to compile as well."""
    root = _project(work, max(counts) * per_worker)
    results: list[Scale] = []
    hosts = Hosts()
    try:
        farm = EmulatedFarm(hosts, work, root)
        spare = [hosts.add(f"worker{n}", WORKER_CORES) for n in range(1, max(counts) + 1)]
        hosts.set_round_trip(0.0)
        alone = {command: _alone(hosts, farm.head, root, command) for command in ("fixed CPU", "compile")}
        with contextlib.ExitStack() as stack:
            stack.callback(farm.stop)
            farm.start(max(counts))
            for count in counts:
                while len(farm.workers) < count:
                    farm.add_worker(spare[len(farm.workers)])
                commands = ["fixed CPU", "compile"] if count in compile_counts else ["fixed CPU"]
                for command in commands:
                    results += _termite(hosts, farm, command, per_worker, alone[command])
        for count in compile_counts:
            results += _peers(work, hosts, farm.head, spare[:count], root, per_worker, alone["compile"])
    finally:
        hosts.close()
        shutil.rmtree(root)
    return results


_TARGETS = {"fixed CPU": "burn", "compile": "compile"}


def _project(work: Path, most: int) -> Path:
    """A makefile whose targets burn and compile run COUNT commands."""
    root = work / "scale"
    root.mkdir()
    (root / "spend.c").write_text(
        "#include <stdlib.h>\n#include <time.h>\n"
        "int main(int count, char **args) {\n"
        "    double seconds = count > 1 ? atof(args[1]) : 0;\n"
        "    while (clock() < seconds * CLOCKS_PER_SEC) continue;\n"
        "    return 0;\n}\n"
    )
    run(["gcc", "-O1", "-static", "spend.c", "-o", "spend"], root)
    body = "".join(
        f"double f{n}(double *x, int m) {{ double s = {n}; for (int i = 0; i < m; i++) s += x[i] / (s + x[m - i]); "
        f"return m ? f{n and n - 1}(x, m - 1) + s : s; }}\n"
        for n in range(40)
    )
    for number in range(most):
        (root / f"c{number}.c").write_text(f"#include <stdio.h>\n{body}int at{number};\n")
    burns, objects = (" ".join(f"{kind}{n}" for n in range(most)) for kind in ("b", "o"))
    (root / "Makefile").write_text(
        f"COUNT = {most}\n"
        f"burn: $(wordlist 1,$(COUNT),{burns})\ncompile: $(wordlist 1,$(COUNT),{objects})\n"
        f"{burns}:\n\t@./spend {COMMAND_S}\n"
        f"{objects}: o%:\n\t@gcc -O1 -c c$*.c -o c$*.o\n"
        f".PHONY: burn compile {burns} {objects}\n"
    )
    return root


def _alone(hosts: Hosts, head: Host, root: Path, command: str) -> float:
    """Wall seconds per command on the master's host with its quota, and plain make."""
    count = 6
    make = head.wrap(["make", "-j2", _TARGETS[command], f"COUNT={count}"])
    timed(make, root)
    hosts.throttle(True)
    wall, _ = timed(make, root)
    hosts.throttle(False)
    say(f"scale: {command} on the master's {MASTER_CORES} cores alone: {wall / count:.2f} s")
    return wall / count


def _termite(hosts: Hosts, farm: EmulatedFarm, command: str, per_worker: int, alone_s: float) -> list[Scale]:
    count = len(farm.workers)
    env = environment(TERMITE_SOCKET=str(farm.root / ".termite-socket"))
    make = farm.head.wrap(["termite-make", f"-j{2 * count}", _TARGETS[command], f"COUNT={count * per_worker}"])
    results = []
    assert farm.master is not None
    hosts.set_round_trip(0.0)
    for _ in range(2):  # the first may have begun before all workers were known
        timed(make, farm.root, env)
    for wanted_s in ROUND_TRIPS_S:
        reached_s = hosts.set_round_trip(wanted_s)
        with _throttled(hosts):
            before = cpu_s(farm.master.pid)
            wall, cpu = timed(make, farm.root, env)
            daemon = cpu_s(farm.master.pid) - before
        done = count * per_worker
        result = Scale(
            "termite", command, count, wanted_s, reached_s, done, wall, alone_s, (cpu + daemon) * 1e3 / done,
            daemon * 1e3 / done,
        )  # fmt: skip
        _tell(result)
        results.append(result)
    return results


@contextlib.contextmanager
def _throttled(hosts: Hosts) -> Iterator[None]:
    hosts.throttle(True)
    try:
        yield
    finally:
        hosts.throttle(False)


def _peers(
    work: Path, hosts: Hosts, head: Host, servers: Sequence[Host], root: Path, per_worker: int, alone_s: float
) -> list[Scale]:
    results = []
    for start in (distcc, icecc):
        try:
            hosts.set_round_trip(0.0)
            client = Place(head.address, head.wrap, "client")
            places = [Place(host.address, host.wrap, host.name) for host in servers]
            with start(work, client, places, 1, 2) as peer:
                results += _through(hosts, peer, len(servers), root, per_worker, alone_s)
        except Skipped as reason:
            say(f"scale: without {start.__name__}: {reason}")
    return results


def _through(hosts: Hosts, peer: Peer, count: int, root: Path, per_worker: int, alone_s: float) -> list[Scale]:
    results = []
    done = count * per_worker
    make = peer.wrap(["make", f"-j{2 * count}", "compile", f"COUNT={done}"])
    for wanted_s in ROUND_TRIPS_S:
        reached_s = hosts.set_round_trip(wanted_s)
        for setting, env in peer.settings.items():
            before, served = sum(map(cpu_s, peer.pids)), peer.served()
            with _throttled(hosts):
                wall, cpu = timed(make, root, env)
            cpu += sum(map(cpu_s, peer.pids)) - before
            shares = {name: n - served.get(name, 0) for name, n in peer.served().items()}
            result = Scale(
                setting, "compile", count, wanted_s, reached_s, done, wall, alone_s, cpu * 1e3 / done, 0.0, shares
            )
            _tell(result)
            results.append(result)
    return results


def _tell(r: Scale) -> None:
    say(
        f"scale: {r.system}, {r.command}, {r.workers} workers, {r.wanted_round_trip_s * 1e3:g} ms: {r.wall_s:.1f} s, "
        f"speed-up {r.speed_up():.2f} of {r.ideal():.2f}"
    )
