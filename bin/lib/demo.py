"""Builds a project plainly and through a farm of its own on this machine, and shows both side by side."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from projects import LIMIT_S, PROJECTS, clean_environment, copy_tree, unpack
from rich.console import Console
from rich.table import Table

from termite.cli.session import OwnDaemons, program
from termite.errors import TermiteError

console = Console(stderr=False)


def build(command: list[str], directory: Path, log: Path) -> float:
    """Seconds; ends the demo with the log's end if the build fails."""
    environment = clean_environment()
    environment["PATH"] += f":{Path(program('termite-make')).parent}"
    started = time.monotonic()
    with open(log, "wb") as out:
        status = subprocess.run(
            command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            timeout=LIMIT_S, check=False,
        ).returncode  # fmt: skip
    if status:
        tail = log.read_text(errors="replace")[-2000:]
        raise TermiteError(f"{' '.join(command)} ended with status {status}:\n{tail}")
    return time.monotonic() - started


def differences(one: Path, other: Path) -> tuple[int, list[str]]:
    """(files compared, those that differ or stand on one side only)."""
    names = {
        os.path.relpath(os.path.join(where, name), root)
        for root in (one, other)
        for where, _, files in os.walk(root)
        for name in files
        if name != ".termite-socket"
    }
    different = []
    for name in sorted(names):
        left, right = one / name, other / name
        if left.is_symlink() or right.is_symlink():
            same = left.is_symlink() and right.is_symlink() and os.readlink(left) == os.readlink(right)
        else:
            same = left.is_file() and right.is_file() and filecmp.cmp(left, right, shallow=False)
        if not same:
            different.append(name)
    return len(names), different


@contextmanager
def shown_at(copy: Path, place: Path) -> Iterator[None]:
    """Shows a copy in the original's place, to this program alone: products name the path they were built in."""
    subprocess.run(["mount", "--bind", copy, place], check=True, timeout=60)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True, timeout=60)


def demo(directory: Path | None, work: Path) -> None:
    plain, farmed = work / "plain", work / "farmed"
    arguments: list[str] = []
    if directory is None:
        console.print("Lua 5.4, from Debian's source package")
        directory = work / "lua"
        arguments = PROJECTS["lua"].make
        unpack(PROJECTS["lua"], directory)
    else:
        console.print(f"copies of {directory}")
    for copy in (plain, farmed):
        copy_tree(directory, copy)
    console.print("plain make ...")
    with shown_at(plain, directory):
        plain_s = build(["make", "-j4", *arguments], directory, work / "plain.log")
    with shown_at(farmed, directory):
        termite_s, status = build_in_farm(arguments, directory, work / "termite.log")
    show(status, plain_s, termite_s, *differences(plain, farmed))


def build_in_farm(arguments: list[str], directory: Path, log: Path) -> tuple[float, dict[str, object]]:
    """(seconds, what the master counted) of a build with a coordinator, two workers and a master."""
    daemons = OwnDaemons()
    try:
        console.print("a coordinator, two workers, a master ...")
        daemons.start_coordinator()
        for _ in range(2):
            daemons.start_worker(2)
        daemons.start_master(directory, 4, "-fallback=fail")
        console.print("termite-make ...")
        seconds = build([program("termite-make"), "-j4", *arguments], directory, log)
        inspect = [program("termite-shell-wrapper"), "-inspect"]
        counted = subprocess.run(inspect, cwd=directory, stdout=subprocess.PIPE, check=True, timeout=60).stdout
        status: dict[str, object] = json.loads(counted)
        return seconds, status
    finally:
        daemons.stop()


def show(status: dict[str, object], plain_s: float, termite_s: float, files: int, different: list[str]) -> None:
    table = Table(title="termite-make -j4, two workers on this machine", show_header=False)
    counts, workers = status["counts"], status["workers"]
    assert isinstance(counts, dict) and isinstance(workers, dict)
    for name, worker in workers.items():
        table.add_row(f"commands on worker {name}", str(worker["done"]))
    for what, count in counts.items():
        if what != "remote":
            table.add_row(f"commands {what}", str(count))
    table.add_row("plain make", f"{plain_s:.2f} s")
    table.add_row("termite-make, workers empty before", f"{termite_s:.2f} s")
    verdict = "all identical" if not different else f"{len(different)} differ: {', '.join(different[:5])}"
    table.add_row(f"{files} files compared", verdict)
    console.print(table)


def main() -> int:
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["-help"], ["--help"]):
        print("usage: bin/demo [DIR]    builds a copy of DIR, or Lua 5.4, with make and with termite-make")
        return 0 if len(sys.argv) == 2 else 2
    directory = Path(sys.argv[1]).resolve() if len(sys.argv) == 2 else None
    if directory is not None and not directory.is_dir():
        print(f"demo: {directory} is not a directory", file=sys.stderr)
        return 2
    work = Path(tempfile.mkdtemp(prefix="termite-demo-", dir="/var/tmp"))
    work.chmod(0o755)
    try:
        demo(directory, work)
    except TermiteError as e:
        print(f"demo: {e}", file=sys.stderr)
        return e.exit_status
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
