"""Commands that run at the same time and change the same places; and what builds say at their end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cluster.farm import Farm, tree, wait_for


def together(cluster: Farm, project: Path, *scripts: str) -> list[subprocess.CompletedProcess[bytes]]:
    """Runs the scripts as commands of their own that all run at the same time."""
    with ThreadPoolExecutor(len(scripts)) as pool:
        return list(pool.map(lambda script: cluster.remote(project, script), scripts))


def overlapping(script: str) -> str:
    """A script that runs long enough for its neighbours to have been started before it ends."""
    return f"sleep 0.7; {script}"


def log_of(cluster: Farm) -> str:
    return next(p for p in reversed(cluster.programs) if p.name == "termite-master").log()


def test_two_commands_that_fill_one_directory_both_leave_their_files(cluster: Farm, project: Path) -> None:
    results = together(
        cluster,
        project,
        *(overlapping(f"mkdir -p d/e && for i in 1 2 3; do echo {n} >d/e/{n}-$i; done") for n in range(4)),
    )
    assert [r.returncode for r in results] == [0] * 4, [r.stderr for r in results]
    expected = {b"d", b"d/e", *(b"d/e/%d-%d" % (n, i) for n in range(4) for i in (1, 2, 3))}
    assert set(tree(project)) == expected
    assert b"".join(r.stderr for r in results) == b"", "directories are no matter of conflict"


def test_mkdir_races_end_as_some_order_would(cluster: Farm, project: Path) -> None:
    results = together(cluster, project, *(overlapping("mkdir d; echo x >d/$$") for _ in range(4)))
    assert all(r.returncode == 0 for r in results)
    assert (project / "d").is_dir() and (project / "d").stat().st_mode & 0o777 == 0o755


def test_two_commands_that_write_one_file_are_both_named_and_the_last_one_wins(cluster: Farm, project: Path) -> None:
    results = together(cluster, project, *(overlapping(f"echo {name} >out") for name in ("one", "two")))
    assert [r.returncode for r in results] == [0, 0]
    told = [r.stderr.decode() for r in results if r.stderr]
    assert len(told) == 1, "the later one's caller is told"
    line = told[0].strip()
    assert line.startswith(f"termite: {project}/out was changed by two commands that ran at the same time")
    assert "echo one >out" in line and "echo two >out" in line
    found = re.search(r"what task (\d+) left is there now", line)
    assert found
    winner = re.search(rf"task {found[1]} \((.*?)\)", line)
    assert winner
    assert (project / "out").read_text().strip() in winner[1]
    assert line.removeprefix("termite: ") in log_of(cluster)
    inspected = cluster.command(project, "termite-shell-wrapper", "-inspect").stdout
    assert json.loads(inspected)["conflicts"] == [line.removeprefix("termite: ")]


def test_writers_one_after_the_other_are_no_conflict(cluster: Farm, project: Path) -> None:
    for name in ("one", "two"):
        assert cluster.remote(project, f"echo {name} >out").stderr == b""
    assert (project / "out").read_text() == "two\n"


def test_a_command_that_deletes_what_another_creates_ends_as_some_order_would(cluster: Farm, project: Path) -> None:
    for _ in range(3):
        (project / "d").mkdir(exist_ok=True)
        (project / "d" / "old").touch()
        (project / "d" / "new").unlink(missing_ok=True)
        assert cluster.command(project, "termite-shell-wrapper", "-refresh").returncode == 0
        writer, remover = together(cluster, project, overlapping("echo new >d/new"), overlapping("rm -rf d"))
        assert remover.returncode == 0
        names = set(tree(project))
        if writer.returncode:
            assert names == set() and b"d/new" in writer.stderr, "it began when d was gone already"
        else:
            assert names in ({b"d", b"d/new"}, set()), "never the old file"
        if names:
            assert (project / "d" / "new").read_text() == "new\n"


def test_many_commands_at_once_leave_a_tree_as_any_serial_order_would(cluster: Farm, project: Path) -> None:
    (project / "Makefile").write_text(
        "N := $(shell seq 1 24)\nall: $(N:%=out/%/x)\n"
        "out/%/x:\n\tmkdir -p out/$* tmp && echo $* >tmp/$*.tmp && mv tmp/$*.tmp $@ && rm -rf tmp/$*.tmp\n"
    )
    result = cluster.make(project, "-j8")
    assert result.returncode == 0, result.stderr
    assert {path.parent.name: path.read_text() for path in project.glob("out/*/x")} == {
        str(n): f"{n}\n" for n in range(1, 25)
    }
    assert list((project / "tmp").iterdir()) == []


def test_the_master_answers_nothing_itself_while_a_large_result_is_put_into_the_tree(
    cluster: Farm, project: Path
) -> None:
    files, made = 3000, 0
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(cluster.remote, project, f"mkdir d; for i in $(seq {files}); do echo $i >d/$i; done")
        while not large.done():
            made += 1
            assert cluster.remote(project, f"mkdir made-{made}").returncode == 0
        assert large.result().returncode == 0
    assert len(list((project / "d").iterdir())) == files
    assert len(list(project.glob("made-*"))) == made
    counts = json.loads(cluster.command(project, "termite-shell-wrapper", "-inspect").stdout)["counts"]
    assert counts["answered by the master"] and counts["remote"] >= 2, "the mkdir that came meanwhile was sent"


def test_rm_rf_stops_at_symlinks_and_at_the_project(cluster: Farm, project: Path) -> None:
    outside = cluster.dir / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    (project / "d").mkdir()
    (project / "d" / "out").symlink_to(outside)
    (project / "link").symlink_to(outside)
    assert cluster.remote(project, "rm -rf d link").returncode == 0
    assert cluster.remote(project, f"rm -rf {outside}/precious").returncode != 0
    assert cluster.remote(project, "cd /; rm -rf . >/dev/null 2>&1; true").returncode == 0
    assert (outside / "precious").read_text() == "kept"
    assert (project / ".termite-socket").is_socket()
    assert (project / "d").exists() is False and not os.path.lexists(project / "link")


# -- the end of a build ------------------------------------------------------------------------------


def builds(cluster: Farm, project: Path) -> dict[str, object]:
    shown = json.loads(cluster.command(project, "termite-shell-wrapper", "-inspect").stdout)
    found: dict[str, object] = shown["builds"]
    return found


MAKEFILE = """\
all: a b local
	mkdir -p d
