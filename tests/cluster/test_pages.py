"""The pages of a real farm, as a person with a browser sees them."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import markupsafe
import pytest

from bin.lib.browser import Browser, is_there
from tests.cluster.farm import Farm, Program, wait_for

PASSWORD = "let me <in>"
LABEL = "sleep 60; echo '<b>&amp;'"
PAGE = r"pages at (http://\S+/)"


def address(program: Program) -> str:
    program.wait_log(PAGE)
    return re.findall(PAGE, program.log())[-1]


def ask(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        data: bytes = answer.read()
        return data


class Site:
    """A farm with pages and one command that runs."""

    def __init__(self, farm: Farm) -> None:
        self.farm = farm
        self.coordinator = farm.coordinator("-web-port", "0", "-web-password", PASSWORD)
        self.worker = farm.worker(2, "-web-port", "0")
        self.root = farm.dir / "project"
        self.root.mkdir()
        self.master = farm.master(self.root, "-port", "0")
        self.running: subprocess.Popen[bytes] | None = None

    def run(self, script: str) -> None:
        command = ["termite-shell-wrapper", "-exec", "/bin/sh", "-c", script]
        self.running = subprocess.Popen(command, cwd=self.root, env=self.farm.env, stdin=subprocess.DEVNULL)

    def end(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.wait()


@pytest.fixture
def site(farm: Farm) -> Iterator[Site]:
    site = Site(farm)
    yield site
    site.end()


def test_json_and_metrics_of_all_three_tell_what_runs(site: Site) -> None:
    assert site.farm.remote(site.root, "cp /etc/debian_version made; exit 3").returncode == 3
    site.run(LABEL)
    pages = [address(program) for program in (site.coordinator, site.worker, site.master)]
    wait_for("the command on every page", lambda: all(b"sleep 60" in ask(page + "?json") for page in pages))
    for page in pages:  # without JavaScript, and with every value escaped
        text = ask(page).decode()
        assert str(markupsafe.escape(LABEL)) in text and LABEL not in text
    coordinator, worker, master = (json.loads(ask(page + "?json")) for page in pages)
    assert [len(coordinator["workers"]), len(coordinator["masters"]), coordinator["running"]] == [1, 1, 1]
    assert coordinator["masters"][0]["name"] == worker["mirrors"][0]["master"] == master["name"]
    assert coordinator["workers"][0]["name"] == worker["name"]
    assert f":{coordinator['workers'][0]['web_port']}/" in pages[1]
    assert worker["mirrors"][0]["done"] == 1 and worker["memory_total"] > 0
    assert {"run", "reap"} <= {phase["phase"] for phase in worker["phases"]}
    assert worker["counts"]["bytes from masters"] > 0
    assert [(task["status"], task["worker"]) for task in master["failed"]] == [("exit 3", worker["name"])]
    assert {"dispatch", "run", "replay"} <= {phase["phase"] for phase in master["phases"]}
    assert master["served"]["files"] > 0 and master["told"]["files"] > master["served"]["files"]
    assert master["results"]["files"] >= 1
    metrics = [ask(page + "metrics").decode() for page in pages]
    assert "termite_coordinator_running 1.0" in metrics[0]
    assert "termite_worker_running 1.0" in metrics[1]
    assert 'termite_master_commands_total{outcome="remote"} 1.0' in metrics[2]


def test_the_log_is_on_a_page_from_memory_or_from_the_file(site: Site, tmp_path: Path) -> None:
    assert b"listening on port" in ask(address(site.worker) + "log")
    logged = site.farm.worker(1, "-web-port", "0", "-logfile", str(tmp_path / "log"), ready=False)
    wait_for("the log", lambda: "pages at" in (tmp_path / "log").read_text() if (tmp_path / "log").exists() else False)
    page = re.findall(PAGE, (tmp_path / "log").read_text())[0]
    assert b"listening on port" in ask(page + "log") and str(tmp_path / "log").encode() in ask(page + "log")
    logged.stop()


def test_a_person_clicks_through_all_pages_and_restarts_a_worker(site: Site) -> None:
    if not is_there():
        pytest.skip("chromium or chromedriver is missing; bin/setup -tests installs them")
    site.run(LABEL)
    name = json.loads(ask(address(site.worker) + "?json"))["name"]
    with Browser() as browser:

        def shows(text: str) -> bool:
            return text in browser.text

        browser.open(address(site.coordinator))
        wait_for("the command, without a click", lambda: shows(LABEL))
        assert browser.run("return document.querySelectorAll('b').length") == 0

        browser.click_link(name)
        assert unquote(browser.url) == f"{address(site.coordinator)}worker/{name}"
        wait_for("the command on the coordinator's page of the worker", lambda: shows(LABEL))
        browser.click_link("its page")
        assert browser.url == address(site.worker) and name in browser.title
        wait_for("the mirror and the command", lambda: shows("Mirrors") and shows(LABEL))
        wait_for("curves", lambda: browser.run("return document.querySelectorAll('path.line0').length") == 6)
        browser.click_link("log")
        assert browser.url == f"{address(site.worker)}log" and shows("listening on port")

        browser.open(address(site.master))
        wait_for("the command on the master's page", lambda: shows(LABEL))
        site.end()
        wait_for("its end, without a click", lambda: not shows(LABEL))
        assert browser.console() == []

        browser.open(address(site.coordinator))
        browser.click(f"//button[@value='restart {name}']")
        assert "/command" not in browser.url  # the browser wants the password first
        browser.type("//input[@type='password']", PASSWORD)
        browser.click(f"//button[@value='restart {name}']")
        wait_for("the note", lambda: shows(f"restart: {name}"))
        assert PASSWORD not in browser.url
        site.worker.wait_log("told by the coordinator: restart")
        assert browser.console() == []


class Person:
    """Somebody in front of the coordinator's page, who knows the password."""

    def __init__(self, site: Site, browser: Browser) -> None:
        self.site = site
        self.browser = browser

    def presses(self, command: str, said: str) -> None:
        """A button, and the line that tells of it."""
        self.browser.open(address(self.site.coordinator))
        self.browser.type("//input[@type='password']", PASSWORD)
        self.browser.click(f"//button[@value={json.dumps(command)}]")
        wait_for(f"{said!r} on the page", lambda: said in self.browser.text)

    def sees_workers(self, *names: str) -> None:
        """All of these are listed with their slots, and nobody else."""
        rows = "return [...document.querySelectorAll('main table')][0].innerText"

        def seen() -> list[str]:
            return re.findall(r"^(\S+:\d+)\s+running\b", str(self.browser.run(rows)), re.MULTILINE)

        wait_for(f"{names} on the page, without a click", lambda: sorted(seen()) == sorted(names))


