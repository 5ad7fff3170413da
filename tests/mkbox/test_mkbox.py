"""mkbox with real root and real mounts: everything its README promises, seen from inside and from outside a box."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mkbox.boxing import LINKS, ODD_PROJECT, PATH, PROJECT, UID, Argument, Boxes, mounts, processes_with

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="making a box needs root"),
    pytest.mark.timeout(120),
]

# -- who the command is --------------------------------------------------------------------------------


def test_the_command_is_the_given_user_without_groups(boxes: Boxes) -> None:
    assert boxes.output("id -u; id -g; id -G") == [str(UID)] * 3


def test_the_command_has_no_capability_in_any_set_and_no_new_privileges(boxes: Boxes) -> None:
    lines = boxes.output("grep -E '^(Cap|NoNew)' /proc/self/status")
    expected = {f"Cap{kind}:\t0000000000000000" for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} | {"NoNewPrivs:\t1"}
    assert set(lines) == expected


def test_signals_have_their_default_dispositions_and_none_is_blocked(boxes: Boxes) -> None:
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN, "the parent must ignore something for this to show"
    done = boxes.run("/usr/bin/grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status")
    assert done.stdout == b"SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n"


def test_only_the_three_standard_descriptors_are_open(boxes: Boxes) -> None:
    secret = os.open("/etc/passwd", os.O_RDONLY)
    done = boxes.python("import os; print(sorted(os.listdir('/proc/self/fd')))", extra_fds=[secret])
    os.close(secret)
    assert done.stdout == b"['0', '1', '2', '3']\n"  # 3: the listing itself


def test_the_command_has_a_network_of_loopback_only(boxes: Boxes) -> None:
    assert boxes.output("ls /proc/sys/net/ipv4/conf; cut -d: -f1 /proc/net/dev | tail -n +3 | tr -d ' '") == [
        "all",
        "default",
        "lo",
        "lo",
    ]


def test_the_command_sees_only_its_own_processes(boxes: Boxes) -> None:
    done = boxes.python("import os; print([pid for pid in os.listdir('/proc') if pid.isdigit()], os.getpid())")
    assert done.stdout == b"['1', '2'] 2\n"


def test_mount_ipc_uts_and_pid_namespaces_are_its_own(boxes: Boxes) -> None:
    for kind in ("mnt", "ipc", "uts", "pid", "net"):
        assert boxes.output(f"readlink /proc/self/ns/{kind}") != [os.readlink(f"/proc/self/ns/{kind}")]


def test_the_host_name_is_the_boxs_own(boxes: Boxes) -> None:
    outside = os.uname().nodename
    assert boxes.output("uname -n", options=["--hostname", "box-7"]) == ["box-7"]
    assert os.uname().nodename == outside


def test_init_can_be_neither_traced_nor_read_nor_killed_by_the_command(boxes: Boxes) -> None:
    done = boxes.python(
        "import ctypes, os, signal\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.ptrace(16, 1, 0, 0), ctypes.get_errno())\n"
        "for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM): os.kill(1, number)\n"
        "for path in ('/proc/1/mem', '/proc/1/environ', '/proc/1/fd'):\n"
        "    try: os.listdir(path) if path.endswith('fd') else open(path).read(1)\n"
        "    except PermissionError: print('denied')\n"
        "print('alive')\n"
    )
    assert done.stdout == b"-1 1\ndenied\ndenied\ndenied\nalive\n", done
    assert done.status == 0


# -- how it ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 77, 125, 255])
def test_the_raw_wait_status_tells_the_exit_code(boxes: Boxes, code: int) -> None:
    done = boxes.sh(f"exit {code}")
    assert (done.exit, done.status) == (0, code << 8)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGPIPE, signal.SIGTERM])
def test_the_raw_wait_status_tells_the_signal(boxes: Boxes, number: int) -> None:
    done = boxes.sh(f"kill -{int(number)} $$")
    assert done.exit == 0
    assert done.status is not None and os.WIFSIGNALED(done.status) and os.WTERMSIG(done.status) == number


def test_the_status_tells_the_cpu_time_of_the_command_and_its_children(boxes: Boxes) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    done = boxes.run("sh", "-c", 'python3 -I -S -c "$0"; python3 -I -S -c "$0"', burn)
    assert done.status == 0
    assert 600_000 <= done.cpu_us < 3_000_000


def test_whatever_the_command_leaves_running_is_killed(boxes: Boxes) -> None:
    script = "(setsid sleep 86421 &) ; setsid sh -c 'trap \"\" TERM HUP; sleep 86421; sleep 86421' & exit 3"
    assert boxes.sh(script).status == 3 << 8  # and standard output, which the sleepers hold, has ended
    assert processes_with(b"86421") == []


def test_orphans_are_reaped_while_the_command_runs(boxes: Boxes) -> None:
    done = boxes.python(
        "import os, time\n"
        "r, w = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0: os.close(r); os._exit(0)\n"
        "    os._exit(0)\n"
        "os.wait(); os.close(w); os.read(r, 1)\n"
        "while sum(name.isdigit() for name in os.listdir('/proc')) > 2: time.sleep(0.001)\n"
    )
    assert done.status == 0


def start_under_a_parent(boxes: Boxes, script: str) -> tuple[subprocess.Popen[bytes], int]:
    """A parent that starts a box and waits; also the reading end of the command's standard output."""
    read, write = os.pipe()
    env = os.memfd_create("environment")
    os.write(env, PATH + b"\0")
    lower = os.open(boxes.outside(PROJECT), os.O_PATH)
    line = boxes.command_line(["sh", "-c", script], [], lower, env, PROJECT)
    parent = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys; p = subprocess.Popen(sys.argv[1:], close_fds=False);"
         "print(p.pid, flush=True); p.wait()", *line],
        cwd=boxes.new_task(), stdout=subprocess.PIPE, stderr=write, pass_fds=[boxes.mnt_ns, boxes.net_ns, env, lower],
    )  # fmt: skip
    for fd in (write, env, lower):
        os.close(fd)
    return parent, read