a b:
	echo $@ | tr a-z A-Z >$@
local:
	echo here; : local-only
sub:
	$(MAKE) all
"""


def test_a_make_ends_with_one_line_that_says_where_its_commands_ran(cluster: Farm, project: Path) -> None:
    (project / "Makefile").write_text(MAKEFILE)
    (project / ".termite-localrc").write_text('[{"Regexp": ".*local-only", "Local": true}, {"Regexp": ".*"}]')
    result = cluster.make(project, "-j2")
    assert result.returncode == 0, result.stderr
    line = result.stderr.decode().splitlines()[-1]
    assert re.fullmatch(
        r"termite: 4 commands: 2 on [12] workers?, 1 answered by the master, 1 here \(1 by rule\); "
        r"[\d.]+ \w+ sent, 4 bytes received, [\d.]+ s",
        line,
    ), result.stderr
    wait_for("the end of the build in the master's log", lambda: "ended: 4 commands" in log_of(cluster))
    last = builds(cluster, project)["last"]
    assert isinstance(last, dict)
    assert last["counts"] == {"remote": 2, "answered by the master": 1, "local by rule": 1}


def test_recursive_makes_belong_to_the_topmost_one(cluster: Farm, project: Path) -> None:
    (project / "Makefile").write_text(MAKEFILE)
    result = cluster.make(project, "sub")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.decode().splitlines() if " commands: " in line]
    assert len(lines) == 1 and "1 here (1 by rule)" in lines[0], "the recursive make itself ran here"
    again = cluster.make(project, "--version")
    assert again.returncode == 0 and again.stderr == b"", "nothing ran: nothing to say"


def test_a_make_that_is_killed_leaves_its_line_in_the_log(cluster: Farm, project: Path) -> None:
    (project / "Makefile").write_text("all:\n\techo early >early\n\tsleep 300\n")
    make = subprocess.Popen(["termite-make"], cwd=project, env=cluster.env, stderr=subprocess.DEVNULL)
    wait_for("the first file", (project / "early").exists)
    make.send_signal(signal.SIGTERM)
    assert make.wait(20) == -signal.SIGTERM
    wait_for("its end in the log", lambda: f"build {make.pid}: ended: " in log_of(cluster))
    assert builds(cluster, project)["running"] == 0


def test_a_session_ends_with_the_line_too(farm: Farm) -> None:
    root = farm.dir / "alone"
    root.mkdir()
    (root / "Makefile").write_text("all:\n\techo hi | tr a-z A-Z >out\n")
    result = farm.make(root, limit_s=100)
    assert result.returncode == 0, result.stderr
    assert result.stderr.decode().splitlines()[-1].startswith("termite: 1 command: 1 on 1 worker; "), result.stderr
