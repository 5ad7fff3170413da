"""Boxes as a worker's mirror makes them, and what is seen of them from outside."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PATH = b"PATH=/usr/local/bin:/usr/bin:/bin"
UID = 4321  # of nobody on this machine
LINKS = ["-L", "usr/bin=bin", "-L", "usr/lib=lib", "-L", "usr/lib64=lib64"]
PROJECT = b"/mirror/project"
ODD_PROJECT = b"/mirror/a b,c:d=e\\f\n\xff'\"/project"
Argument = str | bytes


@dataclass
class Finished:
    """What the caller of mkbox sees when it has ended."""

    exit: int
    stdout: bytes
    stderr: bytes
    status: int | None  # raw wait status of the command; None: mkbox wrote none
    cpu_us: int
    error: bytes  # what came through --error-fd


@dataclass
class Boxes:
    """A template over a directory `mirror`, and boxes made from it, as a worker's mirror makes them."""

    mkbox: str
    base: Path
    mnt_ns: int
    net_ns: int
    tasks: list[Path] = field(default_factory=list)

    def outside(self, path: bytes) -> bytes:
        return os.fsencode(self.base) + path

    def new_task(self) -> Path:
        task = self.base / f"task{len(self.tasks)}"
        for directory in (task, task / "u", task / "w"):
            directory.mkdir()
        os.chown(task / "u", UID, UID)
        self.tasks.append(task)
        return task

    @property
    def upper(self) -> Path:
        return self.tasks[-1] / "u"

    def command_line(
        self, argv: Sequence[Argument], options: Sequence[Argument], lower: int, env: int, project: bytes
    ) -> list[Argument]:
        overlay: list[Argument] = ["--lower-fd", str(lower), "--upper", "u", "--work", "w", "--writable", project]
        return [
            self.mkbox, "-q", "--mnt-ns", str(self.mnt_ns), "--net-ns", str(self.net_ns), *overlay,
            "-t", "/tmp", "-t", "/var/tmp", "--proc", "/proc", "-u", str(UID), "-g", str(UID), "--umask", "022",
            "-d", project, "--env-fd", str(env), *options, "--", *argv,
        ]  # fmt: skip

    def run(
        self,
        *argv: Argument,
        options: Sequence[Argument] = (),
        env: Sequence[bytes] = (PATH,),
        project: bytes = PROJECT,
        lower: bytes | None = None,
        stdin: int = subprocess.DEVNULL,
        close_status: bool = False,
        extra_fds: Sequence[int] = (),
    ) -> Finished:
        status_read, status_write = os.pipe()
        if close_status:
            null = os.open("/dev/null", os.O_RDONLY)
            os.dup2(null, status_read, inheritable=False)
            os.close(null)
        error_read, error_write = os.pipe()
        env_fd = os.memfd_create("environment")
        os.write(env_fd, b"".join(entry + b"\0" for entry in env))
        lower_fd = os.open(lower if lower is not None else self.outside(project), os.O_PATH)
        fds = ["--status-fd", str(status_write), "--error-fd", str(error_write)]
        try:
            box = subprocess.Popen(
                self.command_line(argv, [*fds, *options], lower_fd, env_fd, project),
                cwd=self.new_task(),
                env={},
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[self.mnt_ns, self.net_ns, env_fd, lower_fd, status_write, error_write, *extra_fds],
                restore_signals=False,
            )
            os.close(status_write)
            stdout, stderr = box.communicate(timeout=60)
            os.close(error_write)
            told = os.read(status_read, 64)
            error = os.read(error_read, 65536)
        finally:
            for fd in (status_read, error_read, env_fd, lower_fd):
                os.close(fd)
        assert len(told) in (0, 12)
        status, cpu_us = struct.unpack("<iQ", told) if told else (None, 0)
        return Finished(box.returncode, stdout, stderr, status, cpu_us, error)

    def sh(self, script: str, **how: object) -> Finished:
        return self.run("sh", "-c", script, **how)  # type: ignore[arg-type]

    def python(self, script: str, **how: object) -> Finished:
        return self.run("python3", "-I", "-S", "-c", script, **how)  # type: ignore[arg-type]

    def output(self, script: str, **how: object) -> list[str]:
        """The lines of a script that must succeed."""
        done = self.sh(script, **how)
        assert (done.exit, done.status, done.stderr, done.error) == (0, 0, b"", b""), done
        return done.stdout.decode().splitlines()


def mounts() -> str:
    return Path("/proc/self/mounts").read_text()


def processes_with(word: bytes) -> list[str]:
    def command_line(pid: str) -> bytes:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return b""

    return [pid for pid in os.listdir("/proc") if pid.isdigit() and word in command_line(pid).split(b"\0")]
