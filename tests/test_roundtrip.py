"""What a command does to files in an overlay arrives in the user's tree as a local run would have left it.

The same work is done once in a plain directory and once in a real kernel overlay, which is reaped and
replayed onto a copy; then the two trees are compared completely.  Needs root to mount.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from termite import paths
from termite.attr.fileattr import ABSENT, FileAttr, attr_of
from termite.master.replay import Content, Replayed, Replayer, Span
from termite.mirror.overlay import Reaped, reap
from termite.store.local import ContentStore, digest
from termite.wire.messages import FileResult

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting an overlay needs root")

MOUNT = "lowerdir=l,upperdir=u,workdir=w,redirect_dir=on,metacopy=off,index=off,xino=off,volatile"
LONG_AGO = 1_500_000_000 * 10**9
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18
Work = Callable[[], int]


class Trees:
    """`a`: where the work is done locally; `b`: the user's tree; `l`: what a mirror shows of it."""

    def __init__(self, top: Path) -> None:
        self.top = os.fsencode(top)
        self.a, self.b, self.lower = (self.top + b"/" + name for name in (b"a", b"b", b"l"))
        os.mkdir(self.a)

    def freeze(self) -> None:
        """Everything has been put into `a`: make it old and make the copies."""
        for directory, names, files in os.walk(self.a, topdown=False):
            for name in [*names, *files]:
                os.utime(os.path.join(directory, name), ns=(LONG_AGO, LONG_AGO), follow_symlinks=False)
        os.utime(self.a, ns=(LONG_AGO, LONG_AGO))
        subprocess.run(["cp", "-a", self.a, self.b], check=True)
        # A mirror shows every name of a file as a file of its own.
        subprocess.run(["cp", "-PR", "--preserve=mode,ownership,timestamps", self.a, self.lower], check=True)
        for name in (b"/u", b"/w", b"/m"):
            os.mkdir(self.top + name)
        found = os.stat(self.b)
        os.chmod(self.top + b"/u", stat.S_IMODE(found.st_mode))
        os.utime(self.top + b"/u", ns=(LONG_AGO, LONG_AGO))

    def attr(self, path: bytes) -> FileAttr:
        """What the master tells of a path of the user's tree."""
        try:
            found = os.lstat(b"/" + path)
        except (FileNotFoundError, NotADirectoryError):
            return ABSENT
        hash = b""
        if stat.S_ISREG(found.st_mode):
            fd = os.open(b"/" + path, os.O_RDONLY)
            hash = digest(fd)
            os.close(fd)
        return attr_of(found, os.readlink(b"/" + path) if stat.S_ISLNK(found.st_mode) else b"", hash)

    def in_overlay(self, work: Work) -> int:
        """Do the work on an overlay over `l`, in a process with mounts of its own."""
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                os.chdir(self.top)
                none = ctypes.c_char_p(None)
                if libc.unshare(CLONE_NEWNS) or libc.mount(none, b"/", none, MS_REC | MS_PRIVATE, none):
                    os._exit(97)
                if libc.mount(b"overlay", b"m", b"overlay", 0, MOUNT.encode()):
                    os._exit(98)
                os.chdir(self.top + b"/m")
                status = work()
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def locally(self, work: Work) -> int:
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                os.chdir(self.a)
                status = work()
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Outcome:
    """Both runs of one piece of work and the comparison of what they left."""

    def __init__(self, trees: Trees, work: Work, *, inline_bytes: int = 1 << 20, unnamed: bool = True) -> None:
        self.trees = trees
        self.root = trees.b[1:]
        self.local_span = [time.time_ns()]
        self.local_status = trees.locally(work)
        self.local_span.append(time.time_ns())
        sent = time.time_ns()
        self.status = trees.in_overlay(work)
        ended = time.time_ns()
        self.clock = Span(sent, ended, sent, ended, 0)
        store = ContentStore(os.path.dirname(trees.top) + b"/store", 1 << 40)
        lower_fd = os.open(trees.lower, os.O_RDONLY)
        try:
            upper = trees.top + b"/u"
            self.reaped: Reaped = reap(
                upper, self.root, trees.attr, store, inline_bytes=inline_bytes, lower_fd=lower_fd
            )
        finally:
            os.close(lower_fd)
        self.replayed = self._replay(store, Replayer(trees.b, unnamed=unnamed))

    def _replay(self, store: ContentStore, replayer: Replayer) -> Replayed:
        staged = []

        def content(file: FileResult) -> Content:
            if file.inline_at >= 0:
                return self.reaped.body[file.inline_at : file.inline_at + file.attr.size]
            into = replayer.stage(file.attr.size, file.attr.hash)
            staged.append(into)
            fd = store.open(file.attr.hash, file.attr.size)
            while piece := os.read(fd, 1 << 18):
                into.write(piece)
            os.close(fd)
            into.finish()
            return into

        try:
            return replayer.apply(self.reaped.files, content, self.clock)
        finally:
            for each in staged:
                each.close()

    def check(self) -> None:
        assert self.status == self.local_status
        slack = 20_000_000
        local = snapshot(self.trees.a, self.local_span[0] - slack, self.local_span[1] + slack)
        remote = snapshot(self.trees.b, self.clock.sent_ns, self.clock.received_ns)
        assert remote == local, self.reaped.files


