"""The patches for GNU make: applied to Debian's source, built, and used with a script and with the real wrapper.

4.3 is what Debian 12 has, 4.4.1 is Debian 13's.  Where that archive cannot be reached, only the text of the patch for
4.4.1 is looked at.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.farm import Farm

CHECKOUT = Path(__file__).resolve().parents[2]
PATCHES = CHECKOUT / "patches"
VERSIONS = ["4.3", "4.4.1"]
ENV = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "TERMITE_", "LD_PRELOAD"))}
BUILD_LIMIT_S = 600

LOGGER = """#!/bin/sh
{ printf '%s|' "$MAKE_TARGET" "$MAKE_DEPS" "$TERMITE_SHELL" "$@"; echo; } >> "$LOG"
exec "$TERMITE_SHELL" "$@"
"""


def patch_of(version: str) -> Path:
    return PATCHES / f"make-{version}-makeshell.patch"


def unpack(version: str, directory: Path) -> None:
    suite = ["-suite", "trixie"] if version == "4.4.1" else []
    fetch = [str(CHECKOUT / "bin/debian-source"), *suite, "make-dfsg", version, str(directory)]
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=BUILD_LIMIT_S, check=False)
    if done.returncode and suite:
        pytest.skip(f"the source of make {version} cannot be had: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=VERSIONS)
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The patched make, built once; no line of the patch may need fuzz or an offset."""
    directory = tmp_path_factory.mktemp("make") / "source"
    unpack(request.param, directory)
    with open(patch_of(request.param)) as text:
        applied = subprocess.run(
            ["patch", "-p1", "--fuzz=0"], cwd=directory, stdin=text, capture_output=True, text=True, check=False
        )
    assert applied.returncode == 0, applied.stdout + applied.stderr
    assert "offset" not in applied.stdout
    with open(directory / "build.log", "wb") as log:
        for command in ("autoreconf -fi", "./configure --disable-nls", "make -j1 CFLAGS='-O1 -g -Wall'"):
            subprocess.run(
                ["nice", "sh", "-c", command], cwd=directory, env=ENV, stdout=log, stderr=log, check=True,
                timeout=BUILD_LIMIT_S,
            )  # fmt: skip
    warnings = re.findall(r"src/(?:job|commands)\.c.*warning.*", (directory / "build.log").read_text())
    assert not warnings
    return directory / "make"


