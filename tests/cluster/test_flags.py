"""Flags that the other modules do not need, with the real programs: each does what its explanation says."""

from __future__ import annotations

import os
import pwd
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.farm import Farm, Program, free_port, wait_for


@pytest.fixture
def root(cluster: Farm) -> Iterator[Path]:
    """A project without a master."""
    root = cluster.dir / "unserved"
    root.mkdir()
    yield root
    shutil.rmtree(root)


def end(farm: Farm, program: Program) -> None:
    assert program.stop() == 0, program.log()
    farm.programs.remove(program)


def test_a_socket_elsewhere_is_found_by_the_environment(cluster: Farm, root: Path) -> None:
    place = cluster.dir / "elsewhere"
    place.mkdir()
    master = cluster.master(root, "-fallback=fail", "-socket", str(place / "s"))
    wrapper = ("termite-shell-wrapper", "-exec", "/bin/sh", "-c", "seq 2; echo x >made")
    assert cluster.command(root, *wrapper).returncode != 0, "there is none in or above the project"
    result = cluster.command(root, *wrapper, env={"TERMITE_SOCKET": str(place / "s")})
    assert (result.returncode, result.stdout) == (0, b"1\n2\n"), result.stderr
    assert sorted(os.listdir(root)) == ["made"]
    (root / "Makefile").write_text("all:\n\tseq 3 >out; true\n")
    result = cluster.make(root, env={"TERMITE_SOCKET": str(place / "s")})
    assert result.returncode == 0 and (root / "out").read_text() == "1\n2\n3\n", result.stderr
    end(cluster, master)


def test_what_is_excluded_is_hidden_from_commands(cluster: Farm, root: Path) -> None:
    for name in ("hidden", "shown"):
        (root / name).mkdir()
        (root / name / "file").write_text(f"{name}\n")
    master = cluster.master(root, "-fallback=fail", "-exclude", "hidden")
    result = cluster.remote(root, "cat hidden/file shown/file; ls hidden")
    assert result.stdout == b"shown\n" and b"Permission denied" in result.stderr
    end(cluster, master)


def test_idle_slots_are_given_back_and_asked_for_again(cluster: Farm, root: Path) -> None:
    master = cluster.master(root, "-fallback=fail", "-time.keepalive", "0.3s", "-time.household", "0.1s")
    for times in (1, 2):
        assert cluster.remote(root, "seq 1; true").stdout == b"1\n"
        master.wait_log(f"(?s)(idle, slots given back.*){{{times}}}")
    end(cluster, master)


def test_without_retries_a_lost_command_fails_and_says_so(farm: Farm) -> None:
    farm.coordinator()
    worker = farm.worker(1)
    root = farm.dir / "project"
    root.mkdir()
    farm.master(root, "-fallback=fail", "-retry", "0")
    process = subprocess.Popen(
        ["termite-shell-wrapper", "-exec", "/bin/sh", "-c", "echo begun; exec sleep 60"],
        cwd=root, env=farm.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"begun\n"
    worker.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and b"lost 1 times" in errors, errors
    assert b"trying again" not in errors
    farm.worker(1).wait_log("left by a worker that was killed")


def test_a_worker_takes_the_next_free_port_runs_commands_as_its_user_and_raises_its_limits(farm: Farm) -> None:
    farm.coordinator()
    port = free_port()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        flags = ("-port", str(port), "-port-retry", "5", "-user", "daemon", "-cpus", "2")
        workers = [farm.worker(1, *flags) for _ in range(2)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    ports = [int(re.findall(r"listening on port (\d+)", worker.log())[0]) for worker in workers]
    assert port == ports[0] < ports[1] <= port + 5
    for worker in workers:
        assert re.search(rf"Max open files +{hard} ", Path(f"/proc/{worker.process.pid}/limits").read_text())
    root = farm.dir / "project"
    root.mkdir()
    hashes = farm.dir / "hashes"
    master = farm.master(root, "-fallback=fail", "-cachedir", str(hashes))
    assert farm.remote(root, "id -u; true").stdout == b"%d\n" % pwd.getpwnam("daemon").pw_uid
    master.stop()
    assert sorted(path.name.partition("-")[0] for path in hashes.iterdir()) == ["first", "hashes"]


def test_a_worker_of_two_coordinators_serves_the_masters_of_both(farm: Farm) -> None:
    first = farm.coordinator()
    port_file = farm.dir / "second.port"
    second = farm.run(
        "termite-coordinator", "-secret", str(farm.secret), "-port", "0", "-listen", "127.0.0.1", "-web-port", "off",
        "-port-file", str(port_file),
    )  # fmt: skip
    wait_for("the second coordinator", port_file.exists)
    other = port_file.read_text().strip()
    worker = farm.worker(1, "-coordinator", other)
    wait_for("both to be reached", lambda: worker.log().count("reached") == 2)
    root = farm.dir / "project"
    root.mkdir()
    master = farm.master(root, "-fallback=fail", "-coordinator", other)
    first.stop()
    assert farm.remote(root, "seq 1; true").stdout == b"1\n"
    assert second.process.poll() is None
    assert not re.search(r"worker \S+ lost", master.log())  # a coordinator was, on purpose