def snapshot(top: bytes, since_ns: int, until_ns: int) -> dict[bytes, object]:
    """All there is to see of a tree; times of the run stand as "now", hard links as the group's first name."""
    found: dict[bytes, object] = {}
    first: dict[int, bytes] = {}
    pending = [b""]
    for path in pending:
        absolute = top + b"/" + path if path else top
        seen = os.lstat(absolute)
        when = "now" if since_ns <= seen.st_mtime_ns <= until_ns else seen.st_mtime_ns
        contents: object = b""
        if stat.S_ISDIR(seen.st_mode):
            pending[len(pending) :] = sorted(paths.join(path, name) for name in os.listdir(absolute))
        elif stat.S_ISLNK(seen.st_mode):
            contents = os.readlink(absolute)
        elif stat.S_ISREG(seen.st_mode):
            fd = os.open(absolute, os.O_RDONLY)
            contents = (seen.st_size, digest(fd), seen.st_nlink)
            os.close(fd)
        same_as = b"" if stat.S_ISDIR(seen.st_mode) else first.setdefault(seen.st_ino, path)
        found[path] = (oct(seen.st_mode), when, contents, same_as)
    return found


@pytest.fixture
def trees(tmp_path: Path) -> Iterator[Trees]:
    yield Trees(tmp_path)
    shutil.rmtree(tmp_path)


def shell(script: str) -> Work:
    return lambda: subprocess.run(["bash", "-ec", script], stderr=sys.stderr).returncode


PROJECT = r"""
mkdir -p src/deep/er dir/sub empty other; umask 022
echo one > src/one.c; echo two > src/two.c; echo deep > src/deep/er/file; echo x > dir/x; echo y > dir/sub/y
echo o > other/o; echo top > top; chmod 640 src/two.c; chmod 750 other; ln -s src/one.c link; ln -s dir dirlink
echo shared > h1; ln h1 h2; printf 'old\n' > $'new\nline'; dd if=/dev/urandom of=big bs=1M count=2 status=none
mkdir ro; echo r > ro/r; chmod 555 ro
mkdir -p linked/deep; echo joint > linked/l1; ln linked/l1 linked/l2; ln linked/l1 linked/deep/l3; ln linked/l1 l0
"""

