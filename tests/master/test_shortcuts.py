"""What the master does itself leaves exactly what the real command would leave."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from termite.master import confined, shortcuts
from termite.master.shortcuts import ShortcutResult, find_shortcut

SHELLS = [path for name in ("dash", "bash") if (path := shutil.which(name))]


def sh(script: str | bytes, shell: str = "/bin/sh") -> tuple[bytes, list[bytes]]:
    text = script.encode() if isinstance(script, str) else script
    return shell.encode(), [shell.encode(), b"-c", text]


def snapshot(root: Path) -> dict[str, tuple[int, str]]:
    """Every name below root with its mode and contents."""
    found = {}
    for path in sorted(root.rglob("*")):
        st = path.lstat()
        contents = os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else ""
        found[str(path.relative_to(root))] = (st.st_mode, contents)
    return found


def populate(root: Path) -> Path:
    """A tree with one of everything; returns its root."""
    (root / "d" / "e" / "f").mkdir(parents=True)
    (root / "d" / "file").write_text("1")
    (root / "d" / "link").symlink_to("../plain")
    (root / "d" / "e" / "outward").symlink_to("/etc")
    (root / "plain").write_text("2")
    (root / "empty").mkdir()
    (root / "dirlink").symlink_to("d")
    (root / "dangling").symlink_to("nowhere")
    (root / "s p").mkdir()
    (root / "here").mkdir()
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return populate(tmp_path / "root")


def perform(
    program: bytes, argv: list[bytes], root: Path, cwd: Path | None = None, umask: int = 0o022, **env: str
) -> ShortcutResult | None:
    settings = [f"{name}={value}".encode() for name, value in env.items()]
    shortcut = find_shortcut(program, argv, os.fsencode(cwd or root / "here"), umask, settings)
    return shortcut.perform(os.fsencode(root)) if shortcut else None


def really(argv: list[bytes], cwd: Path, umask: int = 0o022) -> subprocess.CompletedProcess[bytes]:
    env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
    return subprocess.run(argv, cwd=cwd, umask=umask, capture_output=True, timeout=20, check=False, env=env)


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


def test_changed_paths_name_each_new_directory_and_the_parents(root: Path) -> None:
    result = perform(*sh("mkdir -p a/b ../c"), root)
    assert result is not None
    prefix = os.fsencode(root)[1:]
    assert result.changed_paths == [
        prefix + end for end in (b"/here", b"/here/a", b"/here/a/b", b"", b"/c")
    ]  # fmt: skip
    result = perform(*sh("rm -rf a"), root)
    assert result is not None
    assert result.changed_paths == [prefix + b"/here", prefix + b"/here/a"]
    result = perform(*sh("mkdir -p ../c"), root)
    assert result is not None
    assert result.changed_paths == []


def test_the_daemons_own_umask_and_the_set_group_id_bit_do_not_show(root: Path) -> None:
    (root / "here").chmod(0o2775)
    own = os.umask(0o077)
    try:
        result = perform(*sh("mkdir -p a/b && true"), root, umask=0o002)
    finally:
        os.umask(own)
    assert result is not None
    for made in ("a", "a/b"):
        assert stat.S_IMODE((root / "here" / made).stat().st_mode) == 0o2775
    really([b"mkdir", b"-p", b"c/d"], root / "here", umask=0o002)
    assert stat.S_IMODE((root / "here/c/d").stat().st_mode) == 0o2775


def test_a_umask_that_would_lock_us_out_is_left_to_mkdir(root: Path) -> None:
    assert perform(*sh("mkdir x"), root, umask=0o777) is None
    assert not (root / "here" / "x").exists()


def test_the_masters_socket_is_never_deleted(root: Path) -> None:
    (root / ".termite-socket").write_text("")
    (root / "d" / "e" / ".termite-socket").write_text("")
    for script in ("rm -f ../.termite-socket", "rm -rf ../d", "rm -rf ../d/e"):
        assert perform(*sh(script), root) is None
    assert (root / "d" / "file").exists()
    shortcut = find_shortcut(*sh("rm -f ../plain"), os.fsencode(root / "here"), 0o22)
    assert shortcut is not None
    assert shortcut.perform(os.fsencode(root), protected={b"plain"}) is None


def test_the_masters_socket_is_neither_moved_nor_replaced_nor_touched(root: Path) -> None:
    (root / ".termite-socket").write_text("")
    before = snapshot(root)
    for script in ("mv -f ../.termite-socket x", "mv -f ../plain ../.termite-socket", "touch ../.termite-socket"):
        assert perform(*sh(script), root) is None
    assert snapshot(root) == before


def test_a_file_with_other_names_is_left_to_the_real_mv_and_touch(root: Path) -> None:
    os.link(root / "plain", root / "other")
    before = snapshot(root)
    for script in ("mv ../plain x", "mv -f ../d/file ../plain", "mv -f ../plain ../other", "touch ../other"):
        assert perform(*sh(script), root) is None
    assert snapshot(root) == before


def test_what_is_moved_is_the_same_file_and_not_newer(root: Path) -> None:
    os.utime(root / "plain", ns=(1, 1_234_567_891))
    before = (root / "plain").stat()
    result = perform(*sh("mv -f ../plain ../d/file"), root)
    assert result is not None
    after = (root / "d" / "file").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    prefix = os.fsencode(root)[1:]
    assert result.changed_paths == [prefix + end for end in (b"", b"/plain", b"/d", b"/d/file")]
    assert result.files() == {prefix + b"/plain": None, prefix + b"/d/file": b"%d" % after.st_ino}
    assert result.arrived == [prefix + b"/d/file"]


def test_what_is_touched_is_as_new_as_what_the_real_touch_leaves(root: Path) -> None:
    os.utime(root / "plain", ns=(1, 1))
    own = os.umask(0o077)
    try:
        renewed = perform(*sh("touch ../plain"), root, umask=0o002)
        made = perform(*sh("touch new"), root, umask=0o002)
    finally:
        os.umask(own)
    assert renewed is not None and made is not None
    assert renewed.files() == {}, "no contents were written that another command could mind"
    assert made.files() == {os.fsencode(root)[1:] + b"/here/new": hashlib.sha256(b"").digest()}
    really([b"touch", b"later"], root / "here")
    later = (root / "here" / "later").stat()
    for path in (root / "plain", root / "here" / "new"):
        assert later.st_mtime_ns - 5_000_000_000 < path.stat().st_mtime_ns <= later.st_mtime_ns
    assert (root / "plain").read_text() == "2"
    assert stat.S_IMODE((root / "here" / "new").stat().st_mode) == 0o664


def test_a_place_that_became_a_file_meanwhile_holds_nothing(root: Path) -> None:
    below = os.fsencode(root / "plain")[1:] + b"/x"
    assert ShortcutResult(0, b"", b"", [below]).files() == {below: None}


def test_a_default_acl_is_left_to_the_real_touch(root: Path) -> None:
    acl = bytes.fromhex("0200000001000700ffffffff04000500ffffffff20000000ffffffff")
    try:
        os.setxattr(root / "here", "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("this file system has no ACLs")
    assert perform(*sh("touch new"), root) is None
    assert perform(*sh("mkdir new"), root) is None
    assert not (root / "here" / "new").exists()


def test_symlinks_in_a_deleted_tree_are_deleted_not_followed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("")
    (root / "d" / "out").symlink_to(outside)
    (root / "d" / "up").symlink_to("../..")
    assert perform(*sh("rm -rf ../d"), root) is not None
    assert not (root / "d").exists()
    assert (outside / "precious").exists()


def test_a_directory_reached_through_a_symlink_is_left_to_the_real_command(root: Path) -> None:
    (root / "alias").symlink_to("d")
    assert perform(*sh("mkdir x"), root, cwd=root / "alias") is None
    assert perform(*sh("echo x"), root, cwd=root / "missing") is None
    assert perform(*sh("echo x"), root, cwd=root.parent) is None
    assert perform(*sh(f"mkdir {root}/d/x"), root) is not None
    assert perform(*sh(f"mkdir {root}/alias/y"), root) is None


def test_a_missing_root_is_no_shortcut(root: Path) -> None:
    shortcut = find_shortcut(*sh("true"), os.fsencode(root / "here"), 0o22)
    assert shortcut is not None
    assert shortcut.perform(os.fsencode(root / "missing")) is None
    (root / "alias").symlink_to("d")
    assert shortcut.perform(os.fsencode(root / "alias")) is None


def test_names_of_any_bytes_work(root: Path) -> None:
    name = b"a\nb\xff;$'\""
    assert perform(b"", [b"mkdir", name], root) is not None
    assert os.path.isdir(os.fsencode(root / "here") + b"/" + name)
    assert perform(b"", [b"rm", b"-r", name], root) is not None
    assert os.listdir(root / "here") == []


def test_a_tree_too_large_or_too_deep_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "MAX_ENTRIES", 3)
    assert perform(*sh("rm -rf ../d"), root) is None
    monkeypatch.setattr(confined, "MAX_ENTRIES", 5000)
    (root / ("x/" * 120)).mkdir(parents=True)
    assert perform(*sh("rm -rf ../x"), root) is None
    assert (root / ("x/" * 120)).exists()
    assert (root / "d" / "file").exists()


def test_a_command_of_enormous_length_is_left_alone(root: Path) -> None:
    assert perform(b"", [b"rm", b"-f", *[b"../x"] * shortcuts.MAX_WORDS], root) is None
    assert perform(*sh("rm -f " + "../plain " * 10_000), root) is None
    assert (root / "plain").exists()


def test_many_operands_in_many_directories_hold_a_bounded_number_of_descriptors(root: Path) -> None:
    for number in range(confined.MAX_DIRECTORIES + 1):
        (root / f"m{number}").mkdir()
        (root / f"m{number}" / "f").write_text("")
    operands = " ".join(f"../m{number}/f" for number in range(confined.MAX_DIRECTORIES + 1))
    assert perform(*sh(f"rm -f {operands}"), root) is None
    assert (root / "m0" / "f").exists()
    assert perform(*sh(f"rm -f {operands.rpartition(' ')[0]}"), root) is not None
    assert not (root / "m0" / "f").exists()


def test_what_mkdir_made_before_an_error_is_taken_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = os.mkdir

    def full_disk(name: bytes, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if name == b"c":
            raise OSError(28, "No space left on device")
        make(name, mode, dir_fd=dir_fd)

    before = snapshot(root)
    monkeypatch.setattr(os, "mkdir", full_disk)
    assert perform(*sh("mkdir -p x a/b/c"), root) is None
    assert snapshot(root) == before


def test_a_directory_that_appears_at_the_same_moment_is_as_good_as_made(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = os.mkdir

    def twice(name: bytes, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        make(name, mode, dir_fd=dir_fd)
        make(name, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", twice)
    assert perform(*sh("mkdir -p a/b"), root) == ShortcutResult(0, b"", b"", [])
    assert (root / "here/a/b").is_dir()


def test_a_failure_in_the_middle_of_deleting_reads_as_that_of_rm(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = os.unlink

    def stubborn(name: bytes, *, dir_fd: int | None = None) -> None:
        if name == b"file":
            raise PermissionError(1, "Operation not permitted")
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", stubborn)
    result = perform(*sh("rm -rf ../d ../plain"), root)
    assert result is not None
    assert result.status == 256
    assert result.stderr == b"rm: cannot remove '../d/file': Operation not permitted\n"
    assert not (root / "plain").exists()
    assert os.listdir(root / "d") == ["file"]
    prefix = os.fsencode(root)[1:]
    assert {prefix + b"/d", prefix + b"/d/e", prefix + b"/d/e/f", prefix + b"/plain"} <= set(result.changed_paths)
    assert prefix + b"/d/file" not in result.changed_paths


@pytest.fixture
def as_nobody() -> Iterator[Callable[[], None]]:
    """Gives up root's powers for the rest of the test when called."""
    yield lambda: os.seteuid(65534)
    os.seteuid(os.getuid())


