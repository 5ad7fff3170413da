"""`.termite-localrc` decides where commands run, and the mirrors see what local ones did."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.farm import Farm

DEFAULT = [{"Regexp": ".*termite-make", "Local": True, "Recurse": True, "SkipRefresh": True}]


@pytest.fixture
def farm() -> Iterator[Farm]:
    farm = Farm()
    farm.coordinator()
    farm.worker(2)
    yield farm
    farm.close()


def project(farm: Farm, rules: list[dict[str, object]], makefile: str) -> Path:
    root = farm.dir / "project"
    root.mkdir()
    (root / ".termite-localrc").write_text("# rules\n// of this test\n" + json.dumps(rules))
    (root / "Makefile").write_text(makefile)
    farm.master(root, "-fallback=fail")
    return root


def counts(farm: Farm, root: Path) -> dict[str, int]:
    status = farm.command(root, "termite-shell-wrapper", "-inspect")
    found: dict[str, int] = json.loads(status.stdout)["counts"]
    return found


def test_what_a_local_command_writes_is_seen_by_the_next_remote_one(farm: Farm) -> None:
    root = project(
        farm,
        [*DEFAULT, {"Regexp": "^python3 ", "Local": True}],
        "all: b\n\tcat b d/e > all\nb: a\n\tcat a > b\na:\n\tpython3 -c 'import os; open(\"a\", \"w\").write(\"1\"); "
        'os.makedirs("d"); open("d/e", "w").write("2")\'\n',
    )
    result = farm.make(root, "-j2")
    assert result.returncode == 0, result.stderr
    assert (root / "all").read_text() == "12"
    (root / "all").unlink()
    (root / "b").unlink()
    (root / "a").unlink()
    (root / "d" / "e").unlink()
    (root / "d").rmdir()
    assert farm.make(root, "-j2").returncode == 0
    assert counts(farm, root)["local by rule"] == 2


def test_a_local_command_sees_the_machine_it_was_started_on(farm: Farm) -> None:
    root = project(farm, [{"Regexp": "LOCAL", "Local": True}], "all: l r\nl:\n\t@id -u > l; : LOCAL\nr:\n\t@id -u > r; : x\n")
    assert farm.make(root).returncode == 0
    assert (root / "l").read_text() == f"{os.getuid()}\n"
    assert (root / "r").read_text() != "0\n"


@pytest.mark.parametrize("recurse", [True, False])
def test_recurse_says_whether_what_a_local_command_starts_may_leave(farm: Farm, recurse: bool) -> None:
    root = project(
        farm,
        [{"Regexp": "termite-make", "Local": True, "Recurse": recurse, "SkipRefresh": True}],
        "all:\n\t$(MAKE) inner\ninner:\n\tid -u > inner\n",
    )
    result = farm.make(root)
    assert result.returncode == 0, result.stderr
    assert ((root / "inner").read_text() == f"{os.getuid()}\n") is not recurse


def test_lto_with_the_jobserver_works_by_a_local_rule(farm: Farm) -> None:
    root = project(
        farm,
        [*DEFAULT, {"Regexp": "-flto=jobserver", "Local": True}],
        "all: p\np: a.o b.o\n\t+gcc -O2 -flto=jobserver -o $@ $^\n%.o: %.c\n\tgcc -O2 -flto -c -o $@ $<\n",
    )
    (root / "a.c").write_text("int f(int); int main(void) { return f(1); }\n")
    (root / "b.c").write_text("int f(int x) { return x + 41; }\n")
    result = farm.make(root, "-j2")
    assert result.returncode == 0, result.stderr
    assert b"jobserver" not in result.stderr, result.stderr
    assert farm.command(root, "./p").returncode == 42
    assert counts(farm, root)["local by rule"] == 1


def test_a_rule_file_that_breaks_while_the_master_runs_fails_the_make_with_the_reason(farm: Farm) -> None:
    root = project(farm, DEFAULT, "all:\n\techo x > x\n")
    (root / ".termite-localrc").write_text("[{")
    result = farm.make(root)
    assert result.returncode != 0
    assert b".termite-localrc" in result.stderr
    (root / ".termite-localrc").write_text(json.dumps(DEFAULT))
    assert farm.make(root).returncode == 0


def test_a_command_that_is_to_be_watched_is_in_both_logs_under_its_id(cluster: Farm, project: Path) -> None:
    master = cluster.programs[-1]
    (project / ".termite-localrc").write_text('[{"Regexp": "watched", "Local": false, "Debug": true}, {"Regexp": ".*"}]')
    assert cluster.remote(project, "echo quiet >quiet; true").returncode == 0
    assert cluster.remote(project, "echo watched >made; rm -f quiet; exit 3").returncode == 3
    env = {"TERMITE_DEBUG": "1", "MAKE_TARGET": "prog", "MAKE_DEPS": "a.o b.o"}
    shown = cluster.command(project, "termite-shell-wrapper", "-exec", "/bin/sh", "-c", "seq 2; true", env=env)
    assert shown.stdout == b"1\n2\n"
    log = master.log()
    assert "quiet >quiet" not in log
    decided = re.findall(r" I master.task: task (\d+): (not local, .*)", log)
    assert len(decided) == 2
    (first, by_rule), (second, by_environment) = decided
    assert by_rule.startswith("not local, rule 'watched'; pid ") and "watched >made" in by_rule
    assert f"in {project}, target prog, from a.o b.o: " in by_environment and "rule '.*'" in by_environment
    assert re.search(rf"task {first}: status 768, [\d.]+ ms, on \S+: ", log)
    (changed,) = re.findall(rf"task {first}: changed (.*)", log)
    assert set(changed.split(", ")) - {str(project)} == {f"{project}/made", f"-{project}/quiet"}
    assert f"task {second}: changed nothing\n" in log
    workers = [program.log() for program in cluster.programs if program.name == "termite-worker"]
    for number, status, files in ((first, 768, "[23]"), (second, 0, "0")):  # the project's directory may be one
        line = rf"task {number}: status {status}, [\d.]+ ms in its box, {files} files\n"
        assert any(re.search(line, text) for text in workers), line
