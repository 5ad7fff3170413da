"""Flags as Go programs have them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from termite import __version__
from termite.cli.flags import (
    Flags,
    HelpWanted,
    format_size,
    parse_bool,
    parse_duration,
    parse_int,
    parse_size,
)
from termite.errors import UsageError


class Example:
    """A program with one flag of each kind."""

    def __init__(self, operands: str = "") -> None:
        self.flags = Flags("termite-example", "Shows how flags are written.", operands)
        self.jobs = self.flags.integer("jobs", 4, "commands to run at once", low=1, high=100)
        self.port = self.flags.port("port", 1233, "where to listen")
        self.secret = self.flags.text("secret", "", "file with the secret", "FILE", "the usual places")
        self.exclude = self.flags.texts("exclude", "directories to hide", "DIR")
        self.xattr = self.flags.switch("xattr", True, "keep hashes")
        self.cachesize = self.flags.size("cachesize", "10G", "largest store", low=1024)
        self.keepalive = self.flags.duration("time.keepalive", "1m30s", "idle time", 1, 3600)
        self.fallback = self.flags.choice("fallback", "local", ["local", "wait", "fail"], "without a worker")
        self.flags.obsolete("heap-size", "Python has no such limit")
        self.flags.obsolete("stderr", "use -logfile", takes_value=False)

    def parse(self, line: str) -> list[str]:
        return self.flags.parse(line.split())


def error(line: str, operands: str = "") -> str:
    with pytest.raises(UsageError) as raised:
        Example(operands).parse(line)
    message = str(raised.value)
    assert message.isprintable()
    assert raised.value.exit_status == 2
    return message


@pytest.mark.parametrize("line", ["-jobs 7", "--jobs 7", "-jobs=7", "--jobs=7", "-jobs 3 -jobs 7"])
def test_one_dash_or_two_and_a_space_or_an_equals_sign_are_the_same(line: str) -> None:
    example = Example()
    assert example.parse(line) == []
    assert example.jobs.value == 7
    assert example.jobs.is_given


def test_what_is_not_given_keeps_its_default() -> None:
    example = Example()
    example.parse("")
    assert (example.jobs.value, example.port.value, example.secret.value, example.exclude.value) == (4, 1233, "", [])
    assert (example.xattr.value, example.cachesize.value, example.keepalive.value) == (True, 10 << 30, 90.0)
    assert example.fallback.value == "local"
    assert not example.jobs.is_given


def test_every_kind_of_value_is_understood() -> None:
    example = Example()
    example.parse("-port 0 -secret key -xattr=false -cachesize 512M -time.keepalive 2m -fallback wait")
    assert (example.port.value, example.secret.value, example.xattr.value) == (0, "key", False)
    assert (example.cachesize.value, example.keepalive.value, example.fallback.value) == (512 << 20, 120.0, "wait")


def test_a_switch_takes_no_word_of_its_own() -> None:
    example = Example("[FILE...]")
    assert example.parse("-xattr false") == ["false"]
    assert example.xattr.value is True


def test_a_list_grows_with_every_mention() -> None:
    example = Example()
    example.parse("-exclude a,b -exclude=c")
    assert example.exclude.value == ["a", "b", "c"]


def test_a_value_may_look_like_a_flag() -> None:
    example = Example()
    example.parse("-secret -x")
    assert example.secret.value == "-x"
    assert example.parse("-secret=a=b") == []
    assert example.secret.value == "a=b"


def test_operands_begin_after_two_dashes_or_at_the_first_word_that_is_no_flag() -> None:
    assert Example("COMMAND...").parse("-jobs 2 -- ninja -j4") == ["ninja", "-j4"]
    assert Example("COMMAND...").parse("-jobs 2 ninja -j4") == ["ninja", "-j4"]
    assert Example("COMMAND...").parse("- -jobs") == ["-", "-jobs"]
    assert Example("COMMAND...").parse("--") == []


def test_where_no_command_line_follows_flags_may_stand_after_operands() -> None:
    flags = Flags("bin/example", "Does things to names.", "[NAME...]", flags_anywhere=True)
    jobs, quick = flags.integer("jobs", 4, "at once"), flags.switch("quick", False, "in a hurry")
    assert flags.parse(["lua", "-quick", "make", "-jobs", "2", "-", "--", "-jobs"]) == ["lua", "make", "-", "-jobs"]
    assert (jobs.value, quick.value) == (2, True)
    with pytest.raises(UsageError, match="unknown flag -quik; did you mean -quick"):
        flags.parse(["lua", "-quik"])


def test_flags_of_the_past_are_accepted() -> None:
    assert Example().parse("-heap-size 16 -stderr") == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-job 4", "unknown flag -job; did you mean -jobs?"),
        ("-jbos=4", "unknown flag -jbos; did you mean -jobs?"),
        ("-keepalive 4", "unknown flag -keepalive; did you mean -time.keepalive?"),
        ("-zzz", "unknown flag -zzz; termite-example -help lists all flags"),
        ("-j4", "unknown flag -j4; "),
        ("-=x", "unknown flag -; "),
        ("---jobs", "unknown flag --jobs; did you mean -jobs?"),
        ("-jobs", "-jobs needs a value: -jobs N; termite-example -help explains it"),
        ("-jobs x", "-jobs x: give a whole number from 1 to 100"),
        ("-jobs=", "-jobs '': give a whole number"),
        ("-jobs 0", "-jobs 0: give a whole number from 1 to 100"),
        ("-jobs 101", "-jobs 101: give a whole number"),
        ("-jobs 4.0", "-jobs 4.0: give a whole number"),
        ("-jobs \u0663", "give a whole number"),
        ("-jobs " + "9" * 5000, "give a whole number"),
        ("-port 65536", "-port 65536: give a whole number from 0 to 65535"),
        ("-port -1", "-port -1: give a whole number"),
        ("-xattr=maybe", "-xattr maybe: give true or false"),
        ("-cachesize big", "-cachesize big: give a number of bytes"),
        ("-cachesize 1", "-cachesize 1: give at least 1K"),
        ("-cachesize 99999999T", "more than any disk holds"),
        ("-time.keepalive soon", "-time.keepalive soon: give seconds"),
        ("-time.keepalive 2h", "-time.keepalive 2h: give a time from 1s to 3600s"),
        ("-fallback never", "-fallback never: give local, wait or fail"),
        ("-exclude a,,b", "-exclude a,,b: there is an empty one in it"),
        ("make", "unexpected make: termite-example takes flags only"),
        ("-jobs \x1b[m", "-jobs \\x1b[m: give"),
    ],
)
def test_whatever_is_wrong_is_one_line_that_says_what_would_be_right(line: str, message: str) -> None:
    assert message in error(line)


def test_help_teaches_every_flag_with_unit_and_default() -> None:
    with pytest.raises(HelpWanted) as raised:
        Example("[COMMAND...]").parse("-jobs 2 -h")
    text = str(raised.value)
    assert text.startswith("usage: termite-example [flags] [COMMAND...]\n")
    for part in (
        "-jobs N\n        commands to run at once (default 4)",
        "-secret FILE\n        file with the secret (default the usual places)",
        "-cachesize SIZE\n        largest store (default 10G)",
        "-time.keepalive TIME\n        idle time (default 1m30s)",
        "-xattr\n        keep hashes (default on)",
        "without a worker: local, wait or fail (default local)",
        "-heap-size TEXT\n        has no effect any more: Python has no such limit",
        "may be repeated",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 110
    for flag in ("--help", "-help", "--h"):
        with pytest.raises(HelpWanted):
            Example().parse(flag)


def test_the_version_is_a_flag_of_every_program() -> None:
    with pytest.raises(HelpWanted, match=f"^termite-example {__version__}$"):
        Example().parse("-version")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("1k", 1024),
        ("512M", 512 << 20),
        ("10G", 10 << 30),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("10GiB", 10 << 30),
        ("10gb", 10 << 30),
        ("7B", 7),
        (" 5M ", 5 << 20),
    ],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(0, (1 << 62) - 1))
def test_a_formatted_size_reads_back_exactly(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("0.5", 0.5),
        ("60s", 60),
        ("1m30s", 90),
        ("500ms", 0.5),
        ("2h", 7200),
        ("1h1m1s", 3661),
        ("1.5s", 1.5),
        (".5s", 0.5),
        ("10us", 1e-5),
        (" 5s ", 5),
    ],
)
def test_times_have_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-5s", "5 s", "1e3", "5d", "1m30", "inf", "nan", "\u0663s", "9" * 40])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "G", "-5", "1e3", "5X", "1.5.2G", "\u0663", "1_000", "9" * 40])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"give|disk"):
        parse_size(text)


@given(st.text(max_size=12))
def test_no_text_is_more_than_a_value_error(text: str) -> None:
    for parse in (parse_size, parse_duration, parse_bool, lambda text: parse_int(text, 0, 9)):
        try:
            parse(text)
        except ValueError:
            pass
