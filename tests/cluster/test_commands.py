"""What the caller of one command sees: status, signal, output, environment; and what the box is like."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.farm import PROGRAMS, Farm, wait_for


@pytest.mark.parametrize("status", [0, 1, 2, 77, 127, 255])
def test_the_exit_status_arrives(cluster: Farm, project: Path, status: int) -> None:
    assert cluster.remote(project, f"exit {status}").returncode == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGPIPE])
def test_death_by_signal_arrives_as_that_signal(cluster: Farm, project: Path, number: signal.Signals) -> None:
    assert cluster.remote(project, f"kill -{number.value} $$").returncode == -number


def test_stdout_and_stderr_stay_apart_and_exact(cluster: Farm, project: Path) -> None:
    result = cluster.remote(project, r"printf 'out\0\377'; printf 'err\0\376' >&2")
    assert (result.stdout, result.stderr) == (b"out\0\xff", b"err\0\xfe")
    result = cluster.remote(project, "true")
    assert (result.stdout, result.stderr) == (b"", b"")


def test_large_output_arrives_whole(cluster: Farm, project: Path) -> None:
    result = cluster.remote(project, "seq 1 3000000; seq 1 100000 >&2")
    assert result.stdout == b"".join(b"%d\n" % n for n in range(1, 3000001))
    assert result.stderr == b"".join(b"%d\n" % n for n in range(1, 100001))


def test_merged_output_keeps_its_order(cluster: Farm, project: Path) -> None:
    result = subprocess.run(
        ["termite-shell-wrapper", "-c", "for i in 1 2 3 4 5; do echo out$i; echo err$i >&2; done"],
        cwd=project, env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True,
    )  # fmt: skip
    assert result.stdout.split() == [f"{s}{i}".encode() for i in range(1, 6) for s in ("out", "err")]


def test_output_of_a_long_command_is_seen_while_it_runs(cluster: Farm, project: Path) -> None:
    process = subprocess.Popen(
        ["termite-shell-wrapper", "-c", "echo early; sleep 300"],
        cwd=project, env=cluster.env, stdout=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.read(6) == b"early\n"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)
        process.stdout.close()


def test_commands_one_after_the_other_stay_on_one_worker(cluster: Farm, project: Path) -> None:
    for _ in range(3):
        assert cluster.remote(project, "seq 1; true").stdout == b"1\n"
    opened = re.findall(r"mirror open, (\d+) slots", cluster.programs[-1].log())
    assert opened == ["2"], "it knew at once that there were slots"


def test_an_interrupted_wrapper_ends_the_remote_command(cluster: Farm, project: Path) -> None:
    mark = f"3{os.getpid()}"
    process = subprocess.Popen(["termite-shell-wrapper", "-c", f"sleep {mark}"], cwd=project, env=cluster.env)
    running = ["pgrep", "-f", f"^sleep {mark}"]
    wait_for("the remote sleep", lambda: subprocess.run(running, stdout=subprocess.DEVNULL).returncode == 0)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == -signal.SIGINT
    started = time.monotonic()
    wait_for("its end", lambda: subprocess.run(running, stdout=subprocess.DEVNULL).returncode == 1, 5)
    assert time.monotonic() - started < 5


def test_stdin_reaches_the_command_when_it_reads(cluster: Farm, project: Path) -> None:
    data = os.urandom(700_000)
    result = subprocess.run(
        ["termite-shell-wrapper", "-c", "cat"],
        cwd=project,
        env=cluster.env,
        input=data,
        capture_output=True,
        check=True,
    )
    assert result.stdout == data


def test_a_command_that_does_not_read_leaves_stdin_to_others(cluster: Farm, project: Path) -> None:
    script = "while read line; do termite-shell-wrapper -c 'ls / >/dev/null'; echo $line; done"
    result = subprocess.run(
        ["sh", "-c", script], cwd=project, env=cluster.env, input=b"1\n2\n3\n", capture_output=True, check=True
    )
    assert result.stdout == b"1\n2\n3\n"


def test_environment_umask_directory_and_arguments_are_the_callers(cluster: Farm, project: Path) -> None:
    (project / "sub dir").mkdir()
    cluster.command(project, "termite-shell-wrapper", "-refresh")
    script = 'umask; pwd; printf "%s|" "$ODD"; env | grep -c TERMITE_; exit 0'
    result = subprocess.run(
        ["sh", "-c", f"umask 027; termite-shell-wrapper -c '{script}'"],
        cwd=project / "sub dir", env={**cluster.env, "ODD": "a b\n\\x"}, capture_output=True, check=True,
    )  # fmt: skip
    assert result.stdout == b"0027\n" + os.fsencode(project / "sub dir") + b"\na b\n\\x|1\n"
    result = cluster.command(
        project, "termite-shell-wrapper", "-exec", "/usr/bin/printf", "%s,", "a b", "", b"\xff", "*"
    )
    assert result.stdout == b"a b,,\xff,*,"


def test_the_box_holds_no_power(cluster: Farm, project: Path) -> None:
    script = "id -u; grep -E '^(Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs)' /proc/self/status; cat /proc/net/dev | wc -l; echo $$; ls /proc | grep -c '^[0-9]'"
    lines = cluster.remote(project, script).stdout.decode().split("\n")
    assert int(lines[0]) != 0
    assert all(int(line.split()[1], 16) == 0 for line in lines[1:6]), lines
    assert lines[6].split() == ["NoNewPrivs:", "1"]
    assert lines[7].strip() == "3"  # two heading lines and lo
    assert int(lines[8]) < 10 and int(lines[9]) < 10


def test_nothing_lives_on_after_a_command(cluster: Farm, project: Path) -> None:
    mark = f"4{os.getpid()}"
    assert cluster.remote(project, f"setsid sleep {mark} & exit 0").returncode == 0
    assert subprocess.run(["pgrep", "-f", f"^sleep {mark}"], stdout=subprocess.DEVNULL).returncode == 1


def test_a_missing_program_is_reported_as_the_shell_does(cluster: Farm, project: Path) -> None:
    assert cluster.remote(project, "no-such-program").returncode == 127
    result = cluster.command(project, "termite-shell-wrapper", "-exec", "/no/such/program")
    assert result.returncode == 127 and b"/no/such/program" in result.stderr


def test_simple_commands_are_answered_by_the_master(cluster: Farm, project: Path) -> None:
    def wrapper(text: str) -> subprocess.CompletedProcess[bytes]:
        return cluster.command(project, "termite-shell-wrapper", "-c", text)

    assert wrapper("mkdir -p x/y").returncode == 0 and (project / "x/y").is_dir()
    assert cluster.remote(project, "ls x").stdout == b"y\n"
    assert wrapper("echo hello  world").stdout == b"hello world\n"
    assert wrapper("true").returncode == 0 and wrapper("false").returncode == 1
    assert wrapper("rm -rf x").returncode == 0 and not (project / "x").exists()
    assert cluster.remote(project, "ls").stdout == b""
    assert wrapper("rm nothing").returncode == 1
    assert cluster.remote(project, "echo made >a; echo old >b; cat b").stdout == b"old\n"
    assert wrapper("mv -f a b").returncode == 0 and wrapper("touch c").returncode == 0
    assert cluster.remote(project, "cat b; ls").stdout == b"made\nb\nc\n"
    assert (project / "b").read_text() == "made\n" and not (project / "a").exists()
    assert wrapper("mv b c").returncode == 0 and wrapper("rm c").returncode == 0
    wrapper("rm -rf .termite-socket")  # whatever it says, the next line holds
    assert (project / ".termite-socket").exists()


def test_inspect_tells_what_workers_see(cluster: Farm, project: Path) -> None:
    (project / "f").write_text("x")
    result = cluster.command(project, "termite-shell-wrapper", "-inspect", "f", "/etc/shadow", "nothing")
    lines = result.stdout.decode().splitlines()
    assert len(lines) == 3
    assert "mode 100644" in lines[0]
    assert "not there" in lines[2]


def test_the_socket_is_for_its_owner_alone(project: Path) -> None:
    assert (project / ".termite-socket").stat().st_mode & 0o777 == 0o700


def test_programs_explain_themselves() -> None:
    for name in ("coordinator", "worker", "master", "shell-wrapper", "mkbox", "run"):
        result = subprocess.run([PROGRAMS / f"termite-{name}", "--help"], capture_output=True, text=True, check=True)
        assert len(result.stdout.splitlines()) > 5, name
