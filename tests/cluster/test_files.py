"""What a command may do to files: afterwards the master's tree is as a local run would have left it.

Every script runs once through the wrapper on a worker and once plainly in a twin directory.
"""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.farm import Farm, tree

PREPARE = b"""
mkdir -p d/e full empty; echo one > a; echo two > b; echo three > d/c; echo deep > d/e/f; chmod 644 a b
ln -s a link; ln -s nowhere dangling; for i in 1 2 3; do echo $i > full/$i; done; ln a a-twin
mkdir linked; echo x > linked/x; ln linked/x full/x
"""

SCRIPTS: dict[str, bytes] = {
    "create": b"echo new > new; printf 'no newline' > d/new2",
    "overwrite in place": b"echo changed > b",
    "append": b"echo more >> b",
    "truncate": b": > b; truncate -s 3 d/c",
    "grow": b"truncate -s 100000 b",
    "delete": b"rm b d/c",
    "delete a tree": b"rm -r d full",
    "rename a file": b"mv b moved; mv d/c c",
    "rename a file over a file": b"mv -f b d/c 2>&1",
    "rename a directory": b"mv d moved",
    "rename a directory over an empty one": b"mv -T full empty",
    "rename and edit inside": b"mv d moved; echo x > moved/e/g; rm moved/c; mkdir d; echo again > d/c",
    "swap two directories": b"mv d t; mv full d; mv t full",
    "directory to file": b"rm -r d; echo file > d",
    "directory to file and back": b"rm -r d; echo file > d; rm d; mkdir d; echo back > d/c",
    "file to directory": b"rm b; mkdir b; echo x > b/inside",
    "remove and make anew": b"rm -r full; mkdir full; echo 9 > full/9",
    "symlinks": b"ln -s a rel; ln -s /etc/passwd abs; ln -s nowhere2 gone; ln -sfn d link; rm dangling",
    "symlink to directory": b"rm -r d; ln -s full d",
    "write through a symlink": b"echo via > link",
    "chmod": b"chmod 755 b; chmod 700 d; chmod 444 d/e/f",
    "explicit times": b"touch -d '2001-02-03 04:05:06.789' b; touch -d '2030-01-01' new; cp -p b copy",
    "time of a directory": b"touch -d '2001-02-03' d full",
    "sparse": b"truncate -s 50M sparse; printf end >> sparse",
    "hard links": b"ln b b2; ln b d/b3; echo new > n1; ln n1 n2",
    "write to a hard linked file": b"echo both >> a",
    "rename a hard linked file": b"mv a d/moved",
    "rename and change a hard linked file": b"mv a b; echo both >> b",
    "rename a hard linked file out of a removed directory": b"mv linked/x y; rm -rf linked",
    "unreadable": b"echo secret > u; chmod 0000 u; mkdir ud; echo x > ud/x; chmod 0000 ud; chmod 0755 ud",
    "private": b"umask 077; echo x > p; mkdir pd",
    "empty directory": b"mkdir -p x/y/z",
    "odd names": b"echo 1 > \"$(printf 'new\\nline')\"; echo 2 > \"$(printf 'caf\\351')\"; echo 3 > ' sp:c,o%\\\\ '; mkdir \"$(printf '\\377\\376')\"",
    "many small files": b"mkdir many; cd many; i=0; while [ $i -lt 10000 ]; do echo $i > f$i; i=$((i+1)); done",
    "binary": b"head -c 300000 /dev/zero | tr '\\\\0' '\\\\377' > bin; head -c 70000 /dev/zero > zero",
    "fifo": b"mkfifo pipe",
    "unchanged": b"cat a >/dev/null; touch -c nothing; exec 3<>b; true",
    "sed in place": b"sed -i s/two/zwei/ b; sed -i s/deep/tief/ d/e/f",
    "read-only directory": b"mkdir ro; echo x > ro/x; chmod 555 ro",
    "exchange through temporary": b"cp a .tmp; echo x >> .tmp; mv .tmp a",
}


def _local(directory: Path, script: bytes) -> None:
    subprocess.run([b"/bin/sh", b"-c", script], cwd=directory, check=True, stdin=subprocess.DEVNULL)


def _clear(root: Path) -> None:
    subprocess.run(
        "chmod -R u+rwx . ; find . -mindepth 1 -not -name .termite-socket -delete", shell=True, cwd=root, check=True
    )


def _links(root: Path) -> dict[bytes, int]:
    """How many names each regular file has."""
    found = {}
    for path in tree(root):
        st = os.lstat(os.path.join(os.fsencode(root), path))
        if stat.S_ISREG(st.st_mode):
            found[path] = st.st_nlink
    return found


def _times(root: Path, recent: float) -> dict[bytes, int]:
    """Modification times that were set on purpose."""
    times = {}
    for path in tree(root):
        mtime = os.lstat(os.path.join(os.fsencode(root), path)).st_mtime_ns
        if abs(mtime / 1e9 - recent) > 3600:
            times[path] = mtime
    return times


def _special(root: Path) -> dict[bytes, int]:
    return {p: stat.S_IFMT(os.lstat(os.path.join(os.fsencode(root), p)).st_mode) for p in tree_names(root)}


def tree_names(root: Path) -> list[bytes]:
    out = subprocess.run(
        ["find", ".", "-not", "-name", ".termite-socket", "-print0"], cwd=root, capture_output=True, check=True
    )
    return sorted(n for n in out.stdout.split(b"\0") if n)