@pytest.mark.parametrize("victim", ["parent", "mkbox"])
def test_the_box_ends_with_sigkill_of_mkbox_or_of_its_parent(boxes: Boxes, victim: str) -> None:
    parent, box_output = start_under_a_parent(boxes, "(setsid sleep 86422 &); echo up >&2; sleep 86422")
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert os.read(box_output, 3) == b"up\n"
    os.kill(parent.pid if victim == "parent" else pid, signal.SIGKILL)
    assert os.read(box_output, 1) == b""  # everybody who held it is dead
    assert processes_with(b"86422") == []
    parent.wait()
    parent.stdout.close()
    os.close(box_output)


def test_a_parent_that_died_before_mkbox_could_notice_is_noticed(boxes: Boxes) -> None:
    done = boxes.sh("touch ran", close_status=True)
    assert (done.exit, done.status) == (125, None)
    assert os.listdir(boxes.upper) == []


# -- what it is given ----------------------------------------------------------------------------------


def test_the_environment_is_exactly_the_given_bytes(boxes: Boxes) -> None:
    env = [PATH, b"EMPTY=", b"ODD=\xff\n=\x01", b"EMPTY=again", b"no equals sign", b"LONG=" + b"x" * 100_000]
    assert boxes.run("/usr/bin/env", "-0", env=env).stdout == b"".join(entry + b"\0" for entry in env)


def test_an_empty_environment_is_empty_and_has_the_default_path(boxes: Boxes) -> None:
    assert boxes.run("env", "-0", env=[]).stdout == b""


def test_arguments_arrive_exactly(boxes: Boxes) -> None:
    arguments = [b"", b"\xff\n", b"--", b"-s", b"a b"]
    assert boxes.run("printf", "%s|", *arguments).stdout == b"|\xff\n|--|-s|a b|"


