"""What the master does itself leaves exactly what the real command would leave."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from termite.master.shortcuts import ShortcutResult, find_shortcut
from tests.master.shortcutting import perform, populate, really, sh, snapshot

SHELLS = [path for name in ("dash", "bash") if (path := shutil.which(name))]

TAKEN = [
    "true",
    "false",
    ":",
    "true ignored",
    "mkdir ../new",
    "mkdir new ../other",
    "mkdir -p new/deep/er ../d/g",
    "mkdir -p ../d",
    "mkdir -p .",
    "mkdir -p new/ ./new//x/",
    "mkdir --parents a a/b a",
    "mkdir -m 700 new",
    "mkdir -m0700 new",
    "mkdir -p -m 750 new/deep",
    "mkdir -pm 777 new",
    "mkdir -p -m 755 ../d",
    "mkdir -- new",
    "mkdir a b/ 'c d'",
    "rm ../plain",
    "rm -f ../plain ../missing ../missing/deeper",
    "rm -f",
    "rm -rf ../d",
    "rm -rf ../d/ ../nothing/",
    "rm -r ../d ../plain",
    "rm -fr ../d/e ../d",
    "rm -R -f ../d ../empty",
    "rm -f ../dirlink ../dangling ../d/link",
    "rm -rf ../dirlink",
    "rm -rf '../s p'",
    "mv ../plain new",
    "mv -f ../plain ../d/file",
    "mv -f ../d/file ../s\\ p/other",
    "mv ../d/file ../plain",
    "echo moving; mv -f ../plain ./x",
    "[ -f ../plain ] && mv ../plain x || false",
    "touch new",
    "touch ../d/new",
    "touch ../plain",
    "test -f ../plain || touch ../plain",
    "echo",
    "echo '  CC  ' a.o",
    'echo "it\'s" done',
    "echo -n x y",
    "echo -----",
    "echo a -n -e",
    "echo ü",
    "test -d ../d",
    "test -d ../plain",
    "test -d ../dirlink",
    "test -e ../dangling",
    "test -f ../d/link",
    "test -d ../d/",
    "test -f ../plain/",
    "test ! -d ../x",
    "[ -f ../plain ]",
    "[ ! -e ../plain ]",
    "test a = a",
    "test a != a",
    "test ! = x",
    "test -n ''",
    "test -z ''",
    "test ! -z x",
    "test -d ../d || mkdir ../d",
    "test -d ../x || mkdir ../x",
    "[ -d ../x ] || mkdir -p ../x",
    "[ -d ../d ] && rm -rf ../d && echo gone",
    "[ -d ../x ] && rm -rf ../x && echo gone",
    "echo '  MKDIR x'; mkdir -p x",
    "rm -f ../plain || true",
    "false || true && false; echo x",
    "rm -f ../plain; false",
    "/bin/mkdir -p x && /usr/bin/test a = a || :",
    "mkdir -p $(dirname new/deep/x.o)",
    "mkdir -p $(dirname ../d/x.o)",
    "mkdir -p $(dirname x.o)",
    "mkdir '$(dirname x) y'",
    "mkdir -p `dirname new/deep//x.o/` a",
    'mkdir -p "$(dirname new/x.o)" `dirname new/deep/x.o`',
    "test -d $(dirname ../d/x) || mkdir -p $(dirname ../d/x); echo $(dirname ../d/x)",
    "echo $(dirname /) $(dirname a) $(dirname a/) $(dirname /a) $(dirname a//b//) $(dirname ./a) $(dirname ../a/..)",
]


@pytest.mark.parametrize("umask", [0o022, 0o007])
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("script", TAKEN)
def test_a_shortcut_leaves_what_the_shell_leaves(script: str, shell: str, umask: int, tmp_path: Path) -> None:
    for name in ("ours", "real"):
        (tmp_path / name).mkdir()
        populate(tmp_path / name)
    before = snapshot(tmp_path / "ours")
    for flags in (b"-c", b"-ec"):
        argv = [shell.encode(), flags, script.encode()]
        result = perform(argv[0], argv, tmp_path / "ours", tmp_path / "ours" / "here", umask)
        expected = really(argv, tmp_path / "real" / "here", umask)
        after = snapshot(tmp_path / "ours")
        if result is None:  # the second time, what was to be made or deleted may be there or gone already
            assert flags == b"-ec" and expected.returncode != 0
            break
        assert result.status == expected.returncode << 8
        assert (result.stdout, result.stderr) == (expected.stdout, expected.stderr)
        assert after == snapshot(tmp_path / "real")
        names = {path.removeprefix(os.fsencode(tmp_path / "ours")[1:]).strip(b"/") for path in result.changed_paths}
        changed = {os.fsencode(name) for name in before.keys() ^ after.keys()}
        tops = {name for name in changed if os.path.dirname(name) not in changed}
        assert tops <= names
        assert {os.path.dirname(name) for name in tops} <= names
        assert changed <= names or b"rm" in argv[2]
        before = after


@pytest.mark.parametrize(
    "argv",
    [
        ["mkdir", "new"],
        ["mkdir", "-p", "a b/c"],
        ["rm", "-rf", "../d"],
        ["mv", "-f", "../plain", "../d/file"],
        ["touch", "new"],
        ["echo", "a  b", "c"],
        ["true"],
        ["false"],
        ["test", "-d", "../d"],
        ["[", "-d", "../x", "]"],
    ],
)
@pytest.mark.parametrize("place", ["/bin/", "/usr/bin/", ""])
def test_a_program_started_without_a_shell_is_a_shortcut_too(argv: list[str], place: str, tmp_path: Path) -> None:
    for name in ("ours", "real"):
        (tmp_path / name).mkdir()
        populate(tmp_path / name)
    words = [arg.encode() for arg in argv]
    program = place.encode() + words[0] if place else b""
    result = perform(program, words, tmp_path / "ours", tmp_path / "ours" / "here")
    expected = really([program or words[0], *words[1:]], tmp_path / "real" / "here")
    assert result is not None
    assert (result.status, result.stdout) == (expected.returncode << 8, expected.stdout)
    assert snapshot(tmp_path / "ours") == snapshot(tmp_path / "real")


@pytest.mark.parametrize(
    "script",
    [
        "mkdir ../d",  # exists
        "mkdir new ../d",
        "mkdir new missing/deeper",
        "mkdir same same",
        "mkdir -p ../plain",
        "mkdir -p ../plain/x",
        "mkdir -p ../dirlink",  # fine for mkdir, but through a symlink
        "mkdir -p ../dirlink/x",
        "mkdir -p new ../plain/x",
        "mkdir /etc/termite-test",
        "mkdir -p ../../out",
        "mkdir -p /tmp/termite-test/out",
        "mkdir -p new/../other",
        "mkdir -v new",
        "mkdir -m u+x new",
        "mkdir -m 1777 new",
        "mkdir new -p",
        "mkdir ''",
        "mkdir",
        "rm",
        "rm ../missing",
        "rm ../d",
        "rm -f ../d",
        "rm ../plain ../missing",
        "rm ../plain ../plain",
        "rm -r ../d ../d/e",
        "rm -f ../plain/",
        "rm -rf ../plain/x",
        "rm -rf ../dirlink/",
        "rm -rf ../dirlink/file",
        "rm -rf .",
        "rm -rf ..",
        "rm -rf ../here",
        "rm -rf /",
        "rm -rf ../..",
        "rm -rf ../../root",
        "rm -rf ../d/../empty",
        "rm -i ../plain",
        "rm -rv ../d",
        "rm -f -- -x",
        "rm -f ''",
        "rm -f /etc/termite-test",
        "rm -f ../*.o",
        "mv ../plain",
        "mv ../plain ../d/file x",
        "mv ../missing x",
        "mv ../plain ../plain",
        "mv ../plain ../d",
        "mv ../plain .",
        "mv ../plain ../d/",
        "mv ../plain x/",
        "mv ../plain/ x",
        "mv ../plain ../missing/x",
        "mv ../plain ../dirlink",
        "mv ../plain ../dirlink/x",
        "mv ../plain ../dangling",
        "mv ../dangling x",
        "mv ../empty x",
        "mv -n ../plain x",
        "mv -f -- ../plain x",
        "mv -b ../plain x",
        "mv ../plain /etc/termite-test",
        "mv /etc/passwd x",
        "mv ../plain x && mv x y",
        "mkdir x && mv ../plain x/y",
        "touch",
        "touch a b",
        "touch -c a",
        "touch -r ../plain a",
        "touch ../d",
        "touch ../dirlink",
        "touch ../dangling",
        "touch ../plain/",
        "touch ../missing/x",
        "touch /etc/termite-test",
        "mkdir x && touch x/y",
        "echo 'a\\n'",
        "echo -e x",
        "echo -n -n x",
        "echo -nn",
        "echo -",
        "echo $HOME",
        "echo x > ../plain",
        "/bin/echo --help",
        "/bin/true --version",
        "./rm -f ../plain",
        "rm/rm -f ../plain",
        "/usr/local/bin/mkdir x",
        "sudo rm -f ../plain",
        "command rm -f ../plain",
        "test -d /etc",
        "test -x ../plain",
        "test -d ../d -a -f ../plain",
        "test",
        "test x",
        "[ -d ../d",
        "rm -f ../plain; mkdir x",
        "mkdir -p x && rm -f ../plain || :",
        "mkdir x; test -d x",
        "mkdir x &",
        "if true; then mkdir x; fi",
        "(mkdir x)",
        "mkdir -p x$(dirname a/b)",
        "mkdir -p $(dirname a/b)x",
        "echo \\ $(dirname a/b)",
        "echo x # $(dirname a/b)",
        'echo "x $(dirname a/b) y"',
        'mkdir -p "$(dirname a/b)',
        "mkdir -p $(dirname a/b c/d)",
        "mkdir -p $(dirname -z a)",
        "mkdir -p $(dirname //a)",
        "mkdir -p $(dirname a*/b)",
        "mkdir -p $(dirname a/b`",
        "mkdir -p `dirname a/b)",
        "mkdir -p $(/usr/bin/dirname a/b)",
        "mkdir -p $(dirname $HOME/x)",
        "mkdir -p $(basename a/b)",
        "",
    ],
)
def test_anything_else_is_left_to_the_real_command_and_nothing_has_changed(script: str, root: Path) -> None:
    before = snapshot(root)
    assert perform(*sh(script), root) is None
    assert snapshot(root) == before


@pytest.mark.parametrize(
    "argv",
    [
        ["/bin/sh", "-xc", "true"],
        ["/bin/sh", "-nc", "mkdir x"],
        ["/bin/bash", "-lc", "true"],
        ["/bin/bash", "-O", "extglob", "-c", "true"],
        ["/bin/bash", "-o", "posix", "-c", "true"],
        ["/bin/zsh", "-c", "true"],
        ["/bin/sh", "-c", "echo x", "name"],
        ["./sh", "-c", "true"],
        ["/bin/sh", "script"],
        ["/bin/gcc", "-c", "x.c"],
        [":"],
        ["mkdir"],
    ],
)
def test_shells_with_other_habits_and_other_programs_are_not_answered(argv: list[str], root: Path) -> None:
    words = [arg.encode() for arg in argv]
    assert perform(words[0], words, root) is None
    assert perform(b"", [], root) is None


def test_the_usual_shell_flags_of_makefiles_are_understood(root: Path) -> None:
    argv = [b"/bin/bash", b"-eu", b"-o", b"pipefail", b"-c", b"false; echo x"]
    result = perform(argv[0], argv, root)
    assert result == ShortcutResult(256, b"", b"", [])
    argv = [b"/bin/bash", b"-c", b"false; echo x"]
    assert perform(argv[0], argv, root) == ShortcutResult(0, b"x\n", b"", [])


@pytest.mark.parametrize(
    "setting",
    ["BASH_ENV=/x", "SHELLOPTS=xtrace", "BASHOPTS=x", "BASH_FUNC_mkdir%%=() { :; }", "POSIXLY_CORRECT=1"],
)
def test_an_environment_that_changes_what_commands_mean_is_respected(setting: str, root: Path) -> None:
    assert find_shortcut(b"", [b"true"], os.fsencode(root), 0o22, [setting.encode()]) is None


def test_a_program_of_the_same_name_earlier_on_path_is_respected(root: Path) -> None:
    tools = root / "tools"
    tools.mkdir()
    path = f"{tools}:/usr/bin"
    assert perform(*sh("mkdir one"), root, PATH=path) is not None
    (tools / "mkdir").write_text("#!/bin/sh\n")
    (tools / "mkdir").chmod(0o755)
    assert perform(*sh("mkdir two"), root, PATH=path) is None
    assert perform(*sh("/bin/mkdir two"), root, PATH=path) is not None
    assert perform(*sh("mkdir three"), root, PATH=f"/usr/bin:{tools}") is not None
    assert perform(*sh("mkdir four"), root, PATH=f"relative:{tools}") is None
    assert perform(*sh("mkdir four"), root, PATH=":/usr/bin") is None
    assert perform(*sh("mkdir four"), root, PATH="/usr/local/bin") is None
    assert perform(*sh("/bin/mkdir -p $(dirname five/x)"), root, PATH=path) is not None
    (tools / "dirname").write_text("#!/bin/sh\n")
    (tools / "dirname").chmod(0o755)
    assert perform(*sh("/bin/mkdir -p $(dirname six/x)"), root, PATH=path) is None


_OPERANDS = st.sampled_from(
    tuple(["a", "a/b", "b", "./a/", "../d", "../d/", "../d/e", "../d/file", "../x/y", "../plain", "../dirlink"])
)


@settings(max_examples=150, deadline=None)
@given(
    command=st.sampled_from(
        ["mkdir", "mkdir -p", "rm", "rm -f", "rm -r", "rm -rf", "mv", "mv -f", "touch", "test -d", "test ! -e"]
    ),
    operands=st.lists(_OPERANDS, min_size=1, max_size=3),
)
def test_any_command_either_does_the_real_thing_or_nothing(command: str, operands: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        ours, real = Path(place, "ours"), Path(place, "real")
        for each in (ours, real):
            each.mkdir()
            populate(each)
        argv = [arg.encode() for arg in (*command.split(), *operands)]
        before = snapshot(ours)
        result = perform(b"", argv, ours, ours / "here")
        if result is None:
            assert snapshot(ours) == before
            return
        expected = really(argv, real / "here")
        assert (result.status, result.stderr) == (expected.returncode << 8, expected.stderr)
        assert snapshot(ours) == snapshot(real)