class Project:
    """A directory with a makefile and a MAKE_SHELL that notes what it is given."""

    def __init__(self, make: Path, root: Path) -> None:
        self.make, self.root = make, root
        self.logger = root / "logger"
        self.logger.write_text(LOGGER)
        self.logger.chmod(0o755)

    def run(self, makefile: str, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        (self.root / "Makefile").write_text(makefile)
        log = self.root / "log"
        log.unlink(missing_ok=True)
        return subprocess.run(
            [self.make, "--no-print-directory", *args], cwd=self.root, env={**ENV, "LOG": str(log), **(env or {})},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def logged(self, makefile: str, *args: str) -> list[list[str]]:
        """[target, prerequisites, shell, arguments of MAKE_SHELL ...] of each command."""
        result = self.run(makefile, f"MAKE_SHELL={self.logger}", *args)
        assert result.returncode == 0, result.stderr
        log = self.root / "log"
        return [line.split("|")[:-1] for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def project(make: Path, tmp_path: Path) -> Project:
    return Project(make, tmp_path)


def test_a_simple_command_and_an_empty_one_go_through_make_shell(project: Project) -> None:
    assert project.logged("all: ; true simple\n") == [["all", "", "/bin/sh", "-c", "true simple"]]
    assert project.logged("all: ; @:\n") == [["all", "", "/bin/sh", "-c", ":"]]
    assert project.logged("all: ;\n") == []


def test_without_make_shell_nothing_goes_through_it(project: Project) -> None:
    for args in ([], ["MAKE_SHELL="], ["MAKE_SHELL= "]):
        result = project.run("all: ; @echo $$TERMITE_SHELL $$MAKE_TARGET\n", *args)
        assert (result.stdout, result.returncode) == ("all\n", 0)
    assert not (project.root / "log").exists()


def test_make_shell_may_come_from_the_environment_the_makefile_or_the_target(project: Project) -> None:
    result = project.run("all: ; @true\n", env={"MAKE_SHELL": str(project.logger)})
    assert result.returncode == 0 and (project.root / "log").read_text() == "all||/bin/sh|-c|true|\n"
    result = project.run(f"MAKE_SHELL = {project.logger}\nall: ; @true\n")
    assert result.returncode == 0 and (project.root / "log").read_text() == "all||/bin/sh|-c|true|\n"
    result = project.run(f"all: a b\na: MAKE_SHELL = {project.logger}\na b: ; @true\n")
    assert result.returncode == 0 and (project.root / "log").read_text() == "a||/bin/sh|-c|true|\n"


def test_make_shell_may_be_several_words(project: Project) -> None:
    result = project.run("all: ; @true\n", f"MAKE_SHELL= /usr/bin/env  X=1 {project.logger} ")
    assert result.returncode == 0, result.stderr
    assert (project.root / "log").read_text() == "all||/bin/sh|-c|true|\n"


def test_the_makefiles_shell_and_its_flags_reach_the_command(project: Project) -> None:
    makefile = (
        "SHELL := /bin/bash\n.SHELLFLAGS := -eu -o pipefail -c\n"
        "all:\n\t@[[ a == a ]] && echo $(SHELL) $${BASH_VERSION:+bash} > out\n\t-@false | true\n"
    )
    flags = ["/bin/bash", "-eu", "-o", "pipefail", "-c"]
    assert [line[2:7] for line in project.logged(makefile)] == [flags, flags]
    assert (project.root / "out").read_text() == "/bin/bash bash\n"
    result = project.run(makefile, f"MAKE_SHELL={project.logger}")
    assert "Error 1 (ignored)" in result.stderr  # pipefail


def test_a_shell_of_several_words_keeps_them(project: Project) -> None:
    found = project.logged("SHELL = /usr/bin/env bash\nall: ; @echo $${BASH_VERSION:+bash} > out\n")
    assert found == [["all", "", "/usr/bin/env", "bash", "-c", "echo ${BASH_VERSION:+bash} > out"]]
    assert (project.root / "out").read_text() == "bash\n"


def test_shell_keeps_its_value_and_the_shell_function_is_left_alone(project: Project) -> None:
    makefile = "N := $(shell echo $$0)\nM != echo m\nall: ; @echo $(SHELL) $(N) $(M) $$SHELL > out\n"
    assert len(project.logged(makefile)) == 1
    assert (project.root / "out").read_text().split()[:3] == ["/bin/sh", "/bin/sh", "m"]
    result = project.run("all: ; @echo '$(shell echo inner)'\n", f"MAKE_SHELL={project.logger}")
    assert result.stdout == "inner\n"
    assert (project.root / "log").read_text().count("\n") == 1


def test_every_byte_of_a_command_arrives(project: Project) -> None:
    script = "printf '%s\\n' \"a  b\" 'c \" d' e\\ f \\$$HOME '*' `echo x`\\\n  'g\\\n  h' > out; exit 0 # ' !"
    shell = project.run(f"all: ; @{script}\n")
    assert shell.returncode == 0
    expected = (project.root / "out").read_text()
    result = project.run(f"all: ; @{script}\n", f"MAKE_SHELL={project.logger}")
    assert result.returncode == 0, result.stderr
    assert (project.root / "out").read_text() == expected
    assert (project.root / "log").read_text() == "all||/bin/sh|-c|" + script.replace("$$", "$") + "|\n"


def test_oneshell_is_one_command_without_the_prefixes(project: Project) -> None:
    result = project.run(".ONESHELL:\nall:\n\t@x=1\n\t@echo $$((x+1)) > out\n", f"MAKE_SHELL={project.logger}")
    assert result.returncode == 0, result.stderr
    assert (project.root / "out").read_text() == "2\n"
    assert (project.root / "log").read_text() == "all||/bin/sh|-c|x=1\necho $((x+1)) > out|\n"


def test_target_and_prerequisites_are_in_every_recipes_environment(project: Project) -> None:
    makefile = "all: a b a | c ; @true\na: ; @true\nb: a ; @true\nc: ; @true\nlib(m): a ; @true\n"
    found = {tuple(line[:2]) for line in project.logged(makefile, "all", "lib(m)")}
    assert found == {("all", "a b"), ("a", ""), ("b", "a"), ("c", ""), ("lib", "a")}
    result = project.run("x: y ; @echo $$MAKE_TARGET, $$MAKE_DEPS.\ny: ;\n")  # and without MAKE_SHELL
    assert result.stdout == "x, y.\n"


def test_neither_environment_nor_makefile_nor_an_outer_make_changes_them(project: Project) -> None:
    show = "@echo $$MAKE_TARGET, $$MAKE_DEPS."
    env = {"MAKE_TARGET": "no", "MAKE_DEPS": "no", "TERMITE_SHELL": "/no"}
    assert project.run(f"x: y ; {show}\ny: ;\n", env=env).stdout == "x, y.\n"
    assert project.run(f"x: MAKE_TARGET = no\nexport MAKE_DEPS = no\nx: y ; {show}\ny: ;\n").stdout == "x, y.\n"
    makefile = f"x: z ; @$(MAKE) inner\ninner: y ; {show}\ny z: ;\nunexport MAKE_TARGET TERMITE_SHELL\n"
    assert project.run(makefile, f"MAKE_SHELL={project.logger}", env=env).stdout == "inner, y.\n"


def test_more_prerequisites_than_an_environment_holds_do_no_harm(project: Project) -> None:
    for last, received in ((7, 131061), (8, 0), (100000, 0)):
        names = " ".join([*(f"{n:06d}" for n in range(18722)), "x" * last])
        (project.root / "rules.mk").write_text(f"all: {names}\n{names}: ;\n")
        result = project.run('include rules.mk\nall: ; @printf %s "$$MAKE_DEPS" | wc -c\n', "all")
        assert result.returncode == 0, result.stderr[-500:]
        assert int(result.stdout) == received


def test_status_and_signals_pass_through(project: Project) -> None:
    result = project.run("all: ; exit 7\n", f"MAKE_SHELL={project.logger}")
    assert result.returncode == 2 and "Error 7" in result.stderr
    result = project.run("all: ; kill -9 $$$$\n", f"MAKE_SHELL={project.logger}")
    assert result.returncode == 2 and "Killed" in result.stderr
    result = project.run("all: ; true\n", "MAKE_SHELL=/no/such/program")
    assert result.returncode == 2 and "/no/such/program" in result.stderr


def test_dry_runs_questions_and_touching_run_nothing(project: Project) -> None:
    for flag, status in (("-n", 0), ("-q", 1), ("-t", 0)):
        result = project.run("all: ; touch made\n", flag, f"MAKE_SHELL={project.logger}")
        assert result.returncode == status
        assert not (project.root / "log").exists() and not (project.root / "made").exists()


def test_a_recursive_make_goes_through_it_too_and_shares_the_jobs(project: Project) -> None:
    makefile = "all: ; +@$(MAKE) a b c\na b c: ; @echo $@ > $@.out\n"
    result = project.run(makefile, "-j3", f"MAKE_SHELL={project.logger}")
    assert result.returncode == 0 and "jobserver unavailable" not in result.stderr
    lines = (project.root / "log").read_text().splitlines()
    assert sorted(line.split("|")[0] for line in lines) == ["a", "all", "b", "c"]


@pytest.fixture
def farm() -> Iterator[Farm]:
    if not os.path.exists("/dev/fuse") or os.getuid():
        pytest.skip("a worker needs /dev/fuse and root")
    farm = Farm()
    farm.coordinator()
    farm.worker(2)
    yield farm
    farm.close()


def test_a_project_builds_on_a_worker_through_the_real_wrapper(make: Path, farm: Farm) -> None:
    root = farm.dir / "project"
    (root / "sub").mkdir(parents=True)
    shutil.copy(PATCHES / "cmake.termite-localrc", root / ".termite-localrc")
    (root / "Makefile").write_text(
        "SHELL := /bin/bash\n.SHELLFLAGS := -eu -o pipefail -c\nall: prog sub out\nsub: ; $(MAKE) -C sub\n"
        "prog: a.o\n\tgcc -o $@ $^\n%.o: %.c\n\tgcc -c -o $@ $<\n"
        "out: prog a.c\n\t[[ -x prog ]] && ./prog > $@; echo $$MAKE_TARGET: $$MAKE_DEPS: $(SHELL) $${BASH:-} >> $@\n"
        "\tid -u > uid\nfail: ; false | cat\n.PHONY: all sub fail\n"
    )
    (root / "sub/Makefile").write_text('all: ; test -z "$${BASH:-}" && id -u > uid\n')
    (root / "a.c").write_text('#include <stdio.h>\nint main(void) { puts("hello"); return 0; }\n')
    farm.master(root, "-fallback=fail")
    arguments = [str(make), "-j2", "MAKE_SHELL=termite-shell-wrapper"]
    result = farm.command(root, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (root / "out").read_text() == "hello\nout: prog a.c: /bin/bash /bin/bash\n"
    assert (root / "uid").read_text() == (root / "sub/uid").read_text() != "0\n"  # the worker's user
    assert stat.S_IMODE((root / "prog").stat().st_mode) & 0o111
    failed = farm.command(root, *arguments, "fail")
    assert failed.returncode == 2 and b"Error 1" in failed.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_a_patch_is_well_formed_and_says_how_it_is_used(version: str) -> None:
    text = patch_of(version).read_text()
    header, _, body = text.partition("--- a/")
    assert version in header and "make MAKE_SHELL=termite-shell-wrapper" in header
    lines = ("--- a/" + body).splitlines()
    at = 0
    while at < len(lines):
        hunk = re.fullmatch(r"@@ -(\d+),(\d+) \+(\d+),(\d+) @@.*", lines[at])
        if not hunk:
            assert re.match(r"(---|\+\+\+) [ab]/src/(job\.c|commands\.h)$", lines[at]), lines[at]
            at += 1
            continue
        end = at + 1
        while end < len(lines) and lines[end][:1] in (" ", "+", "-") and not lines[end].startswith("--- a/"):
            end += 1
        kinds = [line[0] for line in lines[at + 1 : end]]
        assert (len(kinds) - kinds.count("+"), len(kinds) - kinds.count("-")) == (int(hunk[2]), int(hunk[4]))
        at = end


def test_both_patches_add_the_same() -> None:
    def added(version: str) -> list[str]:
        lines = patch_of(version).read_text().partition("--- a/")[2].splitlines()
        return [line for line in lines if line.startswith("+") and "target_environment" not in line]

    assert [line for line in added("4.4.1") if "any_recurse" not in line] == added("4.3")
