"""A new mirror gets what earlier ones asked for, before it asks."""

from __future__ import annotations

import time
from pathlib import Path

from tests.cluster.farm import Farm
from tests.cluster.test_peers import name_of, on_each, served, workers

COUNT = 40


def scene(farm: Farm) -> tuple[Path, Path]:
    """(project, headers beside it)."""
    root, beside = farm.dir / "project", farm.dir / "beside"
    root.mkdir()
    beside.mkdir()
    for number in range(COUNT):
        (beside / f"{number}.h").write_text(f"#define NUMBER {number}\n" * 500)
    return root, beside


def settled(farm: Farm, root: Path) -> int:
    """Bytes sent to workers, once no more are sent."""
    last = -1
    until = time.monotonic() + 30
    while (now := served(farm, root)["bytes"]) != last and time.monotonic() < until:
        last = now
        time.sleep(0.3)
    return last


def test_the_worker_of_the_next_master_has_them_already(farm: Farm) -> None:
    (first, _), (second, _) = workers(farm, 2)
    root, beside = scene(farm)
    master = farm.master(root, "-fallback=fail")
    assert on_each(farm, root, [name_of(first)], f"cat {beside}/*.h | wc -c") != [""]
    master.stop()
    farm.master(root, "-fallback=fail")
    assert on_each(farm, root, [name_of(second)], "sleep 0.1; :") == [""]
    before = settled(farm, root)
    assert before >= sum(file.stat().st_size for file in beside.iterdir())
    (beside / "7.h").write_text("#define NUMBER 0\n")  # a change is seen all the same
    farm.command(root, "termite-shell-wrapper", "-refresh")
    (count,) = on_each(farm, root, [name_of(second)], f"cat {beside}/*.h | wc -c")
    assert int(count) == sum(file.stat().st_size for file in beside.iterdir())
    assert served(farm, root)["bytes"] - before < 100_000