@pytest.mark.parametrize("mask", ["000", "022", "077"])
def test_the_umask_is_the_given_one(boxes: Boxes, mask: str) -> None:
    assert boxes.output("umask", options=["--umask", mask]) == ["0" + mask]


def test_the_working_directory_is_the_given_one(boxes: Boxes) -> None:
    assert boxes.output("pwd; cat b.c", options=["-d", PROJECT + b"/src/deep"])[0] == "/mirror/project/src/deep"


def test_standard_input_is_the_callers(boxes: Boxes) -> None:
    read, write = os.pipe()
    os.write(write, b"hello\0\xff")
    os.close(write)
    assert boxes.run("cat", stdin=read).stdout == b"hello\0\xff"
    os.close(read)


def test_limits_are_both_soft_and_hard(boxes: Boxes) -> None:
    options = ["--rlimit", "nofile=77", "--rlimit", "core=0", "--rlimit", "stack=unlimited"]
    script = "ulimit -Sn; ulimit -Hn; ulimit -Hc; ulimit -Sc; ulimit -n 78 2>/dev/null || echo no"
    assert boxes.output(script, options=options) == ["77", "77", "0", "0", "no"]


# -- which program -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "code", "reason"),
    [
        ("no-such-program", 127, b"No such file or directory"),
        ("./no-such-program", 127, b"No such file or directory"),
        ("./file", 126, b"Permission denied"),
        ("./src", 126, b"Permission denied"),
    ],
)
def test_a_program_that_cannot_be_executed_is_told_like_make_does(
    boxes: Boxes, program: str, code: int, reason: bytes
) -> None:
    done = boxes.run(program)
    assert (done.exit, done.status, done.error) == (0, code << 8, b"")
    assert done.stderr == b"termite: " + program.encode() + b": " + reason + b"\n"


def test_a_script_without_an_interpreter_line_runs_through_the_shell(boxes: Boxes) -> None:
    script = Path(os.fsdecode(boxes.outside(PROJECT))) / "script"
    script.write_text('echo "$0|$1|$#"\n')
    script.chmod(0o755)
    assert boxes.run("./script", "a b", "c").stdout == b"./script|a b|2\n"
    assert boxes.run("script", "x", env=[b"PATH=/nowhere:" + PROJECT]).stdout == PROJECT + b"/script|x|1\n"


def test_programs_are_found_on_the_path_of_the_commands_environment(boxes: Boxes) -> None:
    assert boxes.run("true", env=[b"PATH=/nowhere:/usr/bin"]).status == 0
    assert boxes.run("true", env=[b"PATH=/nowhere"]).status == 127 << 8
    assert boxes.run("true", env=[b"PATH=:/nowhere"], options=["-d", "/usr/bin"]).status == 0


def test_the_program_may_differ_from_the_first_argument(boxes: Boxes) -> None:
    assert boxes.run("my name", "-c", "echo $0", options=["-B", "/bin/sh"]).stdout == b"my name\n"


# -- files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("project", [PROJECT, ODD_PROJECT])
def test_the_upper_directory_holds_exactly_what_the_command_changed(boxes: Boxes, project: bytes) -> None:
    script = "set -e; echo new > made; echo more >> src/a.c; rm file; mkdir -p out/x; cat src/deep/b.c > /dev/null"
    assert boxes.sh(script, project=project).status == 0
    found = sorted(str(path.relative_to(boxes.upper)) for path in boxes.upper.rglob("*"))
    assert found == ["file", "made", "out", "out/x", "src", "src/a.c"]
    whiteout = (boxes.upper / "file").lstat()
    assert stat.S_ISCHR(whiteout.st_mode) and whiteout.st_rdev == 0
    assert (boxes.upper / "src/a.c").read_bytes() == b"contents of/src/a.cmore\n"
    made = (boxes.upper / "made").stat()
    assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode)) == (UID, UID, 0o644)
    assert sorted(os.listdir(boxes.outside(project))) == [b"file", b"src"]  # below, nothing has changed


