"""Large files that are not the project's: only what commands read of them travels."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from termite.worker.ownfiles import SETTLED_NS
from tests.cluster.farm import Farm
from tests.cluster.test_peers import name_of, on_each, served, warm, workers

SIZE = (20 << 20) + 12345
MIDDLE = 9 << 20


def scene(farm: Farm, count: int, *flags: str) -> tuple[Path, Path, bytes, list[str]]:
    """(project, a large file outside of it, its contents, the names of the workers)."""
    names = [worker for worker, _ in workers(farm, count, *(flags or ("-own-files=false",)))]
    root, beside = farm.dir / "project", farm.dir / "beside"
    root.mkdir()
    beside.mkdir()
    data = os.urandom(SIZE)
    (beside / "large").write_bytes(data)
    farm.master(root, "-fallback=fail")
    warm(farm, root, count)
    return root, beside / "large", data, [name_of(worker) for worker in names]


def part(path: Path, at: int, size: int) -> str:
    return f"dd if={path} bs=4096 skip={at // 4096} count={size // 4096} status=none | sha256sum"


def hexdigest(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}  -\n"


def test_reading_a_part_of_a_large_file_does_not_fetch_all_of_it(farm: Farm) -> None:
    root, large, data, (name,) = scene(farm, 1)
    on_each(farm, root, [name], "dd --version; sha256sum --version")  # what these programs need is here now
    before = served(farm, root)["bytes"]
    assert on_each(farm, root, [name], part(large, MIDDLE, 65536)) == [hexdigest(data[MIDDLE : MIDDLE + 65536])]
    assert served(farm, root)["bytes"] - before < SIZE // 4


def test_all_of_a_large_file_is_read_as_it_is(farm: Farm) -> None:
    root, large, data, (name,) = scene(farm, 1)
    assert on_each(farm, root, [name], f"sha256sum <{large}") == [hexdigest(data)]
    before = served(farm, root)["bytes"]
    assert on_each(farm, root, [name], f"sha256sum <{large}; cp {large} copy") == [hexdigest(data)]
    assert served(farm, root)["bytes"] - before < 1 << 20
    assert (root / "copy").read_bytes() == data


def test_the_next_mirror_finds_the_pieces_in_the_store(farm: Farm) -> None:
    root, large, data, (name,) = scene(farm, 1)
    assert on_each(farm, root, [name], f"sha256sum <{large}") == [hexdigest(data)]
    farm.programs[-1].stop()
    farm.master(root, "-fallback=fail")
    assert on_each(farm, root, [name], f"sha256sum <{large}") == [hexdigest(data)]
    assert served(farm, root)["bytes"] < 1 << 20


def test_pieces_go_from_worker_to_worker(farm: Farm) -> None:
    root, large, data, names = scene(farm, 2)
    assert on_each(farm, root, names[:1], f"sha256sum <{large}") == [hexdigest(data)]
    before = served(farm, root)
    assert on_each(farm, root, names[1:], f"sha256sum <{large}") == [hexdigest(data)]
    after = served(farm, root)
    assert after["bytes"] - before["bytes"] < 1 << 20
    assert after["bytes_elsewhere"] - before["bytes_elsewhere"] >= SIZE


def test_a_large_file_that_is_replaced_between_two_commands_is_read_anew(farm: Farm) -> None:
    root, large, data, (name,) = scene(farm, 1)
    assert on_each(farm, root, [name], f"sha256sum <{large}") == [hexdigest(data)]
    other = os.urandom(SIZE)
    large.with_name("new").write_bytes(other)
    os.rename(large.with_name("new"), large)
    farm.command(root, "termite-shell-wrapper", "-refresh")
    assert on_each(farm, root, [name], f"sha256sum <{large}") == [hexdigest(other)]


def test_a_large_file_that_is_replaced_while_it_is_read_is_an_error_and_then_the_new_one(farm: Farm) -> None:
    root, large, data, (name,) = scene(farm, 1)
    first = hexdigest(data[: 1 << 20])
    assert on_each(farm, root, [name], part(large, 0, 1 << 20)) == [first]
    other = os.urandom(SIZE + 1000)  # of the same size, it would be read on from there
    large.with_name("new").write_bytes(other)
    os.rename(large.with_name("new"), large)  # nobody has told the master
    outputs = on_each(farm, root, [name], f"dd if={large} of=/dev/null bs=1M 2>/dev/null || echo error")
    assert outputs == ["error\n"]
    assert on_each(farm, root, [name], f"sha256sum <{large}") == [hexdigest(other)]


# -- files that the worker's machine has itself ----------------------------------------------------------


def settle() -> None:
    """A file that has just been written is not taken for what it was."""
    time.sleep(SETTLED_NS / 1e9 + 0.1)


def test_what_the_workers_machine_has_itself_is_not_sent(farm: Farm) -> None:
    root, large, data, (name,) = scene(farm, 1, "-own-files")
    settle()
    on_each(farm, root, [name], "sha256sum --version")
    before = served(farm, root)["bytes"]
    assert on_each(farm, root, [name], f"sha256sum <{large}; cp {large} copy") == [hexdigest(data)]
    assert served(farm, root)["bytes"] - before < 1 << 20
    assert (root / "copy").read_bytes() == data


def test_a_file_of_the_workers_machine_that_is_replaced_is_not_taken_for_the_masters(farm: Farm) -> None:
    root, large, data, (name,) = scene(farm, 1, "-own-files")
    settle()
    assert on_each(farm, root, [name], f"sha256sum <{large}") == [hexdigest(data)]
    other = os.urandom(SIZE)
    large.with_name("new").write_bytes(other)
    os.rename(large.with_name("new"), large)
    settle()
    farm.command(root, "termite-shell-wrapper", "-refresh")
    assert on_each(farm, root, [name], f"sha256sum <{large}") == [hexdigest(other)]