SCRIPTS = {
    "nothing": "cat top src/*.c > /dev/null; ls -R > /dev/null",
    "create": "echo new > new; mkdir -p build/obj; echo o > build/obj/x.o; : > build/zero",
    "overwrite in place": "echo changed > top; echo longer text here > src/one.c",
    "append": "echo more >> src/two.c",
    "truncate": ": > src/one.c; truncate -s 100 src/two.c; truncate -s 1000000 big",
    "delete": "rm top src/one.c link",
    "delete directory": "rm -r src dir; rmdir empty",
    "rename file": "mv top bottom; mv src/one.c src/two.c; mv link dir/link2",
    "rename directory": "mv src source; mv dir/sub source/sub",
    "rename over each other": "mv top src/one.c; mv -T src empty; mv dir/x other/o",
    "directory becomes file": "rm -r dir; echo file > dir",
    "file becomes directory": "rm top; mkdir top; echo t > top/t",
    "directory to file and back": "rm -r src; echo f > src; rm src; mkdir src; echo again > src/one.c",
    "renamed then replaced by file": "mv src old; echo f > src",
    "renamed then replaced by directory": "mv src old; mkdir src; echo f > src/one.c; mkdir src/deep",
    "symlinks": r"ln -s top rel; ln -s /etc/passwd abs; ln -s nowhere dangling; ln -sfn other link; "
    r"ln -s $'by\ntes\xff' odd; touch -h -d 2001-01-01 rel",
    "symlink replaced by directory": "rm dirlink; mkdir dirlink; echo x > dirlink/x",
    "directory replaced by symlink": "rm -r dir; ln -s src dir; rm -r empty; ln -s x empty",
    "file replaced by symlink and back": "ln -sf nowhere top; rm link; echo file > link",
    "write through symlink": "echo via > dirlink/x; echo new > dirlink/new; echo via >> link",
    "chmod": "chmod +x top; chmod 600 src/one.c; chmod 644 src/two.c; echo a > a; chmod 4755 a; chmod u-s a",
    "chmod of directories": "chmod 700 dir; chmod 1777 other; mkdir n; chmod 2755 n; chmod 500 src",
    "touch": "touch top; touch -d '2001-02-03 04:05:06.789' src/one.c; echo n > n; touch -d @12345.6789 n; "
    "touch -r src/two.c dir/x",
    "touch directories": "touch -d 2001-01-01 dir; touch src; mkdir n; echo > n/f; touch -d 1999-01-01 n; "
    "echo >> other/o",
    "edit in a directory without changing it": "echo more >> dir/sub/y",
    "replace in a directory": "echo new > dir/tmp; mv dir/tmp dir/x",
    "sparse": "truncate -s 50M sparse; printf end >> sparse; dd if=/dev/zero of=z bs=1M count=3 status=none; "
    "printf x | dd of=middle bs=1 seek=5000000 status=none; truncate -s 9000000 middle; truncate -s 5M all",
    "large": "yes | head -c 64M > large; echo end >> big",
    "many": "mkdir many; cd many; for d in $(seq 20); do mkdir $d; done; seq 10000 | "
    "awk '{ f = ($1 % 20 + 1) \"/\" $1; print $1 > f; close(f) }'",
    "hard links": "echo n > n1; ln n1 n2; mkdir l; ln n1 l/n3; ln -P rellink l/s 2> /dev/null || true",
    "hard link to existing": "ln top top2; ln src/one.c a0; ln src/two.c dir/sub/two; rm src/two.c",
    "hard link and change": "ln top top2; echo more >> top2; chmod 600 top",
    "hard link over existing": "ln -f top src/one.c; ln -f top dir/x",
    "hard links of the user": "echo more >> h1",
    "hard link of the user replaced": "echo new > t; mv t h1",
    "hard link of the user overwritten by rename of an old file": "mv top h1",
    "hard link of the user deleted": "rm h2",
    "hard link of the user renamed": "mv h1 away",
    "hard link of the user renamed into another directory": "mv h1 dir/sub/h; rm dir/x",
    "hard link of the user renamed over a file": "mv h1 top",
    "hard link of the user renamed over another one": "ln src/one.c o2; mv h1 o2; mv h2 src/two.c",
    "hard link of the user renamed and changed": "mv h1 away; echo more >> away; chmod 600 away",
    "hard link of the user renamed and touched": "mv h1 away; touch -d 2001-01-01 away",
    "hard link of the user renamed there and back": "mv h1 away; mv away h1",
    "hard link of the user renamed, the other deleted": "mv h1 away; rm h2",
    "hard link of the user renamed, its directory deleted": "mv linked/l1 out; rm -r linked",
    "hard link of the user renamed, its directory too": "mv linked joined; mv joined/l1 out; "
    "mv joined/deep/l3 joined/l4",
    "hard link of the user under a new name": "ln h1 n1; ln h1 n2; rm h1",
    "hard link of the user replaces a directory": "rmdir empty; mv h1 empty",
    "hard link of the user gives way to another file": "mv h1 away; echo fresh > h1",
    "hard links of the user all renamed": "mv h1 a1; mv h2 a2; mv linked/l1 a3",
    "hard links of the user swap": "mv h1 t; mv linked/l1 h1; mv t linked/l1",
    "symlink hard link": "ln -s x s1; ln -P s1 s2; ln -P link link3",
    "unreadable": "echo secret > secret; chmod 0 secret; chmod 0 src/one.c; mkdir closed; echo x > closed/x; "
    "chmod 0 closed; chmod 0 dir",
    "empty directory": "mkdir e1 e2; mkdir -p e3/e4/e5; rmdir empty",
    "odd names": r"echo a > $'a\nb'; echo b > $'\xff\xfe'; mkdir $'d\x80\n'; echo c > $'d\x80\n/\\'; "
    r"rm $'new\nline'; echo d > ' '; echo e > '-rf'; echo f > '*'; echo g > 'a,b:c\'",
    "swap": "mv src t; mv dir src; mv t dir",
    "swap with changes": "mv src t; mv dir src; mv t dir; echo more >> dir/one.c; echo n > src/n; rm src/x",
    "swap nested": "mv src/deep t; mv src t/src; mv t src",
    "swap children between": "mv src/deep t; mv dir/sub src/deep; mv t dir/sub",
    "parent and child": "mkdir n; mv src n/src; mv n src",
    "rotate": "mv src t; mv dir src; mv other dir; mv t other; mv empty dir/empty",
    "chain": "mv src a1; mv a1 a2; mv a2 a3; mv a3/deep a4; mv a4/er a3/er; rmdir a4; mv a3 src",
    "there and back": "mv src away; mv away src; touch -d @1500000000 .",
    "rename, edit inside": "mv src new; echo more >> new/one.c; rm new/two.c; echo n > new/n; "
    "mv new/deep/er new/er; chmod 700 new/deep; echo m >> new/er/file",
    "rename, remove subdirectory": "mv src new; rm -r new/deep; mkdir new/deep; echo z > new/deep/z",
    "rename into new": "mkdir -p n/m; mv src n/m/src; mv n/m/src/deep n/deep",
    "rename over empty directory": "mv -T src empty; rm -r other/*; mv -T dir other",
    "recreate": "rm -r src; mkdir -p src/deep; echo x > src/x",
    "recreate the same": "cp -a src s; rm -r src; mv s src",
    "recreate after rename": "mv src old; mkdir src; mv old/one.c src/one.c; rm -r old",
    "copy": "cp -a src copy; cp -r dir copy2; cp -p top top.orig",
    "sed -i": "sed -i s/one/1/ src/one.c; sed -i s/t/T/ top",
    "fifo": "mkfifo pipe; mkfifo -m 600 top.pipe; rm top; mkfifo top",
    "read-only directory": "chmod 755 ro; echo n > ro/n; chmod 555 ro; mkdir ro2; echo x > ro2/x; chmod 500 ro2",
    "root's attributes": "chmod 700 .; touch -d 2002-02-02 .",
    "fails half-way": "echo a > a; echo b > b; exit 3",
    "configure-like": "for i in $(seq 30); do echo x > conftest.c; cp conftest.c conftest.o; rm -f conftest*; done",
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", SCRIPTS)
def test_a_command_leaves_the_tree_as_a_local_run_does(trees: Trees, case: str) -> None:
    subprocess.run(["bash", "-ec", PROJECT], cwd=trees.a, check=True)
    trees.freeze()
    Outcome(trees, shell(SCRIPTS[case])).check()


@pytest.mark.parametrize(
    "case",
    ["create", "rename over each other", "hard links", "hard links of the user all renamed", "sparse", "symlinks"],
)
def test_it_does_so_without_o_tmpfile_and_without_inline_contents(trees: Trees, case: str) -> None:
    subprocess.run(["bash", "-ec", PROJECT], cwd=trees.a, check=True)
    trees.freeze()
    Outcome(trees, shell(SCRIPTS[case]), inline_bytes=0, unnamed=False).check()


def test_a_command_that_changes_nothing_has_no_results(trees: Trees) -> None:
    subprocess.run(["bash", "-ec", PROJECT], cwd=trees.a, check=True)
    trees.freeze()
    outcome = Outcome(trees, shell("cat top; exec 3<>top; mv src s; mv s src; touch -d @1500000000 ."))
    assert outcome.reaped.files == []


def test_a_touched_large_file_is_not_sent(trees: Trees) -> None:
    subprocess.run(["bash", "-ec", PROJECT], cwd=trees.a, check=True)
    trees.freeze()
    outcome = Outcome(trees, shell("touch big; chmod +x big"))
    outcome.check()
    assert [(file.kept, file.in_place) for file in outcome.reaped.files] == [(True, True)]
    assert outcome.reaped.body == b""


# -- random work --------------------------------------------------------------------------------------

NAMES = ["a", "b", "c", "d"]
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
DATA = st.sampled_from([b"", b"x", b"hello\n", b"0" * 70_000, bytes(200_000)])
TIMES = st.sampled_from([10**18, 10**18 + 123_456_789, LONG_AGO])
MODES = st.sampled_from([0o644, 0o755, 0o600, 0o500, 0o777, 0o000])
OPERATIONS = st.one_of(
    st.tuples(st.just("write"), PATHS, DATA),
    st.tuples(st.just("append"), PATHS, DATA),
    st.tuples(st.just("truncate"), PATHS, st.sampled_from([0, 3, 100_000])),
    st.tuples(st.just("open"), PATHS),
    st.tuples(st.just("unlink"), PATHS),
    st.tuples(st.just("rmtree"), PATHS),
    st.tuples(st.just("rmdir"), PATHS),
    st.tuples(st.just("mkdir"), PATHS),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("exchange"), PATHS, PATHS),
    st.tuples(st.just("symlink"), PATHS, PATHS),
    st.tuples(st.just("link"), PATHS, PATHS),
    st.tuples(st.just("chmod"), PATHS, MODES),
    st.tuples(st.just("utime"), PATHS, TIMES),
    st.tuples(st.just("fifo"), PATHS),
)
FULL = {path: path.encode() for path in ("a/a/a", "a/a/b", "a/b/a", "a/c", "b/a/a", "b/b", "b/c/d", "c/a", "d")}
INITIAL = st.one_of(st.just(FULL), st.dictionaries(PATHS, DATA, max_size=10))