def test_the_buttons_restart_and_end_real_workers_and_lose_no_command(site: Site) -> None:
    if not is_there():
        pytest.skip("chromium or chromedriver is missing; bin/setup -tests installs them")
    farm, first = site.farm, site.worker
    site.run("sleep 4; echo made > made")
    assert site.running is not None
    first.wait_log("is mounted")
    names = [json.loads(ask(address(first) + "?json"))["name"]]
    wait_for("the command on its worker", lambda: b"echo made" in ask(address(first) + "?json"))
    with Browser() as browser:
        person = Person(site, browser)
        person.presses(f"restart {names[0]}", f"restart: {names[0]}")
        first.wait_log("(?s)the worker restarts")
        assert site.running.wait(60) == 0 and (site.root / "made").read_text() == "made\n"
        first.wait_log("(?s)the worker restarts.*listening on port.*coordinator .* reached")
        person.sees_workers(names[0])
        assert farm.remote(site.root, "seq 2; true").stdout == b"1\n2\n"

        second = farm.worker(1, "-web-port", "0")
        names.append(json.loads(ask(address(second) + "?json"))["name"])
        person.sees_workers(*names)
        person.presses("restart", "restart: 2 of 2 workers")
        for worker, times in ((first, 3), (second, 2)):
            wait_for("all of them to begin anew", lambda w=worker, n=times: w.log().count("listening on port") == n)
        person.sees_workers(*names)
        assert farm.remote(site.root, "seq 2; true").stdout == b"1\n2\n"

        site.run("sleep 4; echo again > again")
        wait_for("the command on a worker", lambda: any(b"again" in ask(address(w) + "?json") for w in (first, second)))
        person.presses(f"kill {names[0]}", f"kill: {names[0]}")
        assert site.running.wait(60) == 0 and (site.root / "again").read_text() == "again\n"
        assert first.process.wait(20) == 0
        person.sees_workers(names[1])
        assert farm.remote(site.root, "seq 3; true").stdout == b"1\n2\n3\n"

        person.presses("kill", "kill: 1 of 1 workers")
        assert second.process.wait(20) == 0
        person.sees_workers()
        wait_for("nobody is left, and that is said", lambda: "none: start termite-worker" in browser.text)
        assert browser.console() == []
    assert "lost on" not in site.master.log() and " lost:" not in site.master.log(), site.master.log()
