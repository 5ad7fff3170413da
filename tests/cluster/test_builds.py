"""Real projects through an unmodified make and ninja: every produced byte as in a plain build."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from projects import PROJECTS, unpack

from tests.cluster.farm import Farm, tree

BUILD_LIMIT_S = 900


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    farm = Farm()
    farm.coordinator()
    farm.worker(2)
    farm.worker(2)
    yield farm
    farm.close()


def run(farm: Farm, directory: Path, *args: str) -> str:
    result = farm.command(directory, *args, limit_s=BUILD_LIMIT_S)
    assert result.returncode == 0, (result.stdout[-4000:] + result.stderr[-4000:]).decode(errors="replace")
    assert b"no worker" not in result.stderr, result.stderr
    return result.stdout.decode(errors="replace")




@pytest.mark.parametrize("name", PROJECTS)
@pytest.mark.timeout(2 * BUILD_LIMIT_S)
def test_a_project_builds_to_the_same_bytes(farm: Farm, name: str) -> None:
    root = farm.dir / "project"  # the same path for both builds: it is compiled into the objects
    pristine = farm.dir / "pristine"
    args, header = PROJECTS[name].make, PROJECTS[name].header
    unpack(PROJECTS[name], root)
    subprocess.run(["cp", "-a", root, pristine], check=True)
    run(farm, root, "make", "-j4", *args)
    plain = tree(root)
    plain_rebuild = _rebuilt(farm, root, header, "make", args)
    shutil.rmtree(root)
    pristine.rename(root)

    master = farm.master(root, "-fallback=fail")
    try:
        run(farm, root, "termite-make", "-j4", *args)
        assert tree(root) == plain
        again = run(farm, root, "termite-make", "-j4", *args)
        assert "gcc" not in again and " -c " not in again
        assert tree(root) == plain
        assert _rebuilt(farm, root, header, "termite-make", args) == plain_rebuild
        assert tree(root) == plain
    finally:
        master.stop()
        farm.programs.remove(master)
        shutil.rmtree(root)


def _rebuilt(farm: Farm, root: Path, header: str, make: str, args: list[str]) -> set[bytes]:
    """Which files are written again after one header was touched."""
    before = {path: os.lstat(os.path.join(os.fsencode(root), path)).st_mtime_ns for path in tree(root)}
    now = time.time() + 1
    os.utime(root / header, (now, now))
    while time.time() < now:
        time.sleep(0.05)  # so that what is built now is newer than the header
    run(farm, root, make, "-j4", *args)
    after = {path: os.lstat(os.path.join(os.fsencode(root), path)) for path in tree(root)}
    return {
        p
        for p, st in after.items()
        if st.st_mtime_ns != before.get(p) and not p.endswith(header.encode()) and not _is_dir(st)
    }


def _is_dir(st: os.stat_result) -> bool:
    return st.st_mode & 0o170000 == 0o040000


ODD = [
    b"with space",
    b"co:lon",
    b"com,ma",
    "caf\u00e9 \u4e2d".encode(),
    b"not-utf8-\xff\xfe",
    b"new\nline",
    b"quote'\"",
    b"back\\slash",
]


@pytest.mark.parametrize("name", ODD)
def test_a_project_in_an_odd_path_builds(farm: Farm, name: bytes) -> None:
    root = Path(os.fsdecode(os.path.join(os.fsencode(farm.dir), name)))
    root.mkdir()
    (root / "Makefile").write_text(
        "all: prog out\nprog: a.o\n\tgcc -o $@ $^\n%.o: %.c h.h\n\tgcc -c -o $@ $<\nout: prog\n\t./prog > out\n"
    )
    (root / "a.c").write_text('#include <stdio.h>\n#include "h.h"\nint main(void) { puts(H); return 0; }\n')
    (root / "h.h").write_text('#define H "hello"\n')
    master = farm.master(root, "-fallback=fail")
    try:
        run(farm, root, "termite-make", "-j4")
        assert (root / "out").read_text() == "hello\n"
    finally:
        master.stop()
        farm.programs.remove(master)


@pytest.mark.timeout(BUILD_LIMIT_S)
def test_makefiles_of_cmake_print_the_same_lines_and_build_the_same_bytes(farm: Farm) -> None:
    root, build = farm.dir / "steps", farm.dir / "steps" / "build"
    root.mkdir()
    for number in range(20):
        (root / f"f{number}.c").write_text(f"int f{number}(void) {{ return {number}; }}\n")
    (root / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(t C)\nfile(GLOB sources f*.c)\n"
        "add_library(l STATIC ${sources})\n"
    )

    def built(make: str) -> str:
        run(farm, root, "cmake", "-G", "Unix Makefiles", "-S", str(root), "-B", str(build))
        said = run(farm, root, make, "-j1", "-C", str(build))
        return "".join(line for line in said.splitlines(True) if line.startswith(("[", "Scan", "Consol")))

    skip = (b"CMakeOutput.log", b"CMakeConfigureLog.yaml")  # with names of temporary directories
    said = built("make")
    assert said.count("%]") == 22
    plain = tree(build, skip)
    shutil.rmtree(build)
    master = farm.master(root, "-fallback=fail", "-debug")
    try:
        assert built("termite-make") == said
        assert tree(build, skip) == plain
        answered = [line for line in master.log().splitlines() if "answered here" in line and "echo_color" in line]
        assert 10 < len(answered) <= 22
        assert built("termite-make") == built("make")  # nothing to do
    finally:
        master.stop()
        farm.programs.remove(master)


@pytest.mark.timeout(BUILD_LIMIT_S)
def test_a_cmake_and_ninja_project_builds_to_the_same_bytes(farm: Farm) -> None:
    root = farm.dir / "cxx"
    root.mkdir()
    (root / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(t CXX)\nadd_library(l STATIC l.cc m.cc)\n"
        "add_custom_command(OUTPUT gen.h COMMAND sh -c \"echo '#define G 7' > gen.h\" VERBATIM)\n"
        "add_executable(p main.cc gen.h)\ntarget_include_directories(p PRIVATE ${CMAKE_CURRENT_BINARY_DIR})\n"
        "target_link_libraries(p l)\n"
    )
    (root / "l.cc").write_text(
        "#include <string>\n#include <map>\nstd::map<std::string, int> m; int f(int x) { return x + (int)m.size(); }\n"
    )
    (root / "m.cc").write_text("#include <vector>\nint g() { std::vector<int> v(3); return (int)v.size(); }\n")
    (root / "main.cc").write_text(
        '#include <iostream>\n#include "gen.h"\nint f(int); int g(); int main() { std::cout << f(G) + g() << "\\n"; }\n'
    )
    build = root / "build"
    configure = ["cmake", "-G", "Ninja", "-S", str(root), "-B", str(build)]
    run(farm, root, *configure)
    run(farm, root, "ninja", "-C", str(build))
    skip = (b".ninja_log", b".ninja_deps", b".termite-socket")
    plain = tree(build, skip)
    run(farm, root, "ninja", "-C", str(build), "-t", "clean")
    master = farm.master(root, "-fallback=fail")
    try:
        run(farm, root, "termite-run", "--", "ninja", "-C", str(build))
        assert tree(build, skip) == plain
        assert subprocess.run([build / "p"], capture_output=True, check=True).stdout == b"10\n"
        run(farm, root, "termite-run", "--", "ninja", "-C", str(build), "-t", "clean")
        run(farm, root, "termite-run", "--", "cmake", "--build", str(build))
        assert tree(build, skip) == plain
    finally:
        master.stop()
        farm.programs.remove(master)


MAKEFILES = {
    "bash with pipefail": "SHELL := /bin/bash\n.SHELLFLAGS := -eu -o pipefail -c\nall:\n\t[[ a == a ]] && echo $$BASH_VERSION > out; ! (false | true)\n",
    "oneshell": ".ONESHELL:\nall:\n\tx=1\n\tx=$$((x+1))\n\techo $$x > out\n",
    "recursive": "all:\n\t$(MAKE) -C sub\n\tcat sub/out > out\n",
    "shell function": "N := $(shell echo 5; mkdir -p made)\nall: \n\techo $(N) > made/out; cp made/out out\n",
    "ignored and silent": "all:\n\t-false\n\t@echo quiet > out\n",
    "exported": "export FOO = bar\nall:\n\techo $$FOO > out\n",
    "target variables": "all: V = 7\nall:\n\techo $(V) > out\n",
    "local by plus": "all:\n\t+echo x > out\n",
    "jobserver": 'all: a b c d\n\tcat a b c d > out\na b c d:\n\t+@test -n "$(MAKEFLAGS)" && echo $@ > $@\n',
    "python shell": "SHELL := /usr/bin/python3\n.SHELLFLAGS := -c\n.ONESHELL:\nall:\n\topen('out', 'w').write('x\\n')\n",
}


@pytest.mark.parametrize("name", MAKEFILES)
def test_a_makefile_keeps_its_meaning(farm: Farm, name: str) -> None:
    outs = []
    for kind in ("make", "termite-make"):
        root = farm.dir / "makefile"
        (root / "sub").mkdir(parents=True)
        (root / "Makefile").write_text(MAKEFILES[name])
        (root / "sub" / "Makefile").write_text("all:\n\techo $(MAKELEVEL) > out\n")
        if kind == "make":
            run(farm, root, "make", "-j2", "--no-print-directory")
        else:
            master = farm.master(root, "-fallback=fail")
            try:
                run(farm, root, "termite-make", "-j2", "--no-print-directory")
            finally:
                master.stop()
                farm.programs.remove(master)
        outs.append(tree(root))
        shutil.rmtree(root)
    assert outs[0] == outs[1]


def test_a_failing_command_fails_the_make(farm: Farm) -> None:
    root = farm.dir / "failing"
    root.mkdir()
    (root / "Makefile").write_text("all: a\n\techo never > never\na:\n\techo half > a; exit 3\n.DELETE_ON_ERROR:\n")
    master = farm.master(root)
    try:
        result = farm.make(root, "-j4")
        assert result.returncode == 2
        assert b"Error 3" in result.stderr
        assert not (root / "a").exists() and not (root / "never").exists()
    finally:
        master.stop()
        farm.programs.remove(master)
