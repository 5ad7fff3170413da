"""Progress lines of CMake: answered like the cmake that is there, or not at all."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from termite.master import progress
from termite.master.progress import Line, Look, Manner, ProgressLines, look_of, read_line
from termite.master.shortcuts import Shortcut
from tests.master.shortcutting import sh, snapshot

CMAKE = shutil.which("cmake") or "/usr/bin/cmake"
PLAIN = [b"PATH=/usr/bin:/bin", b"LC_ALL=C"]
COLOURED = [*PLAIN, b"MAKE_TERMOUT=/dev/pts/1"]


def command(root: Path, flags: str, cmake: str = CMAKE) -> str:
    return f"{cmake} -E cmake_echo_color --switch= {flags.replace('DIR', str(root / 'b' / 'CMakeFiles'))}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A build directory in which two of 40 steps are done."""
    return populated(tmp_path / "ours")


def populated(root: Path) -> Path:
    (root / "b" / "CMakeFiles" / "Progress").mkdir(parents=True)
    (root / "b" / "none").mkdir()
    for name, text in {"count.txt": "40\n", "3": "empty", "4": "empty"}.items():
        (root / "b" / "CMakeFiles" / "Progress" / name).write_text(text)
    return root


def find(root: Path, script: str, env: list[bytes], umask: int = 0o022) -> list[Shortcut | None]:
    """At first, while the cmake is asked, and then."""

    async def twice() -> list[Shortcut | None]:
        lines = ProgressLines()
        found = [lines.find(*sh(script), os.fsencode(root / "b"), umask, env)]
        await lines.close()
        return [*found, lines.find(*sh(script), os.fsencode(root / "b"), umask, env)]

    return asyncio.run(twice())


@pytest.mark.parametrize("umask", [0o022, 0o007])
@pytest.mark.parametrize("env", [PLAIN, COLOURED], ids=["plain", "coloured"])
@pytest.mark.parametrize(
    "flags",
    [
        '--green --progress-dir=DIR --progress-num=5 "Building C object CMakeFiles/a.dir/a.c.o"',
        '--green --bold --progress-dir=DIR --progress-num=5,6,12 "Linking C static library liba.a"',
        '--progress-dir=DIR --progress-num=3,4 "Built target a"',
        '--progress-dir=DIR --progress-num= "Built target a"',
        '--progress-dir=DIR/none --progress-num=3 "Built target a"',
        '--cyan "50%  of \\\\n it\'s"',
        "--bold --red x",
        "done",
    ],
)
def test_a_line_is_printed_as_this_cmake_prints_it(flags: str, env: list[bytes], umask: int, root: Path) -> None:
    script = command(root, flags)
    first, then = find(root, script, env, umask)
    assert first is None and then is not None
    result = then.perform(os.fsencode(root))
    assert result is not None
    ours = snapshot(root)
    shutil.rmtree(root)
    before = snapshot(populated(root))
    real = subprocess.run(
        ["/bin/sh", "-c", script],
        cwd=root / "b",
        env=dict(setting.decode().split("=", 1) for setting in env),
        umask=umask,
        capture_output=True,
        timeout=20,
        check=True,
    )
    assert (result.status, result.stdout, result.stderr) == (0, real.stdout, real.stderr)
    assert ours == snapshot(root)
    changed = {path.removeprefix(os.fsencode(root)[1:] + b"/").decode() for path in result.changed_paths}
    assert before.keys() ^ ours.keys() <= changed
    assert (b"\x1b" in real.stdout) == (env is COLOURED and "--" in flags.partition('"')[0].replace("--progress", ""))


@pytest.mark.parametrize(
    "script",
    [
        "{cmake} -E echo done",
        "{cmake} -E cmake_echo_color --switch=1 x",
        "{cmake} -E cmake_echo_color x",
        "{cmake} -E cmake_echo_color --switch= --no-newline x",
        "{cmake} -E cmake_echo_color --switch= --green x y",
        "{cmake} -E cmake_echo_color --switch= --green --bold",
        "{cmake} -E cmake_echo_color --switch= ''",
        "{cmake} -E cmake_echo_color --switch= --progress-dir={root}/b/CMakeFiles x",
        "{cmake} -E cmake_echo_color --switch= --progress-num=1 x",
        "{cmake} -E cmake_echo_color --switch= --progress-dir={root}/b/CMakeFiles --progress-num=../x x",
        "{cmake} -E cmake_echo_color --switch= --progress-dir={root}/b/CMakeFiles --progress-num=1,,2 x",
        "{cmake} -E cmake_echo_color --switch= --progress-dir={root}/b/../b/CMakeFiles --progress-num=1 x",
        "{cmake} -E cmake_echo_color --switch= --progress-dir=CMakeFiles --progress-num=1 x",
        "cmake -E cmake_echo_color --switch= x",
        "/bin/echo -E cmake_echo_color --switch= x",
        "{root}/missing/cmake -E cmake_echo_color --switch= x",
        "{cmake} -E cmake_echo_color --switch= x > out",
        "{cmake} -E cmake_echo_color --switch= $HOME",
        "{cmake} -E cmake_echo_color --switch= x; rm -f x",
    ],
)
def test_anything_else_is_left_to_cmake(script: str, root: Path) -> None:
    assert find(root, script.format(cmake=CMAKE, root=root), PLAIN) == [None, None]


def test_an_environment_that_changes_what_shells_do_is_respected(root: Path) -> None:
    assert find(root, command(root, "x"), [*PLAIN, b"BASH_ENV=/x"]) == [None, None]
    assert find(root, command(root, "x"), [b"PATH=relative:/bin"]) == [None, None]


