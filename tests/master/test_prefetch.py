from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from termite import paths
from termite.errors import PeerLost
from termite.master.export import Export
from termite.master.link import MirrorLink
from termite.master.prefetch import PORTION_BYTES, PORTION_FILES, QUIET_S, Prefetcher, Quiet


class FakeLink:
    """A mirror that notes what it was told to fetch."""

    name = "w"

    def __init__(self) -> None:
        self.portions: list[list[bytes]] = []
        self.answer: Callable[[], Awaitable[None]] | None = None

    async def prefetch(self, wanted: list[bytes]) -> None:
        if self.answer is not None:
            await self.answer()
        self.portions.append(wanted)


class Clock:
    """Every look at it is a second later, so nothing is waited for."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="termite-test-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def rel(path: Path) -> bytes:
    return paths.relative(os.fsencode(path))


def fill(root: Path, link: FakeLink, quiet: Quiet | None = None) -> Prefetcher:
    """Runs until the mirror has everything."""

    async def main() -> Prefetcher:
        prefetcher = Prefetcher(Export(rel(root)), quiet or Quiet(lambda: False, Clock()))
        prefetcher.begin(cast(MirrorLink, link))
        async with asyncio.timeout(30):
            while prefetcher.status()["filling"]:
                await asyncio.sleep(0)
        return prefetcher

    return asyncio.run(main())


def test_directories_come_first_and_then_files_the_small_ones_first(root: Path) -> None:
    for name, size in (("large", 300_000), ("d/small", 10), ("medium", 20_000), ("d/e/empty", 0)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes(size))
    link = FakeLink()
    fill(root, link)
    told = [path[len(rel(root)) :].lstrip(b"/") for portion in link.portions for path in portion]
    assert told[:3] == [b"", b"d", b"d/e"]
    assert set(told[3:5]) == {b"d/small", b"d/e/empty"}
    assert told[5:] == [b"medium", b"large"]


def test_what_is_private_or_a_repository_is_not_offered(root: Path) -> None:
    (root / ".git").mkdir()
    (root / ".git" / "pack").touch()
    (root / "closed").mkdir(mode=0o700)
    (root / "secret").touch(0o600)
    (root / "link").symlink_to("secret")
    link = FakeLink()
    fill(root, link)
    assert link.portions == [[rel(root)]]


def test_portions_are_bounded_in_number_and_in_bytes(root: Path) -> None:
    for i in range(PORTION_FILES * 2 + 1):
        (root / f"f{i}").touch()
    for i in range(4):
        with open(root / f"big{i}", "wb") as f:
            f.truncate(PORTION_BYTES * 2 // 3)
    link = FakeLink()
    fill(root, link)
    assert [len(portion) for portion in link.portions] == [1, PORTION_FILES, PORTION_FILES, 1, 1, 1, 1, 1]


def test_a_command_calls_the_portion_off_and_it_is_offered_again(root: Path) -> None:
    (root / "f").touch()
    link = FakeLink()
    quiet = Quiet(lambda: False, Clock())
    tries = 0

    async def answer() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            asyncio.get_running_loop().call_soon(quiet.disturb)
            await asyncio.Event().wait()

    link.answer = answer
    prefetcher = fill(root, link, quiet)
    assert link.portions == [[rel(root)], [rel(root / "f")]]
    assert (prefetcher.interrupted, tries) == (1, 3)


def test_a_mirror_that_is_lost_ends_it(root: Path) -> None:
    link = FakeLink()

    async def answer() -> None:
        raise PeerLost("gone")

    link.answer = answer
    prefetcher = fill(root, link)
    assert link.portions == [] and prefetcher.status()["filling"] == 0


def test_it_is_quiet_only_some_time_after_the_last_command() -> None:
    now, busy = 0.0, True
    quiet = Quiet(lambda: busy, lambda: now)
    now = 10.0
    assert not quiet.is_quiet()
    busy = False
    assert not quiet.is_quiet()
    now += QUIET_S
    assert quiet.is_quiet()
    quiet.disturb()
    assert not quiet.is_quiet()
