"""Where the time of one compile goes: the same command plainly, in a bare box without any daemon, and through termite.

The bare box is what a worker's box is, made by the same mkbox, but its files are this machine's own instead of a
mirror's, and nobody reads what the command changed.  What it costs more than the plain command is the floor: what is
left of the difference to termite is the mirror, the network and the master.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench_common import Costs, children_of, cpu_s, environment, farm, run, say, wait_until, wrapped
from bench_dispatch import drive

from termite.attr.fileattr import attr_of
from termite.cli.session import program
from termite.mirror.box import BoxPlan, box_environment
from termite.mirror.network import make_network
from termite.worker.boxes import FIRST_EXTRA, Boxes

SOURCE = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\nint f(char *s) { return puts(s) + atoi(s); }\n"
COMPILE = "gcc -MT a.o -MD -MP -MF a.Tpo -O2 -c -o a.o a.c && mv -f a.Tpo a.Po"
"""As automake's makefiles have it: a shell, a compiler driver, a compiler, an assembler, and two files of result."""

COMMANDS = 10
"""In a row, each way: a second or less, as this machine may be slower or faster by a third a minute later."""


@dataclass
class Floor:
    """Milliseconds per command, a median or mean for each round; `cpu_ms` by process."""

    way: str  # "plain", "bare box", "termite"
    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)

    def beyond_ms(self, other: Floor) -> float:
        """What this way takes longer than another: the median over all rounds."""
        return statistics.median(own - theirs for own, theirs in zip(self.wall_ms, other.wall_ms, strict=True))

    def note(self, each_s: list[float], cpu: dict[str, float]) -> None:
        self.wall_ms.append(statistics.median(each_s) * 1e3)
        for process, spent in cpu.items():
            self.cpu_ms.setdefault(process, []).append(spent * 1e3 / len(each_s))


def floor(work: Path, rounds: int) -> list[Floor]:
    """One command after the other, a few of each of the three ways in turn."""
    root = work / "floor"
    root.mkdir()
    (root / "a.c").write_text(SOURCE)
    env = environment(TERMITE_SOCKET=str(root / ".termite-socket"))
    plain, bare, ours = (Floor(way) for way in ("plain", "bare box", "termite"))
    command = ["sh", "-c", COMPILE]
    through = [*wrapped("sh")[:-1], *command]
    with farm(root, 2) as daemons:
        drive(through, root, env, 5, 1)
        for _ in range(rounds):
            lives = drive(command, root, env, COMMANDS, 1)
            plain.note(lives.each_s, {"command": lives.cpu_s})
            bare.note(*asyncio.run(_in_bare_boxes(root, command, env)))
            costs = Costs(daemons)
            lives = drive(through, root, env, COMMANDS, 1)
            ours.note(lives.each_s, {"wrapper": lives.cpu_s, **costs.so_far()})
            say("floor: " + ", ".join(f"{way.way} {way.wall_ms[-1]:.1f} ms" for way in (plain, bare, ours)))
    shutil.rmtree(root)
    return [plain, bare, ours]


async def _in_bare_boxes(root: Path, command: list[str], env: dict[str, str]) -> tuple[list[float], dict[str, float]]:
    """(wall seconds of each, CPU seconds of mkbox with the command)."""
    box_dir, top_dir = root / "box", root.parent / "floor-top"
    for directory in (box_dir, top_dir):
        directory.mkdir()
    tasks = Path(tempfile.mkdtemp(dir="/dev/shm"))  # in memory, where a worker has them
    tasks.chmod(0o755)
    run(["mount", "--bind", "/", str(top_dir)], root)  # without what is mounted below, as a mirror is one mount
    try:
        return await _boxes_from(root, command, env, box_dir, tasks, top_dir)
    finally:
        run(["umount", str(top_dir)], root)
        for directory in (box_dir, tasks, top_dir):
            shutil.rmtree(directory)


async def _boxes_from(
    root: Path, command: list[str], env: dict[str, str], box_dir: Path, tasks: Path, top_dir: Path
) -> tuple[list[float], dict[str, float]]:
    mkbox = os.fsencode(program("termite-mkbox"))
    nobody = 65534
    plan = BoxPlan(
        mkbox=mkbox, mountpoint=os.fsencode(top_dir), box_dir=os.fsencode(box_dir), root=os.fsencode(root)[1:],
        uid=nobody, gid=nobody, host="bare", net_fd=make_network(),
    )  # fmt: skip
    names = [name for name in os.listdir(b"/") if not stat.S_ISREG(os.lstat(b"/" + name).st_mode)]
    top = {}
    for name in names:
        st = os.lstat(b"/" + name)
        top[name] = attr_of(st, os.readlink(b"/" + name) if stat.S_ISLNK(st.st_mode) else b"")
    template = await asyncio.to_thread(plan.build, top)
    boxes = Boxes(mkbox)
    server = boxes._pid
    each: list[float] = []
    environ = box_environment([os.fsencode(f"{k}={v}") for k, v in env.items()], os.fsencode(root)[1:])
    argv = [
        *plan.task_argv(FIRST_EXTRA), b"--umask", b"22", b"-d", os.fsencode(root), b"--", *map(os.fsencode, command),
    ]  # fmt: skip
    before = cpu_s(server) + cpu_s(server, children=True)
    for number in range(COMMANDS):
        task = tasks / str(number)
        for part in ("", "w", "u"):
            (task / part).mkdir()
        os.chown(task / "u", nobody, nobody)
        started = time.monotonic()
        await _one(boxes, argv, environ, task, template.fds)
        each.append(time.monotonic() - started)
    wait_until("end of the boxes", lambda: not children_of(server))
    spent = cpu_s(server) + cpu_s(server, children=True) - before
    await boxes.close()
    os.close(plan.net_fd)
    return each, {"mkbox with the command": spent}


async def _one(boxes: Boxes, argv: list[bytes], environ: bytes, task: Path, fds: tuple[int, ...]) -> None:
    env_fd = os.memfd_create("environment")
    os.write(env_fd, environ)
    status_read, status_write = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    task_fd = os.open(task, os.O_PATH | os.O_DIRECTORY)
    box = boxes.start(argv, (null, null, 2), (env_fd, status_write, 2, task_fd, *fds), print)
    for fd in (env_fd, status_write, null, task_fd):
        os.close(fd)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(status_read, ended.set)
    try:
        async with asyncio.timeout(60):
            await ended.wait()
        status = os.read(status_read, 12)
        assert status[:4] == bytes(4), f"the command failed in the bare box: {status!r}"
    finally:
        loop.remove_reader(status_read)
        os.close(status_read)
        boxes.ended(box)
