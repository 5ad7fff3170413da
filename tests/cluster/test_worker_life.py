"""Workers that are told to end, to begin anew, or do so by themselves, in the middle of a build."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from termite.errors import Leaving
from termite.wire.auth import Purpose
from termite.wire.messages import OpenMirror
from termite.wire.secret import load_secret
from termite.wire.transport import dial
from tests.cluster.commander import Commander
from tests.cluster.farm import Farm, Program, free_port, wait_for

NAMES = [f"o{i}" for i in range(1, 25)]
MAKEFILE = f"""OBJS := {" ".join(NAMES)}
all: $(OBJS)
\tcat $^ > all
o%:
\tsleep 0.3; echo $@ >> $@
"""
_PER_LINUX32 = 8


@pytest.fixture
def commander(farm: Farm) -> Iterator[Commander]:
    commander = Commander(load_secret(farm.secret))
    yield commander
    commander.close()


def commanded(farm: Farm, commander: Commander, jobs: int, *args: str) -> tuple[Program, int]:
    """A worker that listens to the commander as well, and its port."""
    port = free_port()
    worker = farm.worker(jobs, "-coordinator", f"127.0.0.1:{commander.port}", "-port", str(port), *args)
    commander.wait_for(port)
    return worker, port


def project(farm: Farm, text: str = MAKEFILE) -> Path:
    root = farm.dir / "project"
    root.mkdir()
    (root / "Makefile").write_text(text)
    return root


def start(farm: Farm, root: Path, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv, cwd=root, env=farm.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def task(farm: Farm, root: Path, script: str) -> subprocess.Popen[str]:
    return start(farm, root, "termite-shell-wrapper", "-exec", "/bin/sh", "-c", script)


def finish(process: subprocess.Popen[str], limit_s: float = 60) -> tuple[int, str]:
    out, err = process.communicate(timeout=limit_s)
    return process.returncode, err + out


def expect_whole(root: Path) -> None:
    assert (root / "all").read_text() == "".join(f"{name}\n" for name in NAMES)


def started(root: Path, at_least: int) -> bool:
    return len(list(root.glob("o*"))) >= at_least


def registrations(worker: Program) -> int:
    return len(re.findall("coordinator .* reached", worker.log()))


def test_every_worker_restarts_during_a_build_and_nobody_notices(farm: Farm, commander: Commander) -> None:
    farm.coordinator()
    workers = [commanded(farm, commander, 2) for _ in range(2)]
    root = project(farm)
    master = farm.master(root, "-fallback=fail", jobs=4)
    process = start(farm, root, "termite-make", "-j8")
    for number, (worker, port) in enumerate(workers):
        wait_for("some results", partial(started, root, 4 + 8 * number))
        commander.tell(port, "restart")
        worker.wait_log(f"(?s)the worker restarts.*listening on port {port}.*coordinator .* reached")
    status, text = finish(process)
    assert status == 0, text
    (totals,) = [line for line in text.splitlines() if line.startswith("termite:")]
    assert "25 on 2 workers" in totals
    expect_whole(root)
    assert "lost on" not in master.log() and " lost:" not in master.log(), master.log()
    for worker, port in workers:
        assert worker.process.poll() is None
        assert len(re.findall(f"listening on port {port}", worker.log())) == 2


def test_a_command_does_not_queue_where_another_worker_has_a_free_slot(farm: Farm) -> None:
    farm.coordinator()
    farm.worker(1)
    farm.worker(1)
    root = project(farm)
    master = farm.master(root, "-fallback=fail", jobs=2)
    assert finish(task(farm, root, "ls")) == (0, "Makefile\n")  # alone: one worker is enough
    argv = ["termite-shell-wrapper", "-exec", "/bin/sh", "-c", "read line; echo $line"]
    pipe = subprocess.PIPE
    held = [subprocess.Popen(argv, cwd=root, env=farm.env, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    master.wait_log("(?s)mirror open.*mirror open")
    assert [process.communicate("word\n", timeout=60)[0] for process in held] == ["word\n", "word\n"]


def test_after_sigterm_a_long_task_still_ends_as_it_should(farm: Farm) -> None:
    farm.coordinator()
    worker = farm.worker(2)
    root = project(farm)
    master = farm.master(root, "-fallback=fail")
    process = task(farm, root, "echo begun; sleep 6; head -c 3000000 /dev/zero > big; echo ended")
    master.wait_log("mirror open")
    worker.wait_log("is mounted")
    time.sleep(0.7)
    worker.process.send_signal(signal.SIGTERM)
    worker.wait_log("no new tasks")
    refused = farm.remote(root, "seq 3; true")
    assert refused.returncode == 1 and b"no worker" in refused.stderr  # nowhere else to go, and that is said
    asyncio.run(knock(farm, worker))
    status, text = finish(process)
    assert (status, text) == (0, "begun\nended\n")
    assert (root / "big").stat().st_size == 3_000_000
    assert worker.process.wait(10) == 0
    assert "lost on" not in master.log()


async def knock(farm: Farm, worker: Program) -> None:
    """A master that has not heard that the worker leaves is told so."""
    found = re.search(r"listening on port (\d+)", worker.log())
    assert found is not None
    conn = await dial("127.0.0.1", int(found[1]), load_secret(farm.secret), Purpose.MASTER_MIRROR)
    with pytest.raises(Leaving, match="the worker ends"):
        await conn.call(OpenMirror("me", b"srv", 0, 0, 1), timeout_s=5)
    await conn.close()


def test_tasks_that_only_waited_go_elsewhere_without_a_word(farm: Farm) -> None:
    farm.coordinator()
    first = farm.worker(1)
    root = project(farm)
    master = farm.master(root, "-fallback=fail")
    tasks = [task(farm, root, f"sleep 1.5; echo {number}") for number in range(2)]
    first.wait_log("is mounted")
    time.sleep(0.5)
    farm.worker(2)
    first.process.send_signal(signal.SIGTERM)
    assert sorted(finish(process) for process in tasks) == [(0, "0\n"), (0, "1\n")]
    assert first.process.wait(10) == 0
    assert "lost on" not in master.log()


def test_a_second_sigterm_ends_a_worker_at_once(farm: Farm) -> None:
    farm.coordinator()
    worker = farm.worker(1)
    root = project(farm)
    farm.master(root, "-fallback=local")
    process = task(farm, root, "sleep 1; echo done")
    worker.wait_log("is mounted")
    time.sleep(0.3)
    worker.process.send_signal(signal.SIGTERM)
    worker.wait_log("no new tasks")
    begun = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)
    worker.process.wait(10)
    assert time.monotonic() - begun < 5
    status, text = finish(process)
    assert status == 0 and text.endswith("done\n"), text  # run here, and that is said


def test_a_drain_that_takes_too_long_is_cut_short(farm: Farm) -> None:
    farm.coordinator()
    worker = farm.worker(1, "-time.drain", "0.5s")
    root = project(farm)
    farm.master(root, "-fallback=local")
    process = task(farm, root, "test -e here || sleep 4; echo done")
    worker.wait_log("is mounted")
    time.sleep(0.3)
    (root / "here").touch()
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(10) == 0
    assert "still ran after 0.5 s" in worker.log()
    status, text = finish(process)
    assert status == 0, text


def test_kill_now_moves_the_task_and_says_so(farm: Farm, commander: Commander) -> None:
    farm.coordinator()
    first, port = commanded(farm, commander, 1)
    root = project(farm)
    farm.master(root, "-fallback=fail")
    process = task(farm, root, "sleep 4; echo done")
    first.wait_log("is mounted")
    time.sleep(0.3)
    farm.worker(1)
    commander.tell(port, "kill-now")
    assert first.process.wait(10) == 0
    status, text = finish(process)
    assert status == 0 and text.endswith("done\n")
    assert "trying again elsewhere" in text


def test_kill_lets_the_task_finish_and_kill_now_ends_the_patience(farm: Farm, commander: Commander) -> None:
    farm.coordinator()
    worker, port = commanded(farm, commander, 1)
    root = project(farm)
    farm.master(root, "-fallback=local")
    process = task(farm, root, "test -e here || sleep 30; echo done")
    worker.wait_log("is mounted")
    time.sleep(0.3)
    (root / "here").touch()
    commander.tell(port, "kill")
    wait_for("the worker to say that it has no slots", lambda: commander.workers[port].jobs == 0)
    assert worker.process.poll() is None
    commander.tell(port, "kill-now")
    assert worker.process.wait(10) == 0
    status, text = finish(process)
    assert status == 0, text


def test_an_unknown_command_changes_nothing(farm: Farm, commander: Commander) -> None:
    farm.coordinator()
    worker, port = commanded(farm, commander, 1)
    commander.tell(port, "explode\nnow")
    worker.wait_log("knows the commands kill, restart and kill-now")
    assert worker.process.poll() is None


def test_a_mirror_makes_way_for_a_fresh_one_after_some_tasks(farm: Farm) -> None:
    farm.coordinator()
    worker = farm.worker(2, "-reap-count", "5")
    root = project(farm, MAKEFILE.replace("sleep 0.3; ", ""))
    master = farm.master(root, "-fallback=fail")
    status, text = finish(start(farm, root, "termite-make", "-j4"))
    assert status == 0, text
    assert "trying again" not in text
    expect_whole(root)
    assert len(re.findall("is mounted", worker.log())) >= 4
    assert "lost on" not in master.log() and " lost:" not in master.log()


def test_a_mirror_that_grew_too_large_makes_way_for_a_fresh_one(farm: Farm) -> None:
    farm.coordinator()
    worker = farm.worker(2, "-heap-size", "1M")
    root = project(farm, MAKEFILE.replace("sleep 0.3; ", ""))
    farm.master(root, "-fallback=fail")
    status, text = finish(start(farm, root, "termite-make", "-j4"))
    assert status == 0, text
    expect_whole(root)
    assert "MB of memory, a fresh one takes over" in worker.log()


def test_a_worker_of_another_architecture_is_never_chosen(farm: Farm) -> None:
    farm.coordinator()
    libc = ctypes.CDLL(None)
    before = libc.personality(0xFFFFFFFF)
    libc.personality(_PER_LINUX32)  # as setarch(8) does: what this process starts says that it is another machine
    try:
        stranger = farm.worker(2)
    finally:
        libc.personality(before)
    root = project(farm)
    farm.master(root, "-fallback=fail")
    alone = farm.remote(root, "seq 3; true")
    assert alone.returncode == 1 and b"another architecture" in alone.stderr
    farm.worker(1)
    status, text = finish(start(farm, root, "termite-make", "-j4"))
    assert status == 0, text
    assert "is mounted" not in stranger.log()


def test_each_worker_has_a_log_of_its_own_and_its_mirrors_write_to_it(farm: Farm) -> None:
    farm.coordinator()
    port = free_port()
    pattern = farm.dir / "worker-%h-%p.log"
    worker = farm.worker(1, "-port", str(port), "-logfile", str(pattern), "-stderr", str(farm.dir / "err"), ready=False)
    log = farm.dir / f"worker-{os.uname().nodename}-{port}.log"
    wait_for("the log", lambda: log.exists() and "reached" in log.read_text())
    root = project(farm)
    farm.master(root, "-fallback=fail")
    assert farm.remote(root, "seq 1; true").stdout == b"1\n"
    assert re.search(r" I mirror-1 .*is mounted", log.read_text())
    log.rename(farm.dir / "old.log")
    (farm.dir / "err").rename(farm.dir / "old.err")
    worker.process.send_signal(signal.SIGHUP)
    wait_for("new files", lambda: log.exists() and (farm.dir / "err").exists())
    assert worker.process.poll() is None
    assert worker.log() == ""


def test_paranoia_finds_nothing_in_a_sound_build_and_a_changed_store_at_once(farm: Farm) -> None:
    farm.coordinator()
    cache = farm.dir / "cache"
    worker = farm.worker(1, "-paranoia", "-cachedir", str(cache))
    root = project(farm)
    for number in range(60):
        (root / f"in{number}").write_text(f"{number}\n")
    farm.master(root, "-fallback=fail")
    assert farm.remote(root, "cat in* > sum; rm in0; echo more >> in1; cat in1").returncode == 0
    assert farm.remote(root, "cat in* sum").returncode == 0
    assert "paranoia:" not in worker.log(), worker.log()
    worker.stop()  # small contents go to disk at the latest now
    damaged = 0
    for path in cache.glob("??/*"):
        path.chmod(0o644)
        if 0 < path.stat().st_size < 10:  # not the shell and its libraries
            path.write_bytes(b"?" * path.stat().st_size)
            damaged += 1
    assert damaged > 50
    second = farm.worker(1, "-paranoia", "-cachedir", str(cache))
    farm.remote(root, "cat in* > /dev/null")
    second.wait_log(r"paranoia: .*contents are [0-9a-f]{64} in the store, but should be [0-9a-f]{64}", 10)
