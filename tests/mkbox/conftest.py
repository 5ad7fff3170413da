"""The native programs, compiled once, masters that answer as a test wants, and boxes to run commands in."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mkbox.boxing import LINKS, ODD_PROJECT, PROJECT, UID, Boxes, mounts
from tests.mkbox.native import Answer, FakeMaster, build


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with termite-shell-wrapper, termite-make, termite-run and the interposer."""
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture(autouse=True)
def outside_any_build(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("TERMITE_", "MAKE", "LD_PRELOAD", "MFLAGS"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    path = tmp_path / "project"
    path.mkdir()
    return path


@pytest.fixture
def master(project: Path) -> Iterator[Callable[..., FakeMaster]]:
    """master(answer) starts one in the project, or in the directory named as well."""
    started: list[FakeMaster] = []

    def start(answer: Answer, directory: Path | str | None = None) -> FakeMaster:
        started.append(FakeMaster(directory or project, answer))
        return started[-1]

    yield start
    for one in started:
        one.close()


# -- boxes --------------------------------------------------------------------------------------------

SOURCE = Path(__file__).resolve().parents[2] / "mkbox"


@pytest.fixture(scope="session")
def mkbox(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program, compiled as it is released, with every warning an error."""
    binary = tmp_path_factory.mktemp("mkbox") / "mkbox"
    command = ["gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", str(binary)]
    subprocess.run([*command, *map(str, sorted(SOURCE.glob("mkbox*.c")))], check=True)
    return str(binary)


@pytest.fixture(scope="session")
def loopback_only() -> Iterator[int]:
    holder = subprocess.Popen(["unshare", "-n", "sh", "-c", "ip link set lo up; echo ready; cat"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert holder.stdin and holder.stdout and holder.stdout.readline() == b"ready\n"
    fd = os.open(f"/proc/{holder.pid}/ns/net", os.O_RDONLY)
    holder.communicate()
    yield fd
    os.close(fd)


@pytest.fixture
def boxes(mkbox: str, tmp_path: Path, loopback_only: int) -> Iterator[Boxes]:
    before = mounts()
    for project in (PROJECT, ODD_PROJECT):
        root = os.fsencode(tmp_path) + project
        os.makedirs(root + b"/src/deep")
        for name in (b"/file", b"/src/a.c", b"/src/deep/b.c"):
            Path(os.fsdecode(root + name)).write_bytes(b"contents of" + name)
        subprocess.run(["chown", "-R", f"{UID}:{UID}", root], check=True)
    (tmp_path / "root").mkdir()
    template = subprocess.Popen(
        [mkbox, "-q", "-s", tmp_path / "root", "--tmpfs-root", "-b", "/usr=usr", "-r", "usr", *LINKS,
         "-b", f"{tmp_path}/mirror=mirror", "-r", "mirror", "--dev", "dev",
         "-D", "proc", "-D", "tmp", "-D", "var/tmp", "--hold"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert template.stdin and template.stdout and template.stdout.readline() == b"ready\n"
    fd = os.open(f"/proc/{template.pid}/ns/mnt", os.O_RDONLY)
    template.communicate()
    assert template.returncode == 0
    made = Boxes(mkbox, tmp_path, fd, loopback_only)
    yield made
    os.close(fd)
    for task in made.tasks:
        shutil.rmtree(task)
    assert mounts() == before
