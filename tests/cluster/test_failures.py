"""What happens when something dies, lies, or is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.farm import PROGRAMS, Farm, leftovers, tree, wait_for, write_ssh_key

SLOW = "OBJS := $(foreach i,1 2 3 4 5 6 7 8 9 10 11 12,o$(i))\nall: $(OBJS)\n\tcat $^ > all\no%:\n\tsleep 0.5; echo $@ > $@\n"


def slow_project(farm: Farm, makefile: str = SLOW) -> Path:
    root = farm.dir / "slow"
    root.mkdir()
    (root / "Makefile").write_text(makefile)
    return root


def start_make(farm: Farm, root: Path, *args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["termite-make", *args], cwd=root, env=farm.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[bytes], limit_s: float = 120) -> tuple[int, str]:
    out, err = process.communicate(timeout=limit_s)
    return process.returncode, (out + err).decode(errors="replace")


def expect_whole(root: Path) -> None:
    assert (root / "all").read_text() == "".join(f"o{i}\n" for i in range(1, 13))


def test_a_worker_that_is_killed_costs_only_time(farm: Farm) -> None:
    farm.coordinator()
    first, _ = farm.worker(2), farm.worker(2)
    root = slow_project(farm)
    farm.master(root, "-fallback=fail")
    process = start_make(farm, root, "-j8")
    wait_for("some results", lambda: len(list(root.glob("o*"))) >= 2)
    first.kill()
    status, text = finish(process)
    assert status == 0, text
    expect_whole(root)
    for path in (farm.dir / "tmp").glob("*"):  # what the killed one left is cleared by the next one
        assert path.is_dir()
    farm.worker(1)


def test_a_mirror_that_is_killed_is_replaced_by_its_only_worker(farm: Farm) -> None:
    farm.coordinator()
    worker = farm.worker(4)
    root = slow_project(farm)
    farm.master(root, "-fallback=fail")
    process = start_make(farm, root, "-j8")
    wait_for("some results", lambda: len(list(root.glob("o*"))) >= 2)
    mirror = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split()[0]
    os.kill(int(mirror), signal.SIGKILL)
    status, text = finish(process)
    assert status == 0, text
    expect_whole(root)
    again = [line for line in text.splitlines() if "trying again elsewhere" in line]
    assert 1 <= len(again) <= 8 and len(set(again)) == len(again), "each command was lost once"


def test_both_workers_killed_means_a_local_build_and_one_line_that_says_so(farm: Farm) -> None:
    farm.coordinator()
    workers = [farm.worker(2), farm.worker(2)]
    root = slow_project(farm)
    farm.master(root, "-fallback=local")
    process = start_make(farm, root, "-j4")
    wait_for("some results", lambda: len(list(root.glob("o*"))) >= 2)
    for worker in workers:
        worker.kill()
    status, text = finish(process)
    assert status == 0, text
    expect_whole(root)
    assert "running commands here" in text
    farm.worker(1)


def test_without_any_worker_commands_run_locally_and_one_line_says_so(farm: Farm) -> None:
    farm.coordinator()
    root = slow_project(farm)
    farm.master(root, "-fallback=local")
    status, text = finish(start_make(farm, root, "-j4"))
    assert status == 0
    assert len(re.findall("running commands here", text)) == 1, text
    expect_whole(root)


def test_fallback_fail_fails_and_says_why(farm: Farm) -> None:
    farm.coordinator()
    root = slow_project(farm)
    farm.master(root, "-fallback=fail")
    status, text = finish(start_make(farm, root, "-j4"))
    assert status == 2
    assert "no worker" in text


def test_fallback_wait_waits_for_a_worker(farm: Farm) -> None:
    farm.coordinator()
    root = slow_project(farm)
    farm.master(root, "-fallback=wait")
    process = start_make(farm, root, "-j4")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(5)
    farm.worker(4)
    status, text = finish(process)
    assert status == 0, text
    expect_whole(root)


def test_a_master_that_is_told_to_stop_ends_its_commands_with_one_line_each(farm: Farm) -> None:
    farm.coordinator()
    farm.worker(1)
    root = farm.dir / "project"
    root.mkdir()
    master = farm.master(root, "-fallback=fail", jobs=2)
    assert farm.remote(root, "true").returncode == 0
    argv = ["termite-shell-wrapper", "-exec", "/bin/sh", "-c", "touch begun; sleep 300"]
    commands = [
        subprocess.Popen(argv, cwd=root, env=farm.env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(3)  # one runs, one queues behind it, one waits for a slot
    ]
    try:
        wait_for("three commands", lambda: inspected(farm, root) == 3)
        assert master.stop() == 0
    finally:
        said = [command.communicate(timeout=60)[1] for command in commands]
    for command, err in zip(commands, said, strict=True):
        assert command.returncode != 0
        assert re.fullmatch(r"termite: the master is shutting down; not finished: .*sleep 300.*\n", err), err
    assert "Traceback" not in master.log()


def inspected(farm: Farm, root: Path) -> int:
    """How many commands the master has in hand."""
    status = json.loads(farm.command(root, "termite-shell-wrapper", "-inspect").stdout)
    return int(status["running"]) + int(status["waiting"])


def test_a_killed_master_ends_the_make_and_leaves_workers_clean(farm: Farm) -> None:
    farm.coordinator()
    farm.worker(4)
    root = slow_project(farm, SLOW.replace("sleep 0.5", f"sleep 6{os.getpid()}"))
    master = farm.master(root)
    process = start_make(farm, root, "-j4")
    running = ["pgrep", "-f", f"^sleep 6{os.getpid()}"]
    wait_for("a remote sleep", lambda: subprocess.run(running, stdout=subprocess.DEVNULL).returncode == 0)
    master.kill()
    status, text = finish(process, 20)
    assert status == 2
    assert "went away" in text
    wait_for("the boxes' end", lambda: subprocess.run(running, stdout=subprocess.DEVNULL).returncode == 1, 10)
    wait_for("the mirror's end", lambda: not list((farm.dir / "tmp").glob("*/mirror-*")), 10)


def test_a_build_does_not_notice_the_coordinator_stopping(farm: Farm) -> None:
    coordinator = farm.coordinator()
    worker = farm.worker(4)
    root = slow_project(farm)
    farm.master(root, "-fallback=fail")
    process = start_make(farm, root, "-j4")
    wait_for("some results", lambda: len(list(root.glob("o*"))) >= 2)
    coordinator.kill()
    status, text = finish(process)
    assert status == 0, text
    expect_whole(root)
    farm.coordinator()
    wait_for(
        "the worker's return", lambda: len(re.findall("coordinator .* (connected|back|reached)", worker.log())) >= 2, 15
    )
    (root / "o1").unlink()
    status, text = finish(start_make(farm, root, "-j4"))
    assert status == 0, text


def test_a_dead_worker_is_off_the_list_within_a_second_and_a_frozen_one_soon(farm: Farm) -> None:
    coordinator = farm.coordinator()
    dying, frozen = farm.worker(1), farm.worker(1)
    wait_for("both workers", lambda: coordinator.log().count(" jobs, ") >= 2)
    dying.kill()
    started = time.monotonic()
    coordinator.wait_log(r"worker .* is gone", 5)
    assert time.monotonic() - started < 1.0
    frozen.process.send_signal(signal.SIGSTOP)
    try:
        wait_for(
            "the frozen one to be struck off", lambda: len(re.findall(r"worker .* is gone", coordinator.log())) >= 2, 20
        )
    finally:
        frozen.process.send_signal(signal.SIGCONT)
    farm.worker(1)


def test_the_wrong_secret_is_refused_with_a_clear_message_on_both_sides(farm: Farm) -> None:
    coordinator = farm.coordinator()
    farm.worker(1)
    right = farm.secret
    wrong = farm.dir / "wrong"
    wrong.touch(0o600)
    wrong.write_text("another secret\n")
    if farm.ssh:
        write_ssh_key(wrong)
    farm.secret = wrong
    root = slow_project(farm)
    worker = farm.worker(1, ready=False)
    master = farm.master(root, "-fallback=local")
    farm.secret = right
    for program in (worker, master):
        program.wait_log("secret")
    coordinator.wait_log("holds another" if farm.ssh else "does not hold our secret")
    status, text = finish(start_make(farm, root, "-j4"))
    assert status == 0
    assert "running commands here" in text and "secret" in text
    for program in farm.programs:
        assert "another secret" not in program.log() and "a secret for tests" not in program.log()


def test_garbage_silence_and_floods_disturb_nobody(farm: Farm) -> None:
    farm.coordinator()
    worker = farm.worker(4)
    root = slow_project(farm)
    farm.master(root, "-fallback=fail")
    found = re.search(r"listening on port (\d+)", worker.log())
    assert found is not None
    sockets = []
    process = start_make(farm, root, "-j4")
    for port in (farm.coordinator_port, int(found[1])):
        for number in range(150):
            s = socket.create_connection(("127.0.0.1", port))
            sockets.append(s)
            if number % 3:
                try:
                    s.sendall(os.urandom(100_000) if number % 3 == 1 else b"GET / HTTP/1.0\r\n\r\n")
                except OSError:
                    pass  # it hung up on us, as it should
    status, text = finish(process)
    for s in sockets:
        s.close()
    assert status == 0, text
    expect_whole(root)


def failing(farm: Farm, name: str, *args: str, cwd: Path | None = None, **env: str) -> str:
    """Runs a program that must end with one line and a status that is not 0."""
    environment = {**farm.env, "HOME": str(farm.dir), **env}
    result = subprocess.run(
        [PROGRAMS / name, *args],
        cwd=cwd or farm.dir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode not in (0, -signal.SIGKILL), result
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_bad_secrets_are_refused_in_one_line(farm: Farm) -> None:
    open_to_all = farm.dir / "open"
    open_to_all.write_text("x")
    open_to_all.chmod(0o644)
    empty = farm.dir / "empty"
    empty.touch(0o600)
    for name in ("termite-coordinator", "termite-worker", "termite-master"):
        rest = [] if name == "termite-coordinator" else ["-coordinator", "127.0.0.1:1"]
        assert "chmod" in failing(farm, name, "-secret", str(open_to_all), *rest)
        assert "empty" in failing(farm, name, "-secret", str(empty), *rest)
        assert "nowhere" in failing(farm, name, "-secret", "nowhere", *rest)


def test_bad_flags_are_refused_in_one_line(farm: Farm) -> None:
    secret = ("-secret", str(farm.secret))
    assert "-prot" in failing(farm, "termite-coordinator", *secret, "-prot", "1")
    assert "port" in failing(farm, "termite-coordinator", *secret, "-port", "99999")
    assert "coordinator" in failing(farm, "termite-worker", *secret)
    assert "a:b:c" in failing(farm, "termite-worker", *secret, "-coordinator", "a:b:c")
    assert "tmpdir" in failing(farm, "termite-worker", *secret, "-coordinator", "h:1", "-tmpdir", "/no/such/dir")
    assert "fallback" in failing(farm, "termite-master", *secret, "-coordinator", "h:1", "-fallback", "maybe")
    assert "jobs" in failing(farm, "termite-master", *secret, "-coordinator", "h:1", "-jobs", "none")
    worker = ("termite-worker", *secret, "-coordinator", "h:1")
    for host in ("a b", "host:1", "[::1]"):
        assert "without a port" in failing(farm, *worker, "-advertise", host)


def test_a_master_refuses_flags_that_make_no_sense_in_one_line_and_touches_nothing(farm: Farm) -> None:
    root = farm.dir / "project"
    root.mkdir()
    (root / "Makefile").write_text("all:\n")
    command = ("termite-master", "-secret", str(farm.secret), "-port", "off", "-coordinator")
    for address in ("h:0", "h:99999", "http://h", ":1233", "[::1", "a b"):
        assert f"address {address!r}" in failing(farm, *command, address, cwd=root)
    assert "there is an empty one in it" in failing(farm, *command, "", cwd=root)
    assert "address 'h:x'" in failing(farm, *command[:-1], cwd=root, TERMITE_COORDINATOR="h:x")
    good = (*command, "h:1")
    assert "that is the project" in failing(farm, *good, "-exclude", ".", cwd=root)
    assert "that is everything" in failing(farm, *good, "-exclude", "/", cwd=root)
    assert "something else is there" in failing(farm, *good, "-socket", "Makefile", cwd=root)
    assert "something else is there" in failing(farm, *good, "-socket", ".", cwd=root)
    assert "No such file" in failing(farm, *good, "-socket", "no/such/socket", cwd=root)
    assert [path.name for path in root.iterdir()] == ["Makefile"]


def test_a_taken_port_is_named_in_one_line(farm: Farm) -> None:
    farm.coordinator()
    line = failing(
        farm,
        "termite-coordinator",
        "-secret",
        str(farm.secret),
        "-port",
        str(farm.coordinator_port),
        "-listen",
        "127.0.0.1",
    )
    assert str(farm.coordinator_port) in line


def test_a_private_directory_is_refused_with_the_remedy(farm: Farm) -> None:
    private = farm.dir / "private"
    (private / "project").mkdir(parents=True)
    private.chmod(0o700)
    args = ("-secret", str(farm.secret), "-coordinator", "127.0.0.1:1")
    line = failing(farm, "termite-master", *args, cwd=private / "project")
    assert str(private) in line and "chmod" in line


@pytest.mark.parametrize("text", ["[{", '[{"Regexp": 3}]', '[{"Regexp": "("}]', '{"Regexp": "x"}', '[{"Regex": "x"}]'])
def test_a_broken_rule_file_is_refused_with_file_and_reason(farm: Farm, text: str) -> None:
    root = farm.dir / "ruled"
    root.mkdir()
    (root / ".termite-localrc").write_text(f"# a comment\n{text}\n")
    line = failing(farm, "termite-master", "-secret", str(farm.secret), "-coordinator", "127.0.0.1:1", cwd=root)
    assert ".termite-localrc" in line


def test_a_missing_dev_fuse_libfuse_or_permission_is_told_with_the_remedy(farm: Farm) -> None:
    worker = [PROGRAMS / "termite-worker", "-secret", str(farm.secret), "-coordinator", "h:1", "-tmpdir", str(farm.tmp),
              "-cachedir", str(farm.dir / "c"), "-port", "0"]  # fmt: skip
    hidden = subprocess.run(
        ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec "$@"', "sh", *worker],
        env=farm.env, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert "/dev/fuse" in hidden.stderr and len(hidden.stderr.strip().splitlines()) == 1, hidden.stderr
    known = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    library = next(line.split()[-1] for line in known.splitlines() if line.split()[0] == "libfuse.so.2")
    without = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'mount --bind /dev/null {library} && exec "$@"', "sh", *worker],
        env=farm.env, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert without.stderr.strip() == "termite-worker: libfuse 2 is missing: apt-get install libfuse2", without.stderr
    powerless = subprocess.run(
        ["setpriv", "--bounding-set", "-sys_admin", *worker],
        env=farm.env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "root" in powerless.stderr or "CAP_SYS_ADMIN" in powerless.stderr
    assert len(powerless.stderr.strip().splitlines()) == 1, powerless.stderr


def test_a_full_cache_disk_is_told_and_the_build_still_ends_right(farm: Farm) -> None:
    farm.coordinator()
    small = farm.dir / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], check=True)
    try:
        worker = farm.worker(2, "-cachedir", str(small))
        root = slow_project(farm, "all:\n\thead -c 3000000 /dev/urandom > all\n")
        farm.master(root, "-fallback=local")
        status, text = finish(start_make(farm, root))
        assert status == 0, text
        assert (root / "all").stat().st_size == 3000000
        assert "full" in text or "No space" in text, text
        farm.stop()
        assert "Traceback" not in worker.log()
    finally:
        farm.stop()
        subprocess.run(["umount", small], check=True)


def test_termite_make_alone_starts_what_it_needs_and_takes_it_down(farm: Farm) -> None:
    root = slow_project(farm)
    env = {"HOME": str(farm.dir), "TMPDIR": str(farm.tmp)}
    result = farm.make(root, "-j4", env=env)
    assert result.returncode == 0, result.stderr
    expect_whole(root)
    assert not (root / ".termite-socket").exists()
    shutil.rmtree(root)
    root = slow_project(farm, "all:\n\texit 3\n")
    assert farm.make(root, env=env).returncode == 2
    wait_for("nothing to be left", lambda: not leftovers(farm.dir), 10)


def test_termite_make_alone_uses_the_coordinator_that_the_environment_names(farm: Farm) -> None:
    farm.coordinator()
    worker = farm.worker(2)
    root = slow_project(farm)
    result = farm.make(
        root,
        "-j4",
        env={"TERMITE_COORDINATOR": f"127.0.0.1:{farm.coordinator_port}", "TERMITE_SECRET": str(farm.secret)},
    )
    assert result.returncode == 0, result.stderr
    expect_whole(root)
    assert "mirror 1" in worker.log()


def test_a_second_master_in_the_same_directory_is_refused(farm: Farm) -> None:
    farm.coordinator()
    root = slow_project(farm)
    farm.master(root)
    line = failing(farm, "termite-master", "-secret", str(farm.secret), "-coordinator", "127.0.0.1:1", cwd=root)
    assert "another master" in line


def test_stopping_everything_in_mid_build_leaves_nothing(farm: Farm) -> None:
    farm.coordinator()
    farm.worker(4)
    root = slow_project(farm)
    farm.master(root)
    process = start_make(farm, root, "-j4")
    wait_for("some results", lambda: len(list(root.glob("o*"))) >= 1)
    farm.stop()
    finish(process)
    assert b".termite-socket" not in tree(root)
