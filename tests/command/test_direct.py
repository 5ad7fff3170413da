"""What a shell does around a compiler, checked against the shells of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from termite.command.direct import Direct, without_shell

SHELLS = [path for name in ("dash", "bash") if (path := shutil.which(name))]
CWD = b"/src/project"
ENV = [b"PATH=/usr/bin:/bin", b"PWD=" + CWD, b"CFLAGS=-O2"]
SED = r"sed 's|[^/]*$|.deps/&|;s|\.o$||'"
AUTOMAKE = (
    f"depbase=`echo lib/a.o | {SED}`;\\\n"
    "gcc -DA='\"x\"' -MT lib/a.o -MD -MP -MF $depbase.Tpo -c -o lib/a.o lib/a.c &&\\\n"
    "mv -f $depbase.Tpo $depbase.Po"
)


def direct(script: str, *flags: str, shell: bytes = b"/bin/sh", env: list[bytes] = ENV) -> Direct | None:
    argv = [shell, *[flag.encode() for flag in flags or ("-c",)], script.encode()]
    return without_shell(shell, argv, CWD, env)


# -- what is understood --------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", [b"/bin/sh", b"/bin/bash", b"/usr/bin/dash"])
@pytest.mark.parametrize("flags", ["-c", "-ec"])
def test_automakes_recipe_is_a_compiler_and_a_rename(shell: bytes, flags: str) -> None:
    assert direct(AUTOMAKE, flags, shell=shell) == Direct(
        says=b"",
        script=AUTOMAKE.encode(),
        argv=rb'gcc -DA="x" -MT lib/a.o -MD -MP -MF lib/.deps/a.Tpo -c -o lib/a.o lib/a.c'.split(),
        directory=b"",
        moved=b"lib/.deps/a.Tpo",
        moved_to=b"lib/.deps/a.Po",
        shell_pwd=CWD,
    )


@pytest.mark.parametrize("rest", [AUTOMAKE, "\\\n  gcc -c a.c && mv -f a b", "cd /src && cc -c a.c"])
def test_what_a_silent_recipe_says_is_said(rest: str) -> None:
    found = direct(f'echo "  CC      " lib/a.o;{rest}')
    alone = direct(rest)
    assert found is not None and alone is not None
    assert found == alone._replace(says=b"  CC       lib/a.o\n", script=rest.encode())


@pytest.mark.parametrize("prefix", ["./", "../source/", "/src/source/"])
@pytest.mark.parametrize("exists", [False, True])
def test_automakes_recipe_for_a_file_that_may_be_elsewhere_is_a_compiler(
    tmp_path: Path, prefix: str, exists: bool
) -> None:
    if exists:
        (tmp_path / "src").mkdir()
        (tmp_path / "src/a.c").touch()
    script = f"gcc -DA=\\\"x\\\" -c -o src/x-a.o `test -f 'src/a.c' || echo '{prefix}'`src/a.c"
    cwd = os.fsencode(tmp_path)
    found = without_shell(b"/bin/sh", [b"/bin/sh", b"-c", script.encode()], cwd, ENV)
    assert found is not None and (found.directory, found.moved, found.shell_pwd) == (b"", b"", cwd)
    assert found.argv[-1] == ("src/a.c" if exists else f"{prefix}src/a.c").encode()
    for shell in SHELLS:
        shown = script.replace("gcc", "printf '%s\\0' gcc", 1)
        printed = subprocess.run([shell, "-c", shown], cwd=tmp_path, capture_output=True, timeout=20, check=True)
        assert printed.stdout.split(b"\0")[:-1] == found.argv


def test_cmakes_recipe_is_a_compiler_elsewhere() -> None:
    script = "cd /src/project/build/lib && /usr/bin/c++ -I/src/project -o a.o -c /src/project/a.cc"
    assert direct(script) == Direct(
        says=b"",
        script=script.encode(),
        argv=rb"/usr/bin/c++ -I/src/project -o a.o -c /src/project/a.cc".split(),
        directory=b"/src/project/build/lib",
        moved=b"",
        moved_to=b"",
        shell_pwd=CWD,
    )


def test_what_cd_does_to_the_environment_is_done() -> None:
    found = direct("cd /src/project/build && cc -c a.c")
    assert found is not None
    assert found.environment([*ENV, b"OLDPWD=/x"]) == [
        b"PATH=/usr/bin:/bin", b"CFLAGS=-O2", b"PWD=/src/project/build", b"OLDPWD=/src/project"
    ]  # fmt: skip
    plain = direct("cc -c a.c && mv -f a b")
    assert plain is not None and plain.environment(ENV) is ENV


@pytest.mark.parametrize(
    "compiler",
    ["gcc", "g++", "cc", "c++", "clang", "clang++-14", "x86_64-linux-gnu-gcc-12", "/opt/x/bin/cc", "ccache gcc"],
)
def test_compilers_are_known_by_their_names(compiler: str) -> None:
    found = direct(f"{compiler} -c a.c && mv -f a.t a.d")
    assert found is not None and found.argv == [*compiler.encode().split(), b"-c", b"a.c"]


@pytest.mark.parametrize("libtool", ["./libtool", "../libtool", "libtool", "/src/libtool"])
def test_libtool_is_run_by_its_own_shell_alone(libtool: str) -> None:
    sed = SED.replace(r"\.o", r"\.lo")
    found = direct(f"v=`echo a.lo | {sed}`; /bin/bash {libtool} --mode=compile gcc -MF $v.t -c a.c && mv -f $v.t $v.d")
    assert found is not None and found.argv[:3] == [b"/bin/bash", libtool.encode(), b"--mode=compile"]
    assert found.moved_to == b".deps/a.d"


def test_the_variable_is_replaced_where_a_shell_replaces_it() -> None:
    script = f"v=`echo a/b.o | {SED}`; gcc $v ${{v}}x \"$v y\" '$v' \\$v \"\\$v\" -D\\'$v\\' && mv -f $v.t ${{v}}.d"
    found = direct(script)
    assert found is not None
    assert found.argv == [
        b"gcc", b"a/.deps/b", b"a/.deps/bx", b"a/.deps/b y", b"$v", b"$v", b"$v", b"-D'a/.deps/b'"
    ]  # fmt: skip
    assert (found.moved, found.moved_to) == (b"a/.deps/b.t", b"a/.deps/b.d")


# -- what is left to the shell -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        "gcc -c a.c",
        "mv -f a b",
        "cd /src",
        "cd /src && mv -f a b",
        "gcc -c a.c && mv a b",
        "gcc -c a.c && mv -f a b c",
        "gcc -c a.c && mv -f -t a b",
        "gcc -c a.c && mv -f a -b",
        "gcc -c a.c && mv -f '' b",
        "gcc -c a.c || mv -f a b",
        "gcc -c a.c; mv -f a b",
        "gcc -c a.c & mv -f a b",
        "gcc -c a.c | mv -f a b",
        "gcc -c a.c && mv -f a b && true",
        "gcc -c a.c && mv -f a b || exit 1",
        "gcc -c a.c && mv -f a b > log",
        "gcc -c a.c > log && mv -f a b",
        "gcc -c $(FILE) && mv -f a b",
        "gcc -c $FILE && mv -f a b",
        "gcc -c *.c && mv -f a b",
        "gcc -c a.c && mv -f a `echo b`",
        "CC=1 gcc -c a.c && mv -f a b",
        "(gcc -c a.c && mv -f a b)",
        "if gcc -c a.c; then mv -f a b; fi",
        "test -f a && mv -f a b",
        "set -e && mv -f a b",
        "exec gcc -c a.c && mv -f a b",
        "cd src && gcc -c a.c",
        "cd /src/../x && gcc -c a.c",
        "cd /src /x && gcc -c a.c",
        "cd -P /src && gcc -c a.c",
        "cd /src || gcc -c a.c",
        "cd /src && cd /x && gcc -c a.c",
        "cd /src && make",
        "cd /src && /bin/sh ./configure",
        "cd /src && /bin/sh -c libtool",
        "cd /src && sh ./libtool",
        "cd /src && /opt/bin/sh ./libtool",
        "cd /src && ./libtool",
        f"v=`echo a.c | {SED}`; gcc -c $v && mv -f a b",
        f"IFS=`echo a.o | {SED}`; gcc -c $IFS && mv -f a b",
        f"PATH=`echo a.o | {SED}`; gcc -c a.c && mv -f a b",
        f"v=`echo .o | {SED}`; gcc -c $v && mv -f a b",
        f"v=`echo -n.o | {SED}`; gcc -c $v && mv -f a b",
        f"v=`echo a.o b.o | {SED}`; gcc -c $v && mv -f a b",
        f"v=`echo a.o | {SED}`; gcc -c $w && mv -f a b",
        f"v=`echo a.o | {SED}`; gcc -c $vw && mv -f a b",
        f"v=`echo a.o | {SED}`; gcc -c ${{v%.o}} && mv -f a b",
        f"v=`echo a.o | {SED}` gcc -c $v && mv -f a b",
        "v=`echo a.o | sed 's|o|x|'`; gcc -c $v && mv -f a b",
        "gcc -c '`test -f 'a.c' || echo './'`a.c'",
        "gcc -c \"`test -f 'a.c' || echo './'`a.c\"",
        "gcc -c `test -f 'a.c' || echo '-x'`a.c",
        "gcc -c `test -f 'a.c' || echo './' 'x'`a.c",
        "gcc -c `test -d 'a.c' || echo './'`a.c",
        "gcc -c `test -f 'a.c' || echo './'`a.c; true",
        "cd /src && gcc -c `test -f 'a.c' || echo './'`a.c",
        "echo 'a;b'; gcc -c a.c",
        "echo a && gcc -c a.c && mv -f a b",
        "echo a > x; gcc -c a.c && mv -f a b",
        "echo $x; gcc -c a.c && mv -f a b",
        "echo -e a; gcc -c a.c && mv -f a b",
        "echo a\\\\b; gcc -c a.c && mv -f a b",
        "echo a; echo b; gcc -c a.c && mv -f a b",
        "v=`date`; gcc -c $v && mv -f a b",
    ],
)
def test_anything_else_needs_a_shell(script: str) -> None:
    assert direct(script) is None


@pytest.mark.parametrize("flags", [["-x", "-c"], ["-vc"], ["-o", "noexec", "-c"], ["-O", "extglob", "-c"], ["-lc"]])
def test_a_shell_that_was_told_more_is_started(flags: list[str]) -> None:
    assert direct(AUTOMAKE, *flags) is None


@pytest.mark.parametrize("program", [b"", b"/bin/sh", b"/usr/bin/gcc"])
def test_a_command_without_words_is_left_alone(program: bytes) -> None:
    assert without_shell(program, [], CWD, ENV) is None


@pytest.mark.parametrize("shell", [b"/opt/bin/sh", b"/bin/zsh", b"./sh", b"/usr/bin/env"])
def test_another_shell_is_started(shell: bytes) -> None:
    assert direct(AUTOMAKE, shell=shell) is None


@pytest.mark.parametrize(
    "setting",
    [b"IFS=/", b"BASH_ENV=/x", b"POSIXLY_CORRECT=1", b"SHELLOPTS=xtrace", b"BASH_FUNC_gcc%%=() { :; }", b"depbase=x"],
)
def test_an_environment_that_changes_the_meaning_needs_a_shell(setting: bytes) -> None:
    assert direct(AUTOMAKE, env=[*ENV, setting]) is None


@pytest.mark.parametrize("program", ["mv", "sed"])
def test_a_program_of_ones_own_that_hides_the_standard_one_is_run(tmp_path: Path, program: str) -> None:
    env = [b"PATH=" + os.fsencode(tmp_path) + b":/usr/bin:/bin", b"PWD=" + CWD]
    assert direct(AUTOMAKE, env=env) is not None
    (tmp_path / program).write_text("#!/bin/sh\n")
    (tmp_path / program).chmod(0o755)
    assert direct(AUTOMAKE, env=env) is None
    needs_sed = program == "sed"
    assert (direct("gcc -c a.c && mv -f a b", env=env) is not None) == needs_sed


def test_a_path_without_a_standard_directory_needs_a_shell() -> None:
    assert direct(AUTOMAKE, env=[b"PATH=/opt/bin", ENV[1]]) is None
    assert direct(AUTOMAKE, env=[b"PATH=bin:/usr/bin", ENV[1]]) is None


# -- the same as the shells of this machine ------------------------------------------------------------

names = st.text("ab._+-/", min_size=1, max_size=8)
words = st.one_of(
    names.map(lambda name: f"-I{name}"),
    st.sampled_from(["$v", "${v}", '"$v"', "'$v'", r"\$v", "x${v}y", "'a b'", '"a\\"b"', "-DX='\"$v\"'", '"\\\\$v"']),
)


@pytest.mark.skipif(not SHELLS, reason="neither dash nor bash is here")
@given(names, st.lists(words, max_size=6), st.sampled_from([".deps", "_d", "x"]), st.sampled_from([".o", ".lo"]))
@settings(max_examples=60, deadline=None)
def test_every_argument_is_what_a_shell_makes_of_it(
    tmp_path_factory: pytest.TempPathFactory, name: str, more: list[str], directory: str, suffix: str
) -> None:
    sed = SED.replace(".deps", directory).replace(r"\.o", "\\" + suffix)
    script = f"v=`echo {name}{suffix} | {sed}`; cc {' '.join(more)} -o $v.t && mv -f $v.t $v.d"
    found = direct(script)
    assume(found is not None)  # hypothesis complains if too few are left
    assert found is not None
    place = tmp_path_factory.mktemp("bin")
    for program in ("cc", "mv"):
        (place / program).write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
        (place / program).chmod(0o755)
    for shell in SHELLS:
        env = {"PATH": f"{place}:/usr/bin:/bin"}
        done = subprocess.run([shell, "-c", script], capture_output=True, timeout=20, check=True, env=env)
        assert done.stdout.split(b"\0")[:-1] == [*found.argv[1:], b"-f", found.moved, found.moved_to]


@pytest.mark.skipif(not SHELLS, reason="neither dash nor bash is here")
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("pwd", ["{}", "", "/etc", "/nowhere", "etc", "{}/other/..", "{}/link", "{}/."])
def test_the_environment_is_a_shells_but_for_what_is_its_own(
    tmp_path: Path, shell: str, change: bool, pwd: str
) -> None:
    cwd, other = os.fsencode(tmp_path), os.fsencode(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(".")
    (tmp_path / "cc").symlink_to("/usr/bin/env")
    before = [b"PATH=/usr/bin:/bin", b"OLDPWD=/usr", b"SHLVL=1", b"A=b c"]
    before += [b"PWD=" + pwd.format(tmp_path).encode()] if pwd else []
    program = f"{tmp_path}/cc -0"
    script = f"cd {tmp_path}/other && {program}" if change else f"{program} && mv -f x y"
    found = without_shell(b"/bin/sh", [b"/bin/sh", b"-c", script.encode()], cwd, before)
    assert found is not None and found.directory == (other if change else b"")
    done = subprocess.run(
        [shell, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20, check=False,
        env=dict(setting.decode().split("=", 1) for setting in before),
    )  # fmt: skip

    def shared(settings: list[bytes]) -> set[bytes]:
        return {setting for setting in settings if not setting.startswith((b"SHLVL=", b"_="))}

    assert shared(found.environment(before)) == shared(done.stdout.split(b"\0")[:-1])