def perform(operations: list[tuple[object, ...]], log: bytes) -> int:
    """Do them, going on after each that is refused; the refusals are written to `log`."""
    with open(log, "w") as errors:
        for operation in operations:
            try:
                perform_one(str(operation[0]), str(operation[1]), *operation[2:])
            except (OSError, shutil.Error) as error:
                print(operation, getattr(error, "errno", error), file=errors)
            else:
                print(operation, "done", file=errors)
    return 0


def perform_one(kind: str, path: str, other: object = None) -> None:
    if kind in ("write", "append"):
        assert isinstance(other, bytes)
        with open(path, "wb" if kind == "write" else "ab", opener=nonblocking) as file:
            file.write(other)
    elif kind == "truncate":
        assert isinstance(other, int)
        os.truncate(path, other)
    elif kind == "open":
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    elif kind == "exchange":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(-100, path.encode(), -100, str(other).encode(), 2):
            raise OSError(ctypes.get_errno(), "renameat2")
    elif kind == "chmod":
        assert isinstance(other, int)
        os.chmod(path, other)
    elif kind == "utime":
        assert isinstance(other, int)
        os.utime(path, ns=(other, other), follow_symlinks=False)
    elif kind == "link":
        os.link(path, str(other), follow_symlinks=False)
    elif kind in ("rename", "symlink"):
        getattr(os, kind)(path, str(other))
    elif kind == "rmtree" and os.path.isdir(path):  # opened before it is looked at: a fifo would block
        shutil.rmtree(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "rmtree":
        getattr(os, kind)(path)


def nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o644)


EXAMPLES = int(os.environ.get("TERMITE_EXAMPLES", "60"))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(initial=INITIAL, operations=st.lists(OPERATIONS, min_size=1, max_size=20))
@pytest.mark.timeout(600)
def test_any_sequence_of_operations_arrives(
    tmp_path_factory: pytest.TempPathFactory, initial: dict[str, bytes], operations: list[tuple[object, ...]]
) -> None:
    top = tmp_path_factory.mktemp("random")
    trees = Trees(top)
    try:
        for path, data in initial.items():
            target = os.path.join(os.fsdecode(trees.a), path)
            if not os.path.exists(target) and not any(path.startswith(p + "/") for p in initial if p != path):
                os.makedirs(os.path.dirname(target), exist_ok=True)
                Path(target).write_bytes(data)
        trees.freeze()
        logs = [trees.top + b"/log1", trees.top + b"/log2"]
        outcome = Outcome(trees, lambda: perform(operations, logs.pop(0) if os.getcwdb() == trees.a else logs[-1]))
        assert (top / "log1").read_text() == (top / "log2").read_text()
        outcome.check()
    finally:
        shutil.rmtree(top)