def test_a_changed_mode_or_time_copies_the_whole_file_up(boxes: Boxes) -> None:
    assert boxes.sh("chmod 600 src/a.c; touch -d @1000000000 src/deep/b.c").status == 0
    assert (boxes.upper / "src/a.c").read_bytes() == b"contents of/src/a.c"
    assert (boxes.upper / "src/deep/b.c").stat().st_mtime == 1_000_000_000


def test_a_directory_that_existed_before_can_be_renamed(boxes: Boxes) -> None:
    done = boxes.python("import os; os.rename('src', 'moved'); print(os.listdir('moved/deep'), os.path.exists('src'))")
    assert done.stdout == b"['b.c'] False\n", done
    assert os.getxattr(boxes.upper / "moved", "trusted.overlay.redirect") == b"src"


def test_hard_links_to_new_and_old_files_work(boxes: Boxes) -> None:
    assert boxes.output("echo x > n; ln n m; ln file f; echo y >> n; cat m; stat -c %h n f; cmp file f") == [
        "x", "y", "2", "2"]  # fmt: skip


def test_nothing_outside_the_writable_root_is_writable_but_the_temporary_directories(boxes: Boxes) -> None:
    done = boxes.python(
        "import os\n"
        "def try_in(directory):\n"
        "    try: os.close(os.open(directory + '/.probe', os.O_CREAT | os.O_WRONLY))\n"
        "    except OSError: return\n"
        "    writable.append(directory)\n"
        "writable = []\n"
        "for top, directories, files in os.walk('/'):\n"
        "    if top == '/proc': directories[:] = []; continue\n"
        "    try_in(top)\n"
        "print(sorted(path for path in writable if not path.startswith('/mirror/project/')))"
    )
    assert done.stdout == b"['/mirror/project', '/tmp', '/var/tmp']\n", done


def test_the_read_only_mounts_stay_so_for_the_command(boxes: Boxes) -> None:
    done = boxes.sh("mount -o remount,rw /usr; umount /tmp; unshare -m true; echo $?")
    assert done.stdout != b"0\n"


@pytest.mark.parametrize("directory", ["/tmp", "/var/tmp", "/dev/shm"])
def test_temporary_directories_are_fresh_large_and_shared_with_nobody(boxes: Boxes, directory: str) -> None:
    script = f"ls -A {directory}; touch {directory}/mine; stat -Lc %a {directory}; df -Pk {directory}/. | tail -1"
    for _ in range(2):
        mode, free = boxes.output(script)
        assert mode == "1777"
        assert int(free.split()[3]) > 256 * 1024


def test_the_size_of_temporary_directories_can_be_limited(boxes: Boxes) -> None:
    done = boxes.sh("head -c 2000000 /dev/zero > /tmp/big; stat -c %s /tmp/big", options=["--tmp-size", "1m"])
    assert done.stdout == b"1048576\n"
    assert b"No space left" in done.stderr


def test_a_writable_root_below_a_fresh_tmpfs_is_made_there(boxes: Boxes) -> None:
    lower = boxes.outside(PROJECT)
    script = "pwd; cat file; touch new; touch /tmp/deep/new 2>/dev/null || echo denied"
    done = boxes.sh(script, project=b"/tmp/deep/project", lower=lower)
    assert done.stdout == b"/tmp/deep/project\ncontents of/filedenied\n", done
    assert os.listdir(boxes.upper) == ["new"]


def test_the_devices_work(boxes: Boxes) -> None:
    script = "head -c 3 /dev/zero | wc -c; echo x > /dev/null; head -c 5 /dev/urandom | wc -c; echo y | cat /dev/stdin"
    assert boxes.output(script) == ["3", "5", "y"]


def test_a_pseudo_terminal_can_be_had(boxes: Boxes) -> None:
    done = boxes.python("import os; print(os.ttyname(os.openpty()[1]))", options=["--pts", "/dev/pts"])
    assert done.stdout == b"/dev/pts/0\n", done