@pytest.fixture
def twin(cluster: Farm, project: Path) -> Iterator[Path]:
    """Where the script runs plainly; both directories are empty afterwards, whatever happened."""
    twin = cluster.dir / "twin"
    twin.mkdir()
    yield twin
    _clear(twin)
    twin.rmdir()
    _clear(project)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_remote_command_leaves_files_as_a_local_one_does(
    cluster: Farm, project: Path, twin: Path, name: str
) -> None:
    for directory in (project, twin):
        _local(directory, PREPARE)
    cluster.command(project, "termite-shell-wrapper", "-refresh")
    before = time.time()
    result = cluster.remote(project, SCRIPTS[name])
    assert result.returncode == 0, result.stderr
    _local(twin, SCRIPTS[name])
    assert tree_names(project) == tree_names(twin)
    assert _special(project) == _special(twin)
    if name != "fifo":
        assert tree(project) == tree(twin)
        assert _links(project) == _links(twin)
        assert _times(project, before) == _times(twin, before)
    if name == "sparse":
        assert (project / "sparse").stat().st_blocks < 1000


def test_a_gibibyte_file_comes_back_whole(cluster: Farm, project: Path) -> None:
    script = "yes 0123456789abcde | head -c 1073741824 > big; sha256sum big > sum"
    assert cluster.remote(project, script, limit_s=300).returncode == 0
    subprocess.run(["sha256sum", "-c", "--quiet", "sum"], cwd=project, check=True)
    assert (project / "big").stat().st_size == 1 << 30


def test_a_result_is_seen_by_the_next_command_on_any_worker(cluster: Farm, project: Path) -> None:
    for number in range(6):
        assert (
            cluster.remote(project, f"test ! -e f{number}; echo {number} > f{number}; mkdir -p s/{number}").returncode
            == 0
        )
        seen = cluster.remote(project, "cat f*; ls s | tr '\\n' ' '")
        assert seen.stdout == b"".join(b"%d\n" % n for n in range(number + 1)) + b"".join(
            b"%d " % n for n in range(number + 1)
        )
    cluster.remote(project, "rm f0; mv s t; echo new > f1")
    seen = cluster.remote(project, "ls; cat f1; ls t")
    assert seen.stdout.split() == b"f1 f2 f3 f4 f5 t new 0 1 2 3 4 5".split(), seen.stderr


def test_what_is_written_through_one_name_of_a_file_is_seen_through_the_others(cluster: Farm, project: Path) -> None:
    (project / "d").mkdir()
    (project / "one").write_text("1\n")
    os.link(project / "one", project / "d" / "two")
    cluster.command(project, "termite-shell-wrapper", "-refresh")
    assert cluster.remote(project, "cat one d/two").stdout == b"1\n1\n"
    assert cluster.remote(project, "echo 2 >> one").returncode == 0
    assert cluster.remote(project, "cat one d/two").stdout == b"1\n2\n" * 2
    assert cluster.remote(project, "mv d/two two; echo 3 >> two").returncode == 0
    assert cluster.remote(project, "cat one two").stdout == b"1\n2\n3\n" * 2
    assert (project / "one").samefile(project / "two")


def test_nothing_outside_the_writable_root_changes(cluster: Farm, project: Path) -> None:
    outside = cluster.dir / "outside"
    outside.mkdir()
    outside.chmod(0o777)
    (outside / "file").write_text("before\n")
    (outside / "file").chmod(0o666)
    script = f"echo x > {outside}/new; echo x > {outside}/file; rm -f {outside}/file; rm -rf {outside}; echo x > /usr/x; true"
    result = cluster.remote(project, script)
    assert b"Read-only file system" in result.stderr
    assert (outside / "file").read_text() == "before\n"
    assert os.listdir(outside) == ["file"]


def test_edits_between_two_commands_are_seen_after_a_refresh(cluster: Farm, project: Path) -> None:
    (project / "edited").write_text("one")
    (project / "removed").write_text("x")
    (project / "dir").mkdir()
    cluster.command(project, "termite-shell-wrapper", "-refresh")
    assert cluster.remote(project, "cat edited removed; ls dir").stdout == b"onex"
    (project / "edited").write_text("two")
    (project / "removed").unlink()
    (project / "dir" / "added").write_text("")
    cluster.command(project, "termite-shell-wrapper", "-refresh")
    assert cluster.remote(project, "cat edited; ls removed dir 2>/dev/null").stdout == b"twodir:\nadded\n"


def test_private_files_cannot_be_read_by_any_name(cluster: Farm, project: Path) -> None:
    (project / "secret").write_text("hidden")
    (project / "secret").chmod(0o600)
    (project / "sym").symlink_to("secret")
    os.link(project / "secret", project / "hard")
    (project / "closed").mkdir()
    (project / "closed" / "inside").write_text("hidden")
    (project / "closed").chmod(0o700)
    (project / "into").symlink_to("closed/inside")
    cluster.command(project, "termite-shell-wrapper", "-refresh")
    for name in (
        "secret",
        "sym",
        "hard",
        "closed/inside",
        "into",
        "./closed/../secret",
        f"{project}/secret",
        "/etc/shadow",
    ):
        result = cluster.remote(project, f"cat {name}; dd if={name} count=1 2>/dev/null")
        assert b"hidden" not in result.stdout and not result.stdout, name
        assert result.returncode != 0
    assert b"Permission denied" in cluster.remote(project, "cat secret").stderr
    assert b"inside" not in cluster.remote(project, "ls closed").stdout
