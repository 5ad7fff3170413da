"""Builds outside the source tree, hashes that outlive a master, and workers that fetch ahead."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.farm import Farm, Program, tree, wait_for

SOURCES = 6


class OutOfTree:
    """A project whose sources lie in one place and whose build happens in another."""

    def __init__(self, farm: Farm, source: Path, build: Path) -> None:
        self.farm = farm
        self.source = source
        self.build = build
        (source / "include").mkdir(parents=True)
        build.mkdir()
        (source / "include" / "common.h").write_text("#define VALUE 1\n")
        for i in range(SOURCES):
            (source / f"f{i}.c").write_text(f'#include "common.h"\nint f{i}(void) {{ return VALUE + {i}; }}\n')
        names = " ".join(f"f{i}.o" for i in range(SOURCES))
        (build / "Makefile").write_text(
            f"S = {source}\nall.a: {names}\n\tar rcD $@ $^\n"
            "%.o: $(S)/%.c $(S)/include/common.h\n\tgcc -I$(S)/include -c $< -o $@\n"
        )

    def master(self, *args: str) -> Program:
        source = os.path.relpath(self.source, self.build)
        return self.farm.master(self.build, "-sourcedir", source, "-fallback=wait", *args)

    def make(self) -> None:
        result = self.farm.make(self.build, "-j4")
        assert result.returncode == 0, result.stderr

    def inspect(self) -> dict[str, Any]:
        shown = self.farm.command(self.build, "termite-shell-wrapper", "-inspect")
        assert shown.returncode == 0, shown.stderr
        found: dict[str, Any] = json.loads(shown.stdout)
        return found

    def end(self, master: Program) -> None:
        assert master.stop() == 0, master.log()
        self.farm.programs.remove(master)


@pytest.fixture
def project(cluster: Farm) -> Iterator[OutOfTree]:
    top = cluster.dir / "out-of-tree"
    top.mkdir()
    yield OutOfTree(cluster, top / "src", top / "build")
    shutil.rmtree(top)


def test_a_build_outside_of_its_sources_works_and_changes_nothing_there(cluster: Farm, project: OutOfTree) -> None:
    before = tree(project.source)
    master = project.master()
    project.make()
    assert (project.build / "all.a").exists()
    assert project.inspect()["counts"]["remote"] == SOURCES + 1
    result = cluster.remote(project.build, f"echo x >{project.source}/new")
    assert result.returncode != 0 and b"Read-only" in result.stderr
    (project.source / "f3.c").write_text('#include "common.h"\nint f3(void) { return VALUE + 3000; }\n')
    expected = tree(project.source)
    project.make()
    assert project.inspect()["counts"]["remote"] == SOURCES + 4, "the echo, one object, one archive"
    assert b"3001" not in (project.build / "f3.o").read_bytes()
    assert tree(project.source) == expected != before
    project.end(master)


def test_a_second_master_on_a_warm_tree_hashes_nothing(cluster: Farm, project: OutOfTree) -> None:
    master = project.master()
    project.make()
    first = project.inspect()["hashed"]
    assert first["project"] >= SOURCES + 1
    project.end(master)

    master = project.master()
    os.unlink(project.build / "all.a")
    project.make()
    (project.build / "f0.o").unlink()
    project.make()
    second = project.inspect()["hashed"]
    assert second["project"] == 0 and second["recalled"] >= SOURCES + 1, second
    project.end(master)

    (project.source / "f1.c").write_text('#include "common.h"\nint f1(void) { return VALUE + 11; }\n')
    master = project.master()
    project.make()
    assert project.inspect()["hashed"]["project"] == 1, "the one that was edited"
    project.end(master)


def test_xattr_false_reads_the_project_again(cluster: Farm, project: OutOfTree) -> None:
    for expected in (0, 0):
        master = project.master("-xattr=false")
        for output in project.build.glob("*.[oa]"):
            output.unlink()
        project.make()
        hashed = project.inspect()["hashed"]
        assert (hashed["recalled"], hashed["saved"]) == (expected, 0) and hashed["files"] > SOURCES
        project.end(master)
    assert not any(os.listxattr(file) for file in project.source.glob("*.c"))


def test_where_files_have_no_xattrs_it_works_and_one_line_says_what_is_lost(cluster: Farm) -> None:
    top = cluster.dir / "ramfs"
    top.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", str(top)], check=True)
    try:
        top.chmod(0o755)
        with pytest.raises(OSError):
            os.setxattr(top, "user.any", b"")
        project = OutOfTree(cluster, top / "src", top / "build")
        for _ in range(2):
            master = project.master()
            project.make()
            (project.build / "all.a").unlink()
            project.make()
            hashed = project.inspect()["hashed"]
            assert hashed["project"] >= SOURCES + 1 and (hashed["recalled"], hashed["saved"]) == (0, 0)
            project.end(master)
            (line,) = [line for line in master.log().splitlines() if "xattrs" in line]
            assert "a new master hashes its files again" in line
            for output in project.build.glob("*.o"):
                output.unlink()
    finally:
        subprocess.run(["umount", str(top)], check=True)


@pytest.mark.parametrize("place", ["/tmp", "/var/tmp"])
def test_sources_below_a_directory_that_every_box_has_of_its_own_are_visible(cluster: Farm, place: str) -> None:
    with tempfile.TemporaryDirectory(prefix="termite-test-", dir=place) as name:
        Path(name).chmod(0o755)
        project = OutOfTree(cluster, Path(name) / "src", cluster.dir / "build-only")
        try:
            master = project.master()
            project.make()
            assert project.inspect()["counts"]["remote"] == SOURCES + 1
            project.end(master)
        finally:
            shutil.rmtree(project.build)


def refusal(farm: Farm, root: Path, *args: str) -> str:
    """What a master says that will not start; one line."""
    result = farm.command(root, "termite-master", "-secret", str(farm.secret), *args)
    assert result.returncode != 0
    (line,) = result.stderr.decode().splitlines()
    return line


def test_a_source_directory_that_cannot_be_is_refused(cluster: Farm, project: OutOfTree) -> None:
    hidden = project.source.parent / "hidden"
    (hidden / "src").mkdir(parents=True)
    hidden.chmod(0o700)
    assert "is private" in refusal(cluster, project.build, "-sourcedir", str(hidden / "src"))
    assert "No such file" in refusal(cluster, project.build, "-sourcedir", "../nowhere")
    assert "not a directory" in refusal(cluster, project.build, "-sourcedir", str(project.source / "f0.c"))
    assert "contradict" in refusal(
        cluster, project.build, "-sourcedir", str(project.source), "-exclude", str(project.source.parent)
    )
    assert "one project's sources" in refusal(cluster, project.build, "-sourcedir", "/")


def test_fetch_all_fills_a_mirror_in_the_background_and_commands_ask_for_nothing(
    cluster: Farm, project: OutOfTree
) -> None:
    (project.source / "deep" / "er").mkdir(parents=True)
    (project.source / "deep" / "er" / "file").write_text("never asked for\n")
    (project.source / "large").write_bytes(os.urandom(3 << 20))
    master = project.master("-fetch-all")
    assert cluster.remote(project.build, "pwd").returncode == 0
    master.wait_log("has all of the project")
    wait_for("every mirror to have all of it", lambda: project.inspect()["fetch_all"]["filling"] == 0)
    status = project.inspect()
    assert status["fetch_all"]["names"] >= SOURCES + 5
    hashed = status["hashed"]["project"]
    assert hashed >= SOURCES + 3, status
    result = cluster.remote(project.build, f"cat {project.source}/deep/er/file; cksum <{project.source}/large")
    assert result.stdout.startswith(b"never asked for\n"), result.stderr
    assert project.inspect()["hashed"]["project"] == hashed, "everything was there"
    project.end(master)


def test_paranoia_finds_nothing_in_a_healthy_build(cluster: Farm, project: OutOfTree) -> None:
    master = project.master("-paranoia", "-fetch-all")
    project.make()
    (project.build / "f2.o").unlink()
    (project.source / "f4.c").write_text("int f4(void) { return 44; }\n")
    project.make()
    assert cluster.remote(project.build, "mkdir d && mv f0.o d && chmod 700 d").returncode == 0
    assert cluster.command(project.build, "termite-shell-wrapper", "-refresh").returncode == 0
    assert project.inspect()["breaches"] == [], master.log()
    assert "paranoia" not in master.log()
    project.end(master)