@pytest.mark.parametrize(
    "disturb",
    [
        "echo some > count.txt",
        "echo 0 > count.txt",
        "echo 40 of 100 > count.txt",
        "echo 010 > count.txt",
        "seq 1000 > count.txt",
        "ln -sf ../../none/x 5",
        "mkdir 5",
        "ln 3 5",
        "mv count.txt other; ln -s other count.txt",
        "cd ..; mv Progress P; ln -s P Progress",
        "cd ..; mv Progress P; touch Progress",
    ],
)
def test_where_files_are_not_as_usual_nothing_is_changed(disturb: str, root: Path) -> None:
    subprocess.run(["sh", "-c", disturb], cwd=root / "b" / "CMakeFiles" / "Progress", check=True)
    before = snapshot(root)
    _, found = find(root, command(root, "--progress-dir=DIR --progress-num=4,5 x"), PLAIN)
    assert found is not None
    assert found.perform(os.fsencode(root)) is None
    assert snapshot(root) == before


def test_files_that_even_their_owner_may_not_write_are_made_by_cmake(root: Path) -> None:
    before = snapshot(root)
    _, found = find(root, command(root, "--progress-dir=DIR --progress-num=5 x"), PLAIN, umask=0o222)
    assert found is not None
    assert found.perform(os.fsencode(root)) is None
    assert snapshot(root) == before


def test_a_build_directory_outside_the_project_is_left_to_cmake(root: Path) -> None:
    _, found = find(root, command(root, "--progress-dir=DIR --progress-num=5 x"), PLAIN)
    assert found is not None
    assert found.perform(os.fsencode(root / "b" / "none")) is None


def test_every_environment_style_and_cmake_is_asked_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Manner] = []

    def look(manner: Manner) -> Look:
        asked.append(manner)
        return Look(b"", b"")

    monkeypatch.setattr(progress, "look_of", look)
    monkeypatch.setattr(progress, "MAX_MANNERS", 3)

    async def many() -> None:
        lines = ProgressLines()
        for flags in ("--green x", "--bold x", "--green --progress-dir=DIR --progress-num=1 y"):
            for varying in (b"MAKELEVEL=1", b"MAKELEVEL=2", b"PWD=/a", b"MAKEFLAGS=w"):
                lines.find(*sh(command(root, flags)), os.fsencode(root), 0o22, [*PLAIN, varying])
        await lines.close()
        for name in (b"CLICOLOR_FORCE=1", b"TERM=dumb", b"TERM=xterm"):
            lines.find(*sh(command(root, "--bold x")), os.fsencode(root), 0o22, [*PLAIN, name])
        await lines.close()

    asyncio.run(many())
    assert [manner.style for manner in asked] == [(b"--green",), (b"--bold",), (b"--bold",)]
    assert asked[2].env == (*PLAIN, b"CLICOLOR_FORCE=1")


def as_known(tmp_path: Path, body: str) -> Look | None:
    """What is made of a cmake that is this script."""
    (tmp_path / "bin").mkdir()
    cmake = tmp_path / "bin" / "cmake"
    cmake.write_text("#!/bin/sh\n" + textwrap.dedent(body))
    cmake.chmod(0o755)
    return look_of(Manner(os.fsencode(cmake), (), (b"--green",), (b"PATH=/usr/bin:/bin",)))


LIKE_CMAKE = """
    for last; do :; done
    dir=${5#*=}/Progress steps=$(echo "${6#*=}" | tr , ' ')
    if test -f "$dir/count.txt"; then
        for step in $steps; do printf empty > "$dir/$step"; done
        printf '[%3d%%] ' $((($(ls "$dir" | wc -l) - 1) * 100 / $(cat "$dir/count.txt")))
    fi
    printf '%s\\n' "$last"
"""


def test_a_program_that_does_the_same_is_as_good_as_cmake(tmp_path: Path) -> None:
    assert as_known(tmp_path, LIKE_CMAKE) == Look(b"", b"")


@pytest.mark.parametrize(
    ("instead_of", "this"),
    [
        ("%3d%%", "%d%%"),
        ("* 100", "* 1000 / 10 + 1"),
        ("printf empty", "printf full"),
        ('"$dir/$step"', '"$dir/x$step"'),
        ("'%s\\n' \"$last\"", "'%s' \"$last\""),
        ("'%s\\n' \"$last\"", "'%s\\n\\n' \"$last\""),
        ("'%s\\n' \"$last\"", "'<%s>\\n' \"$last\""),
        ("'%s\\n' \"$last\"", "'nothing\\n'"),
        ("for last;", "echo a warning >&2; for last;"),
        ("for last;", "mkdir -p $dir; for last;"),
        ("for last;", "date >> ${5#*=}/Progress/log; for last;"),
        ("for last;", "exit 3; for last;"),
        ("for last;", "sleep 20; for last;"),
        ('"$dir/$step"; done', '"$dir/$step"; chmod 600 "$dir/$step"; done'),
    ],
)
def test_a_cmake_that_does_anything_else_prints_its_lines_itself(
    instead_of: str, this: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sleep" in this:
        monkeypatch.setattr(progress, "_ASKING_LIMIT_S", 0.3)
    changed = LIKE_CMAKE.replace(instead_of, this)
    assert changed != LIKE_CMAKE
    assert as_known(tmp_path, changed) is None


def test_a_cmake_that_cannot_be_run_prints_nothing_here(tmp_path: Path) -> None:
    assert look_of(Manner(os.fsencode(tmp_path / "cmake"), (), (), ())) is None


def test_a_line_is_taken_apart() -> None:
    words = b"/usr/bin/cmake -E cmake_echo_color --switch= --green --progress-dir=/b --progress-num=1,2".split()
    assert read_line([*words, b"Built it"]) == Line(b"/usr/bin/cmake", (b"--green",), b"/b", (b"1", b"2"), b"Built it")
    assert read_line([]) is None
