"""The real programs on loopback, for tests: started, watched, stopped, and checked for leftovers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

PROGRAMS = Path(os.environ.get("TERMITE_BIN", Path(sys.executable).parent))
START_LIMIT_S = 30.0


def wait_for(what: str, condition: Callable[[], object], limit_s: float = START_LIMIT_S) -> None:
    """Polls a condition of another process until it holds; fails, saying what, when the limit is over."""
    until = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"waited {limit_s} s in vain for: {what}")
        time.sleep(0.02)


class Program:
    """One running daemon with its log."""

    def __init__(self, name: str, args: list[str], log: Path, cwd: Path, env: dict[str, str]) -> None:
        self.name = name
        self.log_path = log
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                [str(PROGRAMS / name), *args], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd, env=env
            )

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_log(self, pattern: str, limit_s: float = START_LIMIT_S) -> None:
        def found() -> bool:
            if re.search(pattern, self.log()):
                return True
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}:\n{self.log()}"
            return False

        try:
            wait_for(f"{pattern!r} in the log of {self.name}", found, limit_s)
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.log()}") from None

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, limit_s: float = 20.0) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not stop within {limit_s} s:\n{self.log()}") from None


def write_ssh_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> None:
    """A fresh SSH private key, as ssh-keygen would write it."""
    key = {
        "ed25519": lambda: ed25519.Ed25519PrivateKey.generate(),
        "ecdsa": lambda: ec.generate_private_key(ec.SECP256R1()),
        "rsa": lambda: rsa.generate_private_key(65537, 3072),
    }[kind]()
    lock = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    path.unlink(missing_ok=True)
    path.touch(0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, lock))


class Farm:
    """A directory with a secret, a coordinator, workers and masters."""

    def __init__(self, base: str = "/srv", ssh: bool = False) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix=f"termite-test-{os.getpid()}-", dir=base))
        self.dir.chmod(0o755)
        self.secret = self.dir / "key"
        self.secret.touch(0o600)
        self.secret.write_text("a secret for tests only\n")
        self.ssh = ssh
        if ssh:
            write_ssh_key(self.secret)
        self.tmp = self.dir / "tmp"
        self.tmp.mkdir()
        self.programs: list[Program] = []
        self.coordinator_port = 0
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("TERMITE_", "MAKE", "LD_PRELOAD"))}
        self.env |= {k: v for k, v in os.environ.items() if k == "TERMITE_TEST_RUN"}
        # Our programs and the system's tools, but not the tools that lie beside our programs: builds would name them
        # by a path that workers may not see (a checkout below /tmp, or in a private directory).
        self.bin = self.dir / "bin"
        self.bin.mkdir()
        for path in PROGRAMS.glob("termite-*"):
            (self.bin / path.name).symlink_to(path)
        places = [p for p in os.environ["PATH"].split(":") if Path(p).resolve() != PROGRAMS.resolve()]
        self.env["PATH"] = ":".join([str(self.bin), *places])
        self.env["XDG_CACHE_HOME"] = str(self.dir / "cache")
        self._serial = 0

    def run(self, name: str, *args: str, cwd: Path | None = None) -> Program:
        self._serial += 1
        log = self.dir / f"{name}-{self._serial}.log"
        program = Program(name, list(args), log, cwd or self.dir, self.env)
        self.programs.append(program)
        return program

    def coordinator(self, *args: str) -> Program:
        port_file = self.dir / "coordinator.port"
        port_file.unlink(missing_ok=True)
        program = self.run(
            "termite-coordinator", "-secret", str(self.secret), "-port", str(self.coordinator_port),
            "-listen", "127.0.0.1", "-port-file", str(port_file), "-web-port", "off", *args,
        )  # fmt: skip
        wait_for("the coordinator's port", lambda: port_file.exists() or program.process.poll() is not None)
        assert port_file.exists(), program.log()
        self.coordinator_port = int(port_file.read_text().rpartition(":")[2])
        return program

    def worker(self, jobs: int = 2, *args: str, ready: bool = True) -> Program:
        cache = self.dir / f"cache-{self._serial}"
        program = self.run(
            "termite-worker", "-secret", str(self.secret), "-coordinator", f"127.0.0.1:{self.coordinator_port}",
            "-jobs", str(jobs), "-port", str(free_port()), "-listen", "127.0.0.1", "-cachedir", str(cache),
            "-tmpdir", str(self.tmp), "-web-port", "off", *args,
        )  # fmt: skip
        if ready:
            program.wait_log("listening on port")
            program.wait_log("coordinator .* (connected|back|reached)")
        return program

    def master(self, root: Path | bytes, *args: str, jobs: int = 8) -> Program:
        path = Path(os.fsdecode(root))
        program = self.run(
            "termite-master", "-secret", str(self.secret), "-coordinator", f"127.0.0.1:{self.coordinator_port}",
            "-jobs", str(jobs), "-port", "off", *(args or ("-fallback=fail",)), cwd=path,
        )  # fmt: skip
        program.wait_log("serving")
        if self.ssh and any(p.name == "termite-coordinator" and p.process.poll() is None for p in self.programs):
            program.wait_log(" wire.coordination: ")  # a handshake takes long on a busy machine, patience ends before
        return program

    def make(
        self, root: Path | bytes, *args: str | bytes, limit_s: float = 600, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """`termite-make ARGS` in the project."""
        return self.command(root, "termite-make", *args, limit_s=limit_s, env=env)

    def command(
        self,
        root: Path | bytes,
        *args: str | bytes,
        limit_s: float = 120,
        env: dict[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            args, cwd=root, env={**self.env, **(env or {})}, stdin=stdin, capture_output=True, timeout=limit_s,
            check=False,
        )  # fmt: skip

    def remote(
        self, root: Path | bytes, script: str | bytes, *, shell: str = "/bin/sh", limit_s: float = 120
    ) -> subprocess.CompletedProcess[bytes]:
        """A shell script as one command through the wrapper."""
        text = script.encode() if isinstance(script, str) else script
        return self.command(root, "termite-shell-wrapper", "-exec", shell, "-c", text, limit_s=limit_s)

    def stop(self) -> None:
        """All of them, also when one does not end as it should."""
        trouble: list[AssertionError] = []
        for program in reversed(self.programs):
            try:
                program.stop()
            except AssertionError as e:
                trouble.append(e)
        if trouble:
            raise trouble[0]

    def close(self) -> None:
        try:
            self.stop()
            left = leftovers(self.dir)
        finally:
            shutil.rmtree(self.dir, ignore_errors=True)
        assert not left, left


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def leftovers(directory: Path) -> list[str]:
    """Processes, mounts and temporary directories that speak of this directory."""
    found = [line.strip() for line in Path("/proc/self/mounts").read_text().splitlines() if str(directory) in line]
    found += [str(p) for p in (directory / "tmp").glob("*")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(directory) in command and int(process.name) != os.getpid():
            found.append(f"process {process.name}: {command!r}")
    return found


def tree(root: Path | bytes, skip: tuple[bytes, ...] = (b".termite-socket",)) -> dict[bytes, tuple[object, ...]]:
    """Every name below a directory with type, mode and contents or target; for comparing two trees."""
    return dict(_walk(os.fsencode(root), b"", skip))


def _walk(top: bytes, below: bytes, skip: tuple[bytes, ...]) -> Iterator[tuple[bytes, tuple[object, ...]]]:
    with os.scandir(os.path.join(top, below) if below else top) as entries:
        for entry in entries:
            if entry.name in skip:
                continue
            path = os.path.join(below, entry.name)
            st = entry.stat(follow_symlinks=False)
            if entry.is_symlink():
                yield path, ("link", os.readlink(entry.path))
            elif entry.is_dir():
                yield path, ("dir", oct(st.st_mode))
                yield from _walk(top, path, skip)
            else:
                with open(entry.path, "rb") as f:
                    yield path, ("file", oct(st.st_mode), f.read())