@pytest.mark.skipif(os.getuid() != 0, reason="needs to give up root's powers")
def test_what_the_user_may_not_change_is_left_to_the_real_command(as_nobody: Callable[[], None]) -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        root = populate(Path(place))
        (root / "sticky").mkdir()
        (root / "sticky").chmod(0o1777)
        (root / "sticky" / "of-root").write_text("")
        (root / "open").mkdir()
        (root / "open").chmod(0o777)
        (root / "open" / "readonly").write_text("")
        (root / "open" / "mine").write_text("")
        (root / "open" / "tree" / "locked").mkdir(parents=True)
        (root / "open" / "tree" / "locked" / "file").write_text("")
        before = snapshot(root)
        as_nobody()
        for script in ("mkdir x", "rm -f ../plain", "rm -rf ../d", "rm -f ../sticky/of-root", "rm -rf ../open/tree"):
            assert perform(*sh(script), root) is None, script
        assert perform(*sh("rm ../open/readonly"), root) is None  # rm would ask
        assert perform(*sh("mv ../open/mine ../open/readonly"), root) is None  # and so would mv
        for script in ("mv -f ../plain x", "mv -f ../sticky/of-root ../open/x", "touch ../plain", "touch x"):
            assert perform(*sh(script), root) is None, script
        os.seteuid(0)
        assert snapshot(root) == before
        as_nobody()
        assert perform(*sh("rm -f ../open/readonly"), root) is not None
        os.seteuid(0)


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
