"""Builds large projects with plain make and through a farm on this machine, and compares every file.

If one differs, plain make builds once more: a file in which its own two builds differ as well tells nothing.  All
builds of a project happen at the same path, because products name the path they were built in: each one begins with a
fresh copy of the configured tree there, which is moved aside when it has ended.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compat_projects import SUBJECTS, Subject, prepare
from compat_trees import Comparison, compare
from projects import clean_environment, copy_tree
from rich.console import Console
from rich.table import Table

from termite.cli.flags import Flags, HelpWanted
from termite.cli.session import OwnDaemons, program
from termite.errors import TermiteError, UsageError

BUILD_LIMIT_S = 3600.0
SHOWN_NAMES = 20
LOG_END = 3000

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 130  # the table, in a file


@dataclass
class Result:
    project: str
    version: str
    jobs: int
    rules: bool
    plain_s: list[float]
    termite_s: float
    counts: dict[str, int]  # commands by where they ran, as the master tells
    conflicts: list[str]  # as the master tells
    comparison: Comparison
    date: str

    def ratio(self) -> float:
        return self.termite_s / statistics.median(self.plain_s)

    def commands(self) -> str:
        local = sum(n for what, n in self.counts.items() if what.startswith("local"))
        return f"{self.counts.get('remote', 0)} / {local}"

    def as_json(self) -> dict[str, object]:
        return {**vars(self), "comparison": vars(self.comparison), "ratio": round(self.ratio(), 3)}


def build(command: list[str], directory: Path, log: Path) -> float:
    """Seconds; TermiteError, after the log's end has been shown, if it fails or takes too long."""
    environment = clean_environment()
    environment["PATH"] += f":{Path(program('termite-make')).parent}"
    started = time.monotonic()
    with open(log, "wb") as out:
        child = subprocess.Popen(
            command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = child.wait(BUILD_LIMIT_S)
            how = f"ended with status {status}"
        except subprocess.TimeoutExpired:
            status, how = 1, f"took more than {BUILD_LIMIT_S:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if status:
        console.print(log.read_text(errors="replace")[-LOG_END:], markup=False)
        raise TermiteError(f"{' '.join(command)} {how}; its log is {log}")
    return time.monotonic() - started


@contextmanager
def farm(root: Path, jobs: int, logs: Path, *flags: str) -> Iterator[OwnDaemons]:
    """A coordinator, two workers that share the jobs, and a master; their logs are kept in `logs`."""
    daemons = OwnDaemons()
    try:
        daemons.start_coordinator()
        for share in (jobs - jobs // 2, jobs // 2):
            daemons.start_worker(share)
        # Its patience is for workers that are still starting, which takes a busy machine ten seconds and more.
        daemons.start_master(root, jobs, "-fallback=fail", "-time.patience=60s", *flags)
        yield daemons
    finally:
        for log in daemons.dir.glob("*.log"):
            shutil.copy(log, logs)
        daemons.stop()


def inspected(root: Path) -> tuple[dict[str, int], list[str]]:
    """What the master counted, and which files two commands changed at the same time."""
    inspect = [program("termite-shell-wrapper"), "-inspect"]
    done = subprocess.run(inspect, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False)
    if done.returncode:
        raise TermiteError(f"the master did not tell what it did: {done.stdout.decode(errors='replace').strip()}")
    told = json.loads(done.stdout)
    return told["counts"], told["conflicts"]


def run(name: str, jobs: int, rules: bool, work: Path) -> Result:
    """Leaves the trees plain-1, termite and, if these differ, plain-2, and the logs, in `work`."""
    subject: Subject = SUBJECTS[name]
    tree, pristine = work / "tree", work / "pristine"
    root = subject.root(tree)
    console.print(f"{name}: unpacking and configuring ...")
    version = prepare(subject, tree, rules)
    tree.rename(pristine)
    arguments = [f"-j{jobs}", *subject.project.make]

    def plain(number: int) -> float:
        copy_tree(pristine, tree)
        took_s = build(["make", *arguments], root, work / f"plain-{number}.log")
        console.print(f"{name} {version}: make {' '.join(arguments)}: {took_s:.1f} s")
        tree.rename(work / f"plain-{number}")
        return took_s

    plain_s = [plain(1)]
    copy_tree(pristine, tree)
    with farm(root, jobs, work, *subject.master_flags()):
        termite_s = build([program("termite-make"), *arguments], root, work / "termite.log")
        counts, conflicts = inspected(root)
    console.print(f"{name} {version}: termite-make: {termite_s:.1f} s; comparing ...")
    tree.rename(work / "termite")
    comparison = compare(work / "plain-1", work / "plain-1", work / "termite", subject.unordered)
    if comparison.different:
        console.print(f"{name} {version}: {len(comparison.different)} differ; does plain make's next build, too?")
        plain_s.append(plain(2))
        comparison = compare(work / "plain-1", work / "plain-2", work / "termite", subject.unordered)
    return Result(
        name, version, jobs, rules, plain_s, termite_s, counts, conflicts, comparison, time.strftime("%Y-%m-%d")
    )


def show_names(result: Result) -> None:
    """The files that a reader should know of."""
    lines = [f"DIFFERS: {name}: {how}" for name, how in result.comparison.different.items()]
    lines += [f"differs between two plain builds as well: {name}" for name in result.comparison.unstable]
    lines += [
        f"differs by the order of commands, which make does not fix: {name}" for name in result.comparison.unordered
    ]
    lines += [f"conflict: {conflict}" for conflict in result.conflicts]
    for line in lines[:SHOWN_NAMES]:
        console.print(f"{result.project}: {line}", markup=False)
    if len(lines) > SHOWN_NAMES:
        console.print(f"{result.project}: ... and {len(lines) - SHOWN_NAMES} more")


def show(results: list[Result]) -> None:
    table = Table(
        "project", "version", "-j", "make", "termite-make", "ratio", "on workers / here", "files",
        "differences", "date", title="two workers on this machine, empty before",
    )  # fmt: skip
    for r in results:
        table.add_row(
            r.project, r.version, str(r.jobs), f"{statistics.median(r.plain_s):.1f} s", f"{r.termite_s:.1f} s",
            f"{r.ratio():.2f}", r.commands(), str(r.comparison.files), r.comparison.verdict(), r.date,
        )  # fmt: skip
    console.print(table)


def write_json(file: Path, results: list[Result]) -> None:
    """Adds to what the file holds; takes the place of earlier results of the same build."""
    known: dict[str, object] = {}
    try:
        known = json.loads(file.read_text())
    except FileNotFoundError:
        pass
    except ValueError:
        raise TermiteError(f"{file} is not JSON; name another file with -json, or remove it") from None
    known.update({f"{r.project} -j{r.jobs}{' -rules' if r.rules else ''}": r.as_json() for r in results})
    file.write_text(json.dumps(known, indent=1) + "\n")


def compat(names: list[str], jobs: int, rules: bool, keep: bool) -> tuple[list[Result], int]:
    """One project after the other, each to its end: (what was built, exit status)."""
    results: list[Result] = []
    status = 0
    for name in names:
        work = Path(
            tempfile.mkdtemp(prefix="termite-compat-", dir="/srv" if os.access("/srv", os.W_OK) else "/var/tmp")
        )
        work.chmod(0o755)
        kept = True
        try:
            result = run(name, jobs, rules, work)
            results.append(result)
            show_names(result)
            kept = bool(result.comparison.different)
            status = max(status, int(kept))
        except TermiteError as e:
            print(f"compat: {name}: {e}", file=sys.stderr)
            status = max(status, e.exit_status)
        except KeyboardInterrupt:
            kept = False
            raise
        finally:
            if (kept or keep) and any(work.iterdir()):
                console.print(f"{name}: trees and logs are kept in {work}")
            else:
                shutil.rmtree(work, ignore_errors=True)
    return results, status


def main() -> int:
    listed = ", ".join(SUBJECTS)
    flags = Flags(
        "bin/compat",
        "Builds projects from Debian's source packages with make and with termite-make on two workers of this machine, "
        "and compares every file.  If one differs, make builds once more: what already differs between two plain "
        "builds is named, not counted.  "
        f"It needs root, and minutes to an hour for each project.  Projects: {listed}.",
        "PROJECT...",
        flags_anywhere=True,
    )  # fmt: skip
    jobs = flags.integer("j", 4, "jobs of make, and of both workers together", 2, 1000)
    rules = flags.switch("rules", False, "use the project's .termite-localrc of patches/, not the default rules")
    output = flags.text("json", "", "add the results to this file", "FILE")
    keep = flags.switch("keep", False, "keep trees and logs of builds that went well, too")
    try:
        names = flags.parse(sys.argv[1:])
        if not names:
            raise UsageError(f"usage: bin/compat [flags] PROJECT...; projects: {listed}; --help explains")
        unknown = [name for name in names if name not in SUBJECTS]
        if unknown:
            raise UsageError(f"no project {unknown[0]}; there are {listed}")
        without = [name for name in names if rules.value and not SUBJECTS[name].rules]
        if without:
            raise UsageError(f"patches/ has no rules for {without[0]}; leave -rules out")
    except HelpWanted as wanted:
        print(wanted)
        return 0
    except UsageError as e:
        print(f"compat: {e}", file=sys.stderr)
        return e.exit_status
    try:
        results, status = compat(names, jobs.value, rules.value, keep.value)
        if results:
            show(results)
        if output.value:
            write_json(Path(output.value), results)
    except KeyboardInterrupt:
        return 130
    except TermiteError as e:
        print(f"compat: {e}", file=sys.stderr)
        return e.exit_status
    return status


if __name__ == "__main__":
    sys.exit(main())
