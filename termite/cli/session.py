"""`termite-session`: a build whose daemons live exactly as long as it does.

Started by `termite-make` and `termite-run` where no master serves the directory.  Brings up a master,
and, unless $TERMITE_COORDINATOR names one, a coordinator and a worker on loopback with a fresh secret;
runs the command; takes down what it started; returns the command's status.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from termite.errors import TermiteError, UsageError

START_LIMIT_S = 30.0
STOP_LIMIT_S = 20.0
_POLL_S = 0.01
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)

HELP = """termite-session: run a build together with the daemons it needs

  termite-session make [ARGUMENT...]       as `termite-make ARGUMENT...`
  termite-session run -- COMMAND...        as `termite-run -- COMMAND...`

termite-make and termite-run call this where no termite-master serves the directory or one above it.
It starts a master here, and with it, unless TERMITE_COORDINATOR=HOST:PORT names a coordinator that is
already there, a coordinator and one worker (as many jobs as this machine has cores) on loopback, with a
secret of their own.  Everything it started ends with the command; their logs are kept if something fails.

  TERMITE_COORDINATOR=HOST:PORT   workers of this coordinator (secret: TERMITE_SECRET=FILE or the usual places)
  TERMITE_JOBS=N                  how many commands may run at once (default: twice the cores)
"""


def program(name: str) -> str:
    """A program of ours: beside this interpreter, or on PATH."""
    beside = Path(sys.argv[0]).resolve().parent / name
    for place in (beside, Path(sys.executable).parent / name):
        if os.access(place, os.X_OK):
            return str(place)
    found = shutil.which(name)
    if found is None:
        raise TermiteError(f"{name} is not installed beside {sys.argv[0]} and not on PATH")
    return found


class Daemon:
    """One child that runs until it is told to stop; its log is a file."""

    def __init__(self, name: str, args: Sequence[str], log: Path, cwd: Path | None = None) -> None:
        self.name = name
        self.log = log
        environment = {k: v for k, v in os.environ.items() if k not in ("TERMITE_SOCKET", "LD_PRELOAD")}
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                [program(name), *args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=cwd,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the build; we tell the daemons ourselves
                preexec_fn=_die_with_parent,
            )

    def wait_until(self, what: str, condition: Callable[[], bool]) -> None:
        """TermiteError with the end of the log if the daemon ends first, or takes too long."""
        until = time.monotonic() + START_LIMIT_S
        while not condition():
            if self.process.poll() is not None:
                raise TermiteError(f"{self.name} did not start: {self.last_words()}")
            if time.monotonic() > until:
                raise TermiteError(f"{self.name}: no {what} after {START_LIMIT_S:.0f} s: {self.last_words()}")
            time.sleep(_POLL_S)

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with status {self.process.returncode}"

    def stop(self) -> None:
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class OwnDaemons:
    """Coordinator, workers and a master for one directory, all below one temporary directory."""

    def __init__(self) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="termite-session-"))
        self.daemons: list[Daemon] = []
        self.coordinator_address = ""
        self.secret: list[str] = []  # the -secret flag; empty: the usual places
        self._workers = 0

    def start_coordinator(self, *flags: str, wait: bool = True) -> Daemon:
        """`wait=False`: the others may be started meanwhile, they find it as soon as it is there."""
        secret = self.dir / "secret"
        secret.touch(0o600)
        secret.write_text(secrets.token_hex(32))
        self.secret = ["-secret", str(secret)]
        port_file = self.dir / "coordinator.port"
        port = _free_port()
        self.coordinator_address = f"127.0.0.1:{port}"
        args = [*self.secret, "-listen", "127.0.0.1", "-port", str(port), "-port-file", str(port_file)]
        args += ["-web-port", "off"]
        coordinator = self._start("termite-coordinator", [*args, *flags])
        if wait:
            self.wait_for_coordinator(coordinator)
        return coordinator

    def wait_for_coordinator(self, coordinator: Daemon) -> None:
        coordinator.wait_until("port", (self.dir / "coordinator.port").exists)

    def start_worker(self, jobs: int, cachedir: Path | None = None, *flags: str) -> Daemon:
        self._workers += 1
        work = self.dir / f"work-{self._workers}"
        work.mkdir()
        self.dir.chmod(0o711)
        cache = cachedir or self.dir / f"cache-{self._workers}"
        args = [
            *self.secret,
            *("-coordinator", self.coordinator_address, "-jobs", str(jobs), "-listen", "127.0.0.1", "-port", "0"),
            *("-tmpdir", str(work), "-cachedir", str(cache), "-web-port", "off"),
        ]
        return self._start("termite-worker", [*args, *flags])

    def start_master(self, root: Path, jobs: int, *flags: str) -> Daemon:
        args = [*self.secret, "-coordinator", self.coordinator_address, "-jobs", str(jobs), "-port", "off", *flags]
        master = self._start("termite-master", args, cwd=root)
        master.wait_until("socket", lambda: _answers(root / ".termite-socket"))
        return master

    def _start(self, name: str, args: Sequence[str], cwd: Path | None = None) -> Daemon:
        daemon = Daemon(name, args, self.dir / f"{name}-{len(self.daemons)}.log", cwd)
        self.daemons.append(daemon)
        return daemon

    def stop(self) -> None:
        """Ends what was started, the master first, and removes the directory."""
        while self.daemons:
            self.daemons.pop().stop()
        shutil.rmtree(self.dir, ignore_errors=True)


def _free_port() -> int:
    """One of this machine's that nobody has at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _answers(path: Path) -> bool:
    """True if a master accepts on this socket (whose path may be too long for an address)."""
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(f"/proc/self/fd/{directory}/{path.name}")
            return True
    except OSError:
        return False
    finally:
        os.close(directory)


def run_session(args: list[str]) -> int:
    """The status of `make ARGS` or `run -- COMMAND`, as a shell would give it."""
    if not args or args[0] not in ("make", "run"):
        raise UsageError("say `termite-session make ...` or `termite-session run -- ...`; see --help")
    root = Path.cwd()
    cores = os.cpu_count() or 1
    try:
        jobs = int(os.environ.get("TERMITE_JOBS", 2 * cores))
    except ValueError:
        raise UsageError(f"TERMITE_JOBS={os.environ['TERMITE_JOBS']} is not a number") from None
    daemons = OwnDaemons()
    try:
        named = os.environ.get("TERMITE_COORDINATOR", "")
        if named:
            daemons.coordinator_address = named
        else:
            coordinator = daemons.start_coordinator(wait=False)
            daemons.start_worker(cores)
        daemons.start_master(root, jobs)
        if not named:
            daemons.wait_for_coordinator(coordinator)
        return _run(
            [program(f"termite-{args[0]}"), *args[1:]], {**os.environ, "TERMITE_SOCKET": f"{root}/.termite-socket"}
        )
    finally:
        daemons.stop()


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Runs the build in our place: Ctrl-C reaches it directly, SIGTERM is passed on."""
    child = subprocess.Popen(command, env=environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: child.send_signal(received))
    status = child.wait()
    return status if status >= 0 else 128 - status


def main() -> None:
    args = sys.argv[1:]
    if args and args[0] in ("-h", "-help", "--help"):
        print(HELP, end="")
        return
    try:
        status = run_session(args)
    except TermiteError as e:
        print(f"termite-session: {e}", file=sys.stderr)
        status = e.exit_status
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