def test_a_task_may_bind_things_of_the_machine_into_its_box(boxes: Boxes) -> None:
    for source, argument in ((b"/plain", b"/tmp/x/plain"), (b"/o=d\xff", b"/tmp/d=st")):
        directory = boxes.outside(source)
        os.mkdir(directory)
        os.close(os.open(directory + b"/seen", os.O_CREAT))
        assert boxes.output(f"ls {os.fsdecode(argument)}", options=["--from", directory, "-b", argument]) == ["seen"]
    assert boxes.output("cat /tmp/one", options=["-b", boxes.outside(PROJECT) + b"/file=/tmp/one"])


def test_two_hundred_boxes_leave_no_mount_and_no_process(boxes: Boxes) -> None:
    before = mounts()
    for _ in range(200):
        assert boxes.run("/usr/bin/true").status == 0
    assert mounts() == before
    assert processes_with(os.fsencode(boxes.mkbox)) == []


# -- when there is no box ------------------------------------------------------------------------------


def test_a_missing_working_directory_is_named_through_the_error_descriptor(boxes: Boxes) -> None:
    done = boxes.run("true", options=["-d", b"/mirror/not\nthere"])
    assert (done.exit, done.status, done.stderr) == (125, None, b"")
    assert done.error == (
        b"mkbox: cannot enter the working directory /mirror/not\\x0athere in the box: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--upper", "missing"], b"(upperdir=missing): No such file or directory"),
        (["--upper", "w"], b"Invalid argument; each box needs fresh directories of its own"),
        (["--proc", "/nowhere"], b"cannot mount proc on /nowhere"),
        (["-r", "/usr/bin"], b"no mount point, bind it first"),
        (["-t", "/new/dir"], b"directory /new in the box: Read-only file system; the root of a template"),
        (["-b", "/no/such/source=/tmp/x"], b"cannot take /no/such/source"),
        (["--mnt-ns", "0"], b"cannot enter the namespace of --mnt-ns 0"),
        (["--env-fd", "999"], b"--env-fd 999"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_with_the_path(boxes: Boxes, options: list[str], named: bytes) -> None:
    done = boxes.run("true", options=options)
    assert (done.exit, done.status, done.stdout) == (125, None, b"")
    assert named in done.error and done.error.count(b"\n") == 1 and done.error.startswith(b"mkbox: ")


def test_without_an_error_descriptor_the_message_goes_to_standard_error(mkbox: str) -> None:
    done = subprocess.run([mkbox, "-q", "-s", "/no/such/root", "--", "true"], capture_output=True)
    assert done.returncode == 125
    assert done.stderr == b"mkbox: cannot take /no/such/root to bind it: No such file or directory\n"


def test_an_ordinary_user_is_told_what_is_missing(mkbox: str, tmp_path: Path) -> None:
    binary = Path("/dev/shm") / f"mkbox-{os.getpid()}"
    shutil.copy(mkbox, binary)
    try:
        done = subprocess.run([binary, "-q", "-s", "/", "--", "true"], capture_output=True, user=UID, group=UID)
    finally:
        binary.unlink()
    assert done.returncode == 125 and b"needs root (CAP_SYS_ADMIN)" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        [], ["-s"], ["-Z"], ["--nonsense"], ["-s", "/", "--"], ["-s", "/", "-u", "0", "--", "true"],
        ["-s", "/", "-u", "me", "--", "true"], ["-s", "/", "-u", "-5", "--", "true"], ["--", "true"],
        ["-s", "/", "--umask", "9", "--", "true"], ["-s", "/", "--rlimit", "beer=3", "--", "true"],
        ["-s", "/", "--rlimit", "cpu", "--", "true"], ["-s", "/", "--upper", "u", "--", "true"],
        ["-s", "/", "--mnt-ns", "3", "--", "true"], ["-s", "/", "-b", "nothing", "--", "true"],
        ["-s", "/", "--tmp-size", "big", "--", "true"], ["-s", "/", "--hold", "--proc", "proc"],
        ["-s", "/", "--hold", "true"], ["-s", "/", "--from", "x", "--", "true"],
        ["-s", "/", "--new-net", "--net-ns", "3", "--", "true"], ["--mnt-ns", "3", "--tmpfs-root", "--", "true"],
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_one_line_and_status_two(mkbox: str, options: list[str]) -> None:
    done = subprocess.run([mkbox, *options], capture_output=True)
    assert done.returncode == 2
    assert done.stdout == b"" and done.stderr.startswith(b"mkbox: ") and done.stderr.count(b"\n") == 1


# -- for people ----------------------------------------------------------------------------------------


def by_hand(mkbox: str, root: Path, *more: Argument) -> subprocess.CompletedProcess[bytes]:
    room = ["-s", str(root), "--tmpfs-root", "-b", "/usr=usr", "-r", "usr", *LINKS, "--dev", "dev", "-t", "tmp"]
    return subprocess.run([mkbox, *room, "--proc", "proc", "--new-net", *more], capture_output=True)


def test_a_box_made_by_hand_is_a_machine_of_its_own(mkbox: str, tmp_path: Path) -> None:
    before = mounts()
    done = by_hand(mkbox, tmp_path, "-q", "--", "sh", "-c", "id -u; ls /; wc -l < /proc/net/dev")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().split() == ["65534", "bin", "dev", "lib", "lib64", "proc", "tmp", "usr", "3"]
    assert mounts() == before and os.listdir(tmp_path) == []


def test_the_machines_own_root_can_be_the_box(mkbox: str) -> None:
    script = "touch /etc/probe 2>/dev/null || echo denied; ls -A /tmp; touch /tmp/x && ls /tmp"
    done = subprocess.run([mkbox, "-q", "-s", "/", "-t", "/tmp", "--", "sh", "-c", script], capture_output=True)
    assert done.stdout == b"denied\nx\n", done.stderr


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143)])
def test_without_a_status_descriptor_mkbox_ends_as_a_shell_would(
    mkbox: str, tmp_path: Path, script: str, status: int
) -> None:
    assert by_hand(mkbox, tmp_path, "-q", "--", "sh", "-c", script).returncode == status


