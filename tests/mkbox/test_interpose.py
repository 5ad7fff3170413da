"""termite-make, termite-run and the interposer with stock make and ninja; the master runs the commands itself."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mkbox.native import LOCAL, REFRESH, RUN, Caller, FakeMaster, Request, execute

Start = Callable[..., FakeMaster]
Run = Callable[..., subprocess.CompletedProcess[bytes]]

needs_ninja = pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja (bin/setup -tests)")


@pytest.fixture
def run(native: Path, project: Path) -> Run:
    """run(program, arguments...) in the project; the first makefile or build.ninja is written by the test."""

    def start(program: str, *args: str | bytes, **how: Any) -> subprocess.CompletedProcess[bytes]:
        how = dict[str, Any](cwd=project, capture_output=True, check=False, timeout=60) | how
        how["env"] = dict(os.environ) | how.pop("env", {})
        return subprocess.run([native / program, *args], stdin=subprocess.DEVNULL, **how)

    return start


def makefile(directory: Path, text: str) -> None:
    (directory / "Makefile").write_text(text.replace("    ", "\t"))


# -- make --------------------------------------------------------------------------------------------


def test_every_recipe_line_becomes_a_request(run: Run, master: Start, project: Path) -> None:
    makefile(project, "all: a\n    cat a\n    @echo two | tr a-z A-Z\na:\n    echo one >a\n")
    one = master(execute)
    result = run("termite-make")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == b"echo one >a\ncat a\none\nTWO\n"
    assert one.commands == [
        [b"/bin/sh", b"-c", b"echo one >a"],
        [b"cat", b"a"],
        [b"/bin/sh", b"-c", b"echo two | tr a-z A-Z"],
    ]
    assert [r.kind for r in one.requests] == [REFRESH, RUN, RUN, RUN]
    assert one.requests[2].program == b"/usr/bin/cat"


def test_the_makefiles_own_shell_and_flags_are_kept(run: Run, master: Start, project: Path) -> None:
    makefile(
        project,
        "SHELL := /bin/bash\n.SHELLFLAGS := -eu -o pipefail -c\n"
        "all:\n    @[[ $$0 == /bin/bash ]] && echo bash\n    false | true\n",
    )
    one = master(execute)
    result = run("termite-make")
    assert result.stdout == b"bash\nfalse | true\n"
    assert result.returncode == 2
    assert one.commands[1] == [b"/bin/bash", b"-eu", b"-o", b"pipefail", b"-c", b"false | true"]
    assert one.requests[1].program == b"/bin/bash"


def test_oneshell_stays_one_command(run: Run, master: Start, project: Path) -> None:
    makefile(project, ".ONESHELL:\nall:\n    @x=1\n    echo $$x\n    exit 5\n")
    one = master(execute)
    result = run("termite-make")
    assert result.stdout == b"1\n"
    assert b"Error 5" in result.stderr
    assert len(one.commands) == 1


def test_the_shell_function_runs_here_and_is_announced(run: Run, master: Start, project: Path) -> None:
    makefile(
        project,
        "X := $(shell echo [$$DISTRIBUTED])\nY != echo '<'$$DISTRIBUTED'>'\n"
        "all:\n    @echo '$(X) $(Y) $(shell echo late) '$$DISTRIBUTED\n",
    )
    one = master(execute)
    for options in ([], ["-j2", "-O"], ["--output-sync=recurse"]):
        del one.requests[:]
        assert run("termite-make", *options).stdout == b"[] <> late yes\n"
        assert [r.kind for r in one.requests] == [REFRESH, LOCAL, LOCAL, LOCAL, RUN]


def test_recursive_makes_run_here_and_their_recipes_do_not(run: Run, master: Start, project: Path) -> None:
    (project / "sub").mkdir()
    makefile(
        project,
        "all:\n    @echo $(MAKE) $$DISTRIBUTED\n    cd sub && $(MAKE) --no-print-directory\n    $(MAKE) -s -C sub\n",
    )
    makefile(project / "sub", "all:\n    @echo level $(MAKELEVEL) $$DISTRIBUTED\n")
    one = master(execute)
    result = run("termite-make", "-s", "--no-print-directory")
    assert result.stderr == b""
    assert result.stdout.count(b"level 1 yes\n") == 2
    assert len(one.of_kind(REFRESH)) == 1, "only the topmost make looks at the files again"
    assert len([c for c in one.commands if b"level" in b" ".join(c)]) == 2


def test_the_jobserver_is_shared_with_recursive_makes(run: Run, master: Start, project: Path) -> None:
    (project / "sub").mkdir()
    makefile(project, "all: x y\nx y:\n    +$(MAKE) --no-print-directory -C sub $@\n")
    makefile(project / "sub", "x y:\n    @echo '$(filter --jobserver-auth=% -j%,$(MAKEFLAGS))'\n")
    master(execute)
    result = run("termite-make", "-j3", "-s")
    assert (result.returncode, result.stderr) == (0, b""), "no 'jobserver unavailable'"
    lines = result.stdout.split()
    assert b"-j3" in lines
    assert any(line.startswith(b"--jobserver-auth=") for line in lines)


def test_parallel_recipes_are_in_the_masters_hands_at_once(run: Run, master: Start, project: Path) -> None:
    makefile(project, ".PHONY: a b c\nall: a b c\na b c:\n    ./$@ now\n")
    for name in "abc":
        (project / name).write_text("")
        (project / name).chmod(0o755)
    together = threading.Barrier(3)

    def answer(request: Request, caller: Caller) -> None:
        if request.kind == RUN:
            together.wait(60)
        caller.exit(0)

    master(answer)
    assert run("termite-make", "-j3").returncode == 0


def test_remade_makefiles_start_make_over(run: Run, master: Start, project: Path) -> None:
    makefile(project, "all:\n    @echo $(X)\ninclude gen.mk\ngen.mk:\n    echo 'X = generated' >$@\n")
    one = master(execute)
    result = run("termite-make", "-s")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"generated\n", b"")
    assert len(one.commands) == 2


def test_make_itself_reports_a_missing_program(run: Run, master: Start, project: Path) -> None:
    makefile(project, "all:\n    no-such-program x\nslash:\n    ./no-such-program x\n")
    one = master(execute)
    for goal, name in (("all", "no-such-program"), ("slash", "./no-such-program")):
        result = run("termite-make", goal)
        plain = subprocess.run(["make", goal], cwd=project, capture_output=True, check=False, timeout=60)
        assert result.returncode == plain.returncode == 2
        assert result.stderr == plain.stderr.replace(b"make: ", b"termite-make: ")
        assert f"termite-make: {name}: No such file".encode() in result.stderr
    assert one.commands == []


def test_status_signals_and_ignored_errors_are_makes_own(run: Run, master: Start, project: Path) -> None:
    makefile(project, "all: ignored\n    kill -TERM $$$$; true\nignored:\n    -exit 3 ;\n")
    master(execute)
    result = run("termite-make")
    assert b"[Makefile:4: ignored] Error 3 (ignored)" in result.stderr
    assert b"[Makefile:2: all] Terminated" in result.stderr


def test_target_and_prerequisites_can_travel_in_the_environment(run: Run, master: Start, project: Path) -> None:
    makefile(project, "all: a b\n    true x\na b:;\n")
    one = master(execute)
    run("termite-make", "MAKE_TARGET=$@", "MAKE_DEPS=$^")
    (request,) = one.of_kind(RUN)
    assert (request.env[b"MAKE_TARGET"], request.env[b"MAKE_DEPS"]) == (b"all", b"a b")


def test_a_very_long_command_arrives_whole(run: Run, master: Start, project: Path) -> None:
    words = [f"word{n}" for n in range(40_000)]
    (project / "Makefile").write_text("all:\n\t@true " + " ".join(words) + "\n")
    one = master(execute)
    assert run("termite-make").returncode == 0
    assert one.commands == [[b"true", *(word.encode() for word in words)]]


def test_make_keeps_its_own_options(run: Run, master: Start, project: Path) -> None:
    master(execute)
    assert run("termite-make", "--version").stdout.startswith(b"GNU Make")
    assert b"TERMITE_MAKE" in run("termite-make", "--termite-help").stdout


def test_a_make_that_forks_and_execs_is_caught_too(run: Run, master: Start, project: Path, tmp_path: Path) -> None:
    """What make did up to 4.2: vfork, then an exec function in the child."""
    source = tmp_path / "forks.c"
    source.write_text(
        """#include <stdio.h>
        #include <stdlib.h>
        #include <sys/wait.h>
        #include <unistd.h>
        static int status(void) { int s; wait(&s); return WEXITSTATUS(s); }
        int main(void) {
            char *argv[] = {"sh", "-c", "exit 6", NULL}, *env[] = {"A=1", NULL};
            if (!vfork()) { execvp(argv[0], argv); _exit(99); }
            int a = status();
            if (!vfork()) { execle("/bin/sh", "sh", "-c", "test $A = 1 && exit 7", (char *)NULL, env); _exit(99); }
            int b = status();
            if (!fork()) { execlp("no-such-program", "x", (char *)NULL); _exit(98); }
            int c = status(), p[2];
            if (pipe(p)) return 1;
            if (!vfork()) { dup2(p[1], 1); execl("/bin/echo", "echo", "$(shell)", (char *)NULL); _exit(99); }
            int d = status();
            printf("%d %d %d %d\\n", a, b, c, d);
            fflush(stdout);
            return execl("/bin/echo", "echo", "in place", (char *)NULL);
        }"""
    )
    (tmp_path / "bin").mkdir()
    subprocess.run(["gcc", "-w", "-o", tmp_path / "bin" / "gmake", source], check=True, timeout=60)
    one = master(execute)
    result = run("termite-run", "--", os.fspath(tmp_path / "bin" / "gmake"))
    assert result.stdout == b"6 7 98 0\nin place\n"
    assert [(r.kind, r.program, r.argv[0]) for r in one.requests[1:]] == [
        (RUN, b"/usr/bin/sh", b"sh"),
        (RUN, b"/bin/sh", b"sh"),
        (LOCAL, b"/bin/echo", b"echo"),
    ]


def test_other_programs_are_left_alone(run: Run, master: Start, project: Path) -> None:
    one = master(execute)
    script = "import subprocess; subprocess.run(['true']); subprocess.run(['false'], close_fds=False)"
    assert run("termite-run", "--", "/usr/bin/env", "python3", "-c", script).returncode == 0
    assert one.commands == []


def test_termite_tools_adds_a_program(run: Run, master: Start, project: Path, tmp_path: Path) -> None:
    tool = tmp_path / "kati"
    tool.symlink_to(shutil.which("bash") or "")
    one = master(execute)
    run("termite-run", os.fspath(tool), "-c", "/bin/true a; :", env={"TERMITE_TOOLS": "bmake kati"})
    assert one.commands == [[b"/bin/true", b"a"]]


# -- termite-run -------------------------------------------------------------------------------------


def test_a_make_below_any_command_becomes_a_termite_make(run: Run, master: Start, project: Path) -> None:
    (project / "sub").mkdir()
    makefile(project, "all:\n    $(MAKE) -s -C sub\n")
    makefile(project / "sub", "all:\n    @echo $(subst -,+,$(MAKE)) $$DISTRIBUTED\n")
    (project / "build.sh").write_text("make -s --no-print-directory && echo built\n")
    one = master(execute)
    result = run("termite-run", "--", "/bin/sh", "build.sh")
    assert (result.stdout, result.stderr) == (b"termite+make yes\nbuilt\n", b"")
    assert len(one.commands) == 2


def test_the_make_that_was_named_is_also_the_recursive_one(run: Run, master: Start, project: Path) -> None:
    makefile(project, "all:\n    @echo $$TERMITE_MAKE; $(MAKE) -v | head -n 1\n")
    master(execute)
    own = project / "own"
    own.mkdir()
    shutil.copy(shutil.which("make") or "", own / "make")
    assert run("termite-run", "own/make").stdout.startswith(f"{own}/make\nGNU Make".encode())


@needs_ninja
def test_ninja_is_caught(run: Run, master: Start, project: Path) -> None:
    (project / "build.ninja").write_text(
        "rule cp\n  command = cp $in $out && echo $$DISTRIBUTED\n  description = CP $out\n"
        "build b: cp a\nbuild c: cp b\n"
    )
    (project / "a").write_text("x")
    one = master(execute)
    result = run("termite-run", "--", "ninja", "-j4")
    assert result.returncode == 0, result
    assert [c[-1] for c in one.commands] == [b"cp a b && echo $DISTRIBUTED", b"cp b c && echo $DISTRIBUTED"]
    assert result.stdout.count(b"yes\n") == 2
    assert run("termite-run", "--", "ninja").stdout == b"ninja: no work to do.\n"


def test_termite_run_explains_itself(run: Run, project: Path) -> None:
    assert b"cmake --build" in run("termite-run", "--help").stdout
    for args in ([], ["--"], ["-x", "true"]):
        result = run("termite-run", *args)
        assert result.returncode == 2
        assert result.stderr.count(b"\n") == 1


def test_the_commands_status_is_passed_on(run: Run, master: Start, project: Path) -> None:
    master(execute)
    assert run("termite-run", "/bin/sh", "-c", "exit 3").returncode == 3
    missing = run("termite-run", "--", "no-such-program")
    assert (missing.returncode, missing.stderr) == (127, b"termite: no-such-program: No such file or directory\n")


# -- odd places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with space", "a:b", "$HOME and $LIB", "ü,'\"", b"\xff\xfe"])
def test_programs_and_project_may_lie_in_an_odd_path(
    native: Path, tmp_path: Path, master: Start, name: str | bytes
) -> None:
    odd = os.fsencode(tmp_path) + b"/" + os.fsencode(name)
    shutil.copytree(native, os.fsdecode(odd + b"/bin"))
    os.makedirs(odd + b"/lib/termite")
    os.rename(odd + b"/bin/libtermite-interpose.so", odd + b"/lib/termite/libtermite-interpose.so")
    project = Path(os.fsdecode(odd + b"/project"))
    (project / "sub").mkdir(parents=True)
    makefile(project, "all:\n    @echo $$DISTRIBUTED; $(MAKE) -s -C sub\n    $(MAKE) -s -C sub\n")
    makefile(project / "sub", "all:\n    @echo sub $$DISTRIBUTED 3>&1\n")
    one = master(execute, project)
    result = subprocess.run(
        [odd + b"/bin/termite-make", b"-s", b"--no-print-directory"],
        cwd=project,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert result.stderr == b""
    assert result.stdout == b"\nsub yes\nsub yes\n"
    assert len(one.commands) == 4
    assert one.requests[0].cwd == os.fsencode(project)


def test_a_users_own_preload_is_kept(run: Run, master: Start, project: Path) -> None:
    makefile(project, "all:\n    @/bin/true x\n")
    one = master(execute)
    own = "/lib/x86_64-linux-gnu/libm.so.6"
    if not os.path.exists(own):
        pytest.skip("another architecture")
    run("termite-make", env={"LD_PRELOAD": own})
    assert one.of_kind(RUN)[0].env[b"LD_PRELOAD"].endswith(b"/libtermite-interpose.so:" + own.encode())


# -- which make, which master ------------------------------------------------------------------------


def test_termite_make_never_starts_itself(run: Run, master: Start, native: Path, project: Path, tmp_path: Path) -> None:
    makefile(project, "all:\n    @echo done x\n")
    master(execute)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "make").symlink_to(native / "termite-make")
    result = run("termite-make", env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    assert result.stdout == b"done x\n"
    assert run("termite-make", env={"TERMITE_MAKE": f"{native}/termite-make"}).returncode == 2
    assert run("termite-make", env={"PATH": "/nowhere"}).returncode == 127


def test_termite_local_is_a_plain_make(run: Run, master: Start, project: Path) -> None:
    makefile(project, "all:\n    @echo $(MAKE) $$LD_PRELOAD\n")
    one = master(execute)
    assert run("termite-make", env={"TERMITE_LOCAL": "1"}).stdout == b"termite-make\n"
    assert one.requests == []


def session_in(directory: Path) -> Path:
    """A termite-session that only tells how it was called."""
    session = directory / "termite-session"
    session.write_text('#!/bin/sh\necho session "$@"\nexit 4\n')
    session.chmod(0o755)
    return directory


def test_without_a_master_a_session_is_started(native: Path, project: Path, tmp_path: Path) -> None:
    place = session_in(Path(shutil.copytree(native, tmp_path / "bin")))

    def start(*args: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([place / args[0], *args[1:]], cwd=project, capture_output=True, check=False, timeout=60)

    results = [start("termite-make", "-j4", "all"), start("termite-run", "--", "ninja", "-v")]
    assert [(r.returncode, r.stdout) for r in results] == [
        (4, b"session make -j4 all\n"),
        (4, b"session run -- ninja -v\n"),
    ]
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(project / ".termite-socket"))
    stale = start("termite-make")
    assert stale.stdout == b"session make\n"
    assert stale.stderr == f"termite: {project}/.termite-socket is left over from a master that has ended\n".encode()


def test_a_master_that_was_named_must_be_there(run: Run, project: Path) -> None:
    result = run("termite-make", env={"TERMITE_SOCKET": os.fspath(project / "none")})
    assert result.returncode == 1
    assert b"nobody listens there" in result.stderr


def test_a_master_that_refuses_the_refresh_ends_it(run: Run, master: Start, project: Path) -> None:
    def answer(_: Request, caller: Caller) -> None:
        caller.frame(b"M", b".termite-localrc: line 3: bad regular expression")
        caller.exit(2 << 8)

    master(answer)
    result = run("termite-make")
    assert (result.returncode, result.stderr) == (2, b"termite: .termite-localrc: line 3: bad regular expression\n")


# -- the end of a build ------------------------------------------------------------------------------


def test_the_topmost_make_prints_what_the_build_came_to(run: Run, master: Start, project: Path) -> None:
    makefile(project, "all:\n    $(MAKE) sub\nsub:\n    echo hi >f; exit 3\n")
    one = master(execute)
    one.summary = b"2 commands: 1 on 1 worker"
    result = run("termite-make")
    assert result.returncode == 2
    assert result.stderr.endswith(b"termite: 2 commands: 1 on 1 worker\n")
    assert result.stderr.count(b"2 commands") == 1
    tokens = {r.env[b"TERMITE_BUILD"] for r in one.requests + one.summaries}
    assert len(one.summaries) == 1 and len(tokens) == 1, "all of it is one build"


def test_a_summary_that_nobody_reads_does_not_change_how_make_ends(run: Run, master: Start, project: Path) -> None:
    makefile(project, "all:\n    echo hi >f\n")
    one = master(execute)
    one.summary = b"1 command"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = run("termite-make", capture_output=False, stdout=subprocess.DEVNULL, stderr=writer)
    finally:
        os.close(writer)
    assert result.returncode == 0 and len(one.summaries) == 1


def test_a_master_that_went_away_costs_the_summary_and_nothing_else(run: Run, master: Start, project: Path) -> None:
    makefile(project, "all:\n    rm .termite-socket\n")
    master(execute)
    result = run("termite-make")
    assert (result.returncode, result.stderr) == (0, b"")
