"""Recipes as automake and CMake write them: the same bytes and messages as plain make's, without their shells."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster.farm import Farm, tree

AUTOMAKE = r"""
CC = gcc
all: lib/a.o b.o
%.o: %.c
	@echo "  CC      " $@;depbase=`echo $@ | sed 's|[^/]*$$|.deps/&|;s|\.o$$||'`;\
	$(CC) -g -DNAME='"$@"' -MT $@ -MD -MP -MF $$depbase.Tpo -c -o $@ $< &&\
	mv -f $$depbase.Tpo $$depbase.Po
"""

ELSEWHERE = r"""
CC = gcc
all: x-a.o x-b.o
x-a.o: lib/a.c
	$(CC) -g -c -o x-a.o `test -f 'a.c' || echo 'lib/'`a.c
x-b.o: b.c
	$(CC) -g -c -o x-b.o `test -f 'b.c' || echo 'lib/'`b.c
"""

CMAKE = r"""
CC = /usr/bin/cc
all:
	cd $(CURDIR)/build/lib && $(CC) -g -I$(CURDIR) -MD -MT a.o -MF a.d -o a.o -c $(CURDIR)/lib/a.c
"""

SHOWS_ITS_PARENT = """#!/bin/sh
read parent </proc/$PPID/comm
echo "$parent in $PWD"
exec gcc "$@"
"""

every_makefile = pytest.mark.parametrize(
    "makefile", [AUTOMAKE, ELSEWHERE, CMAKE], ids=["automake", "elsewhere", "cmake"]
)


def fill(project: Path, makefile: str) -> None:
    for directory in ("lib/.deps", ".deps", "build/lib"):
        (project / directory).mkdir(parents=True)
    for name in ("lib/a.c", "b.c"):
        (project / name).write_text('#include <stdio.h>\nint f(void) { return puts("one"); }\n')
    (project / "Makefile").write_text(makefile)
    (project / "shows-cc").write_text(SHOWS_ITS_PARENT)
    (project / "shows-cc").chmod(0o755)


def both(cluster: Farm, project: Path, makefile: str, *args: str) -> list[subprocess.CompletedProcess[bytes]]:
    """Plain make, then termite-make, in the same place; the trees they leave must be equal."""
    done, trees = [], []
    for make in ("make", "termite-make"):
        shutil.rmtree(project / "lib", ignore_errors=True)
        for path in ("build", ".deps", "b.o", "x-a.o", "x-b.o"):
            shutil.rmtree(project / path, ignore_errors=True)
            (project / path).unlink(missing_ok=True)
        fill(project, makefile)
        done.append(cluster.command(project, make, "-k", *args))
        trees.append(tree(project))
    assert trees[0] == trees[1]
    return done


@every_makefile
def test_files_are_the_same_to_the_byte(cluster: Farm, project: Path, makefile: str) -> None:
    plain, ours = both(cluster, project, makefile)
    assert (plain.returncode, ours.returncode, ours.stdout) == (0, 0, plain.stdout.replace(b"make", b"termite-make"))
    assert list(project.rglob("*.o"))


@every_makefile
def test_no_shell_is_started(cluster: Farm, project: Path, makefile: str) -> None:
    where = "/build/lib" if makefile == CMAKE else ""
    plain, ours = both(cluster, project, makefile, f"CC={project}/shows-cc")
    assert f"sh in {project}{where}\n".encode() in plain.stdout
    assert f"termite-mkbox in {project}{where}\n".encode() in ours.stdout


@every_makefile
@pytest.mark.parametrize(
    ("compiler", "said"),
    [("gcc -DNAME=1 -Dint=error", b"error"), ("./no-such-gcc", b"./no-such-gcc: not found")],
    ids=["fails", "missing"],
)
def test_what_goes_wrong_says_and_leaves_the_same(
    cluster: Farm, project: Path, makefile: str, compiler: str, said: bytes
) -> None:
    plain, ours = both(cluster, project, makefile, f"CC={compiler}")
    assert plain.returncode == ours.returncode == 2
    assert said in plain.stderr
    assert ours.stderr.replace(b"termite-make", b"make").startswith(plain.stderr)


def test_bash_as_makes_shell_is_as_good(cluster: Farm, project: Path) -> None:
    plain, ours = both(cluster, project, AUTOMAKE, "SHELL=/bin/bash", f"CC={project}/shows-cc")
    assert plain.stdout.count(b"bash in ") == ours.stdout.count(b"termite-mkbox in ") == 2
