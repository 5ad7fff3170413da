"""Contents travel from worker to worker, so that the master sends each of them once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

from tests.cluster.farm import Farm, Program

BIG = 20 << 20


def served(farm: Farm, root: Path) -> dict[str, int]:
    """The master's counters."""
    status = farm.command(root, "termite-shell-wrapper", "-inspect")
    counters: dict[str, int] = json.loads(status.stdout)["served"]
    return counters


def workers(farm: Farm, count: int, *flags: str) -> list[tuple[Program, Path]]:
    """Workers of one slot each, with their stores."""
    farm.coordinator()
    found = []
    for number in range(count):
        cache = farm.dir / f"store{number}"
        found.append((farm.worker(1, "-cachedir", str(cache), *flags), cache))
    return found


def project(farm: Farm) -> tuple[Path, str]:
    """A project with one large file, and its SHA-256."""
    root = farm.dir / "project"
    root.mkdir()
    data = os.urandom(BIG)
    (root / "big").write_bytes(data)
    return root, hashlib.sha256(data).hexdigest()


def on_each(farm: Farm, root: Path, names: list[str], script: str) -> list[str]:
    """What the script prints on each of these workers, at the same time."""
    processes = [
        subprocess.Popen(
            ["termite-shell-wrapper", "-worker", name, "-exec", "/bin/sh", "-c", script],
            cwd=root, env=farm.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )
        for name in names
    ]  # fmt: skip
    return [process.communicate(timeout=60)[0] for process in processes]


def name_of(worker: Program) -> str:
    found = re.search(r"listening on port (\d+)", worker.log())
    assert found is not None
    return f"{socket.gethostname()}:{found[1]}"


def warm(farm: Farm, root: Path, count: int) -> None:
    """Opens a mirror on every worker and lets it read what the shell and sha256sum need."""
    outputs = on_each(farm, root, [""] * count, "sleep 2; sha256sum /dev/null")
    assert all(outputs)


def fetched(cache: Path, digest: str) -> bool:
    return (cache / digest[:2] / digest[2:]).exists()


def test_three_workers_want_a_file_and_the_master_sends_it_once(farm: Farm) -> None:
    everyone = workers(farm, 3)
    root, digest = project(farm)
    farm.master(root, "-fallback=fail")
    warm(farm, root, 3)
    before = served(farm, root)["bytes"]
    outputs = on_each(farm, root, [name_of(worker) for worker, _ in everyone], "sha256sum big; sleep 0.5")
    assert outputs == [f"{digest}  big\n"] * 3
    assert all(fetched(cache, digest) for _, cache in everyone)
    counters = served(farm, root)
    assert BIG <= counters["bytes"] - before < BIG + (1 << 20)
    assert counters["fetches_elsewhere"] >= 2 and counters["fetches_come_back"] == 0


def test_a_large_result_goes_from_its_worker_to_the_next_one(farm: Farm) -> None:
    (first, _), (second, cache) = workers(farm, 2)
    root, digest = project(farm)
    farm.master(root, "-fallback=fail")
    warm(farm, root, 2)
    assert on_each(farm, root, [name_of(first)], "cp big copy; head -c 9000000 big > part") == [""]
    part = hashlib.sha256((root / "part").read_bytes()).hexdigest()
    before = served(farm, root)["bytes"]
    outputs = on_each(farm, root, [name_of(second)], "sha256sum copy part")
    assert outputs == [f"{digest}  copy\n{part}  part\n"]
    assert served(farm, root)["bytes"] - before < 1 << 20
    assert fetched(cache, part)


def test_a_peer_that_lies_costs_a_second_copy_and_one_line(farm: Farm) -> None:
    (first, cache), (second, _) = workers(farm, 2)
    root, digest = project(farm)
    farm.master(root, "-fallback=fail")
    warm(farm, root, 2)
    assert on_each(farm, root, [name_of(first)], "sha256sum big") == [f"{digest}  big\n"]
    stored = cache / digest[:2] / digest[2:]
    stored.chmod(0o644)
    with open(stored, "r+b") as f:
        f.seek(BIG // 2)
        f.write(b"a lie")
    assert on_each(farm, root, [name_of(second)], "sha256sum big") == [f"{digest}  big\n"]
    assert len(re.findall("did not give contents", second.log())) == 1
    assert served(farm, root)["fetches_come_back"] == 1
    first.wait_log("were damaged in our store", 10)
    assert not stored.exists()


def test_a_peer_that_died_costs_a_second_copy_and_one_line(farm: Farm) -> None:
    (first, _), (second, _) = workers(farm, 2)
    root, digest = project(farm)
    farm.master(root, "-fallback=fail")
    warm(farm, root, 2)
    assert on_each(farm, root, [name_of(first)], "sha256sum big") == [f"{digest}  big\n"]
    name = name_of(second)
    first.process.send_signal(signal.SIGSTOP)  # to the master it still lives
    try:
        assert on_each(farm, root, [name], "sha256sum big") == [f"{digest}  big\n"]
    finally:
        first.process.send_signal(signal.SIGCONT)
    assert len(re.findall("did not give contents", second.log())) == 1
    assert "trying again" not in second.log()


def test_a_peer_without_the_contents_is_passed_over(farm: Farm) -> None:
    (first, cache), (second, _) = workers(farm, 2)
    root, digest = project(farm)
    farm.master(root, "-fallback=fail")
    warm(farm, root, 2)
    assert on_each(farm, root, [name_of(first)], "sha256sum big") == [f"{digest}  big\n"]
    (cache / digest[:2] / digest[2:]).unlink()
    assert on_each(farm, root, [name_of(second)], "sha256sum big") == [f"{digest}  big\n"]
    assert len(re.findall("did not give contents .*: it does not have them", second.log())) == 1
