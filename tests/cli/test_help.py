"""Which flags the three daemons have, with one dash and with two, and what --help says of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest

from termite.cli import coordinator, master, worker
from termite.cli.flags import HelpWanted
from termite.errors import UsageError

PREPARE: dict[str, Callable[[Sequence[str]], object]] = {
    "coordinator": coordinator.prepare,
    "worker": worker.prepare,
    "master": master.prepare,
}

# Flag, its value's name in the help ("": a switch), and what stands for its default ("": nothing).
FLAGS: dict[str, list[tuple[str, str, str]]] = {
    "coordinator": [
        ("port", "PORT", "1233"),
        ("web-port", "PORT", "1230"),
        ("web-password", "TEXT", "nobody can"),
        ("secret", "FILE", "$TERMITE_SECRET, ~/.config/termite/secret or /etc/termite/secret"),
        ("logfile", "FILE", "stderr"),
        ("listen", "ADDRESS", "all addresses of this machine"),
        ("version", "", ""),
    ],
    "worker": [
        ("secret", "FILE", "$TERMITE_SECRET, ~/.config/termite/secret or /etc/termite/secret"),
        ("coordinator", "HOST:PORT", "port 1233"),
        ("port", "PORT", "1232"),
        ("port-retry", "N", "10"),
        ("jobs", "N", "the number of cores"),
        ("cachedir", "DIR", "/var/cache/termite"),
        ("cachesize", "SIZE", "10G"),
        ("tmpdir", "DIR", "/var/tmp"),
        ("user", "NAME", "nobody"),
        ("mkbox_path", "FILE", "termite-mkbox beside this program"),
        ("logfile", "FILE", "stderr"),
        ("stderr", "FILE", "stderr"),
        ("paranoia", "", ""),
        ("heap-size", "SIZE", "0"),
        ("reap-count", "N", "0"),
        ("cpus", "TEXT", ""),
        ("web-port", "PORT", "100 above the one for masters"),
        ("time.drain", "TIME", "5m"),
        ("version", "", ""),
    ],
    "master": [
        ("secret", "FILE", "$TERMITE_SECRET, ~/.config/termite/secret or /etc/termite/secret"),
        ("coordinator", "HOST:PORT", ""),
        ("jobs", "N", "twice the cores"),
        ("socket", "FILE", "./.termite-socket"),
        ("sourcedir", "DIR", ""),
        ("cachedir", "DIR", "~/.cache/termite"),
        ("exclude", "DIR", ""),
        ("fetch-all", "", ""),
        ("xattr", "", "on"),
        ("retry", "N", "3"),
        ("port", "PORT", "1231"),
        ("logfile", "FILE", "stderr"),
        ("paranoia", "", ""),
        ("time.household", "TIME", "5s"),
        ("time.keepalive", "TIME", "60s"),
        ("fallback", "WORD", "local"),
        ("version", "", ""),
    ],
}
INSTEAD = {("worker", "cpus"): "-jobs says how many"}
CASES = [(program, *flag) for program, flags in FLAGS.items() for flag in flags]


def help_of(program: str, *args: str) -> str:
    with pytest.raises(HelpWanted) as wanted:
        PREPARE[program]([*args, "--help"])
    return str(wanted.value)


@pytest.mark.parametrize(("program", "flag", "unit", "default"), CASES)
def test_a_flag_is_taken_with_one_dash_or_two_and_explained(program: str, flag: str, unit: str, default: str) -> None:
    text = help_of(program)
    found = re.search(rf"^  -{re.escape(flag)}(?: (\S+))?\n((?:        .*\n)+)", text, re.MULTILINE)
    assert found is not None, text
    assert (found[1] or "") == unit
    explained = " ".join(found[2].split())
    assert len(explained) > 15
    if default:
        assert f"(default {default})" in explained, explained
    instead = INSTEAD.get((program, flag))
    assert ("has no effect any more" in explained) == (instead is not None)
    assert instead is None or instead in explained
    for dashes in ("-", "--"):
        value = {"web-port": "0", "fallback": "wait"}.get(flag, "16" if unit in ("N", "PORT") else "20m")
        given = [f"{dashes}{flag}", *([value] if unit else [])]
        assert help_of(program, *given).startswith(f"usage: termite-{program}")


@pytest.mark.parametrize("program", PREPARE)
def test_help_and_an_unknown_flag_are_the_same_everywhere(program: str) -> None:
    assert help_of(program).startswith(f"usage: termite-{program} [flags]\n")
    with pytest.raises(UsageError, match="unknown flag -secrets; did you mean -secret"):
        PREPARE[program](["--secrets", "x"])