def test_each_step_is_told_unless_quiet(mkbox: str, tmp_path: Path) -> None:
    told = by_hand(mkbox, tmp_path, "--", "true").stderr.decode().splitlines()
    assert "mkbox: bind on usr the tree /usr" in told
    assert by_hand(mkbox, tmp_path, "-q", "--", "true").stderr == b""


def test_explain_prints_the_plan_in_order_and_does_nothing(mkbox: str, tmp_path: Path) -> None:
    before = mounts()
    done = by_hand(mkbox, tmp_path, "-D", "a", "-L", "x=b", "-D", "c", "--explain", "--", "touch", "/tmp/explained")
    lines = done.stdout.decode().splitlines()
    wanted = ["  make the directory a", "  make the symlink b -> x", "  make the directory c", "  mount proc on proc"]
    assert [line for line in lines if line in wanted] == wanted
    assert (done.returncode, done.stderr) == (0, b"")
    assert mounts() == before and os.listdir(tmp_path) == [] and not os.path.exists("/tmp/explained")


def test_explain_needs_no_descriptor_to_be_open(mkbox: str) -> None:
    overlay = ["--lower-fd", "79", "--upper", "u", "--work", "w", "--writable", "/x\ny"]
    options = ["--mnt-ns", "77", "--net-ns", "78", *overlay, "--explain"]
    done = subprocess.run([mkbox, *options, "--", "true"], capture_output=True)
    assert done.returncode == 0 and b"mount the overlay on /x\\x0ay\n" in done.stdout


def test_help_and_version_are_told(mkbox: str) -> None:
    assert b"--writable" in subprocess.run([mkbox, "--help"], capture_output=True, check=True).stdout
    assert subprocess.run([mkbox, "--version"], capture_output=True, check=True).stdout.startswith(b"termite-mkbox ")
