"""Command lines as Go programs have them: -jobs 4, --jobs 4, -jobs=4, -time.keepalive 1m30s.

Each flag is made once and holds its own value, with its own type:

    flags = Flags("termite-worker", "Offers this machine's cores.")
    jobs = flags.integer("jobs", 4, "commands to run at once", low=1)
    flags.parse(argv)
    ... jobs.value ...

Whatever is wrong is a one-line `UsageError`; `-h` is `HelpWanted`, whose text goes to stdout.
Names are never abbreviated: a new flag must not change what an old command line means.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

from termite import __version__
from termite.errors import UsageError

T = TypeVar("T")

_WIDTH = 100
_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TIME_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_TIME_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(h|ms|us|m|s)", re.ASCII)
_PLAIN_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}", re.ASCII)


class HelpWanted(Exception):
    """Not a failure: print the text and end with status 0."""


class Flag(Generic[T]):
    """One flag; `value` is the default until `parse` has seen it on the command line."""

    def __init__(self, name: str, default: T, help: str, convert: Callable[[str], T], unit: str, shown: str) -> None:
        self.name = name
        self.value = default
        self.is_given = False
        self.help = help
        self.convert = convert  # from text; ValueError says what would be right
        self.unit = unit  # what the value is, one word for the help; empty for switches
        self.shown = shown  # the default, for people; empty: not worth a word

    def take(self, text: str) -> None:
        try:
            self.value = self.convert(text)
        except ValueError as error:
            raise UsageError(f"-{self.name} {_shown(text)}: {error}") from None
        self.is_given = True


class Flags:
    """The flags of one program.

    `flags_anywhere`: also after operands; not for programs whose operands are somebody else's command line.
    """

    def __init__(self, program: str, about: str, operands: str = "", *, flags_anywhere: bool = False) -> None:
        self.program = program
        self._about = about
        self._operands_shown = operands  # how operands are written in the usage line; empty: there are none
        self._flags_anywhere = flags_anywhere
        self._flags: dict[str, Flag[Any]] = {}
        self._obsolete: list[str] = []
        self._version = self.switch("version", False, "print the version and end")

    # -- kinds of flags ------------------------------------------------------------------------------

    def text(self, name: str, default: str, help: str, unit: str = "TEXT", shown: str = "") -> Flag[str]:
        return self._add(Flag(name, default, help, str, unit, shown or default))

    def texts(self, name: str, help: str, unit: str = "TEXT") -> Flag[list[str]]:
        """May be given more than once, and commas separate several."""
        flag: Flag[list[str]] = Flag(name, [], help + "; may be repeated, or hold several with commas", list, unit, "")
        flag.convert = lambda text: [*flag.value, *_comma_separated(text)]
        return self._add(flag)

    def switch(self, name: str, default: bool, help: str) -> Flag[bool]:
        return self._add(Flag(name, default, help, parse_bool, "", "on" if default else ""))

    def integer(
        self, name: str, default: int, help: str, low: int = 0, high: int = 1 << 31, unit: str = "N", shown: str = ""
    ) -> Flag[int]:
        return self._add(
            Flag(name, default, help, lambda text: parse_int(text, low, high), unit, shown or str(default))
        )

    def port(self, name: str, default: int, help: str) -> Flag[int]:
        return self.integer(name, default, f"{help}; 0: any free one", 0, 65535, "PORT")

    def page_port(self, name: str, default: int, help: str, shown: str = "") -> Flag[int | None]:
        """None: no pages, which is written "off"."""

        def convert(text: str) -> int | None:
            try:
                return None if text == "off" else parse_int(text, 0, 65535)
            except ValueError as error:
                raise ValueError(f"{error}, or off") from None

        help = f"{help}; 0: any free one, as when the default is taken; off: no pages"
        return self._add(Flag(name, default, help, convert, "PORT", shown or str(default)))

    def size(self, name: str, default: str, help: str, low: int = 0) -> Flag[int]:
        """Bytes; the default is written as a user would write it."""
        return self._add(Flag(name, parse_size(default), help, lambda text: parse_size(text, low), "SIZE", default))

    def duration(self, name: str, default: str, help: str, low_s: float = 0.0, high_s: float = 1e9) -> Flag[float]:
        """Seconds; the default is written as a user would write it."""
        return self._add(
            Flag(name, parse_duration(default), help, lambda text: parse_duration(text, low_s, high_s), "TIME", default)
        )

    def choice(self, name: str, default: str, choices: Sequence[str], help: str) -> Flag[str]:
        def convert(text: str) -> str:
            if text not in choices:
                raise ValueError(f"give {_either(choices)}")
            return text

        return self._add(Flag(name, default, f"{help}: {_either(choices)}", convert, "WORD", default))

    def obsolete(self, name: str, instead: str, takes_value: bool = True) -> None:
        """Accepted and without effect; `instead` tells what takes its place."""
        help = f"has no effect any more: {instead}"
        if takes_value:
            self._add(Flag(name, "", help, str, "TEXT", ""))
        else:
            self._add(Flag(name, False, help, parse_bool, "", ""))

    # -- the command line ----------------------------------------------------------------------------

    def parse(self, argv: Sequence[str]) -> list[str]:
        """Sets the flags and returns the operands: what follows `--`, or begins at the first word that is no flag."""
        words = list(argv)
        operands: list[str] = []
        while words:
            word = words.pop(0)
            if word == "--":
                break
            if not word.startswith("-") or word == "-":
                operands.append(word)
                if self._flags_anywhere:
                    continue
                break
            name, equals, text = word.removeprefix("-").removeprefix("-").partition("=")
            if name in ("h", "help"):
                raise HelpWanted(self.help())
            flag = self._flags.get(name)
            if flag is None:
                raise UsageError(self._unknown(name))
            if equals:
                flag.take(text)
            elif not flag.unit:
                flag.take("true")
            elif words:
                flag.take(words.pop(0))
            else:
                raise UsageError(f"-{name} needs a value: -{name} {flag.unit}; {self.program} -help explains it")
        if self._version.value:
            raise HelpWanted(f"{self.program} {__version__}")
        operands += words
        if operands and not self._operands_shown:
            raise UsageError(f"unexpected {_shown(operands[0])}: {self.program} takes flags only; -help lists them")
        return operands

    def help(self) -> str:
        """All there is to know, as text."""
        operands = f" {self._operands_shown}" if self._operands_shown else ""
        paragraphs = [f"usage: {self.program} [flags]{operands}", textwrap.fill(self._about, _WIDTH), "Flags:"]
        return "\n\n".join(paragraphs) + "\n" + "\n".join(_explained(flag) for flag in self._sorted()) + "\n\n" + _NOTES

    def _sorted(self) -> list[Flag[Any]]:
        return sorted(self._flags.values(), key=lambda flag: flag.name)

    def _unknown(self, name: str) -> str:
        near = get_close_matches(name, self._flags, 1, 0.6)
        hint = f"did you mean -{near[0]}?" if near else f"{self.program} -help lists all flags"
        return f"unknown flag {_shown('-' + name)}; {hint}"

    def _add(self, flag: Flag[T]) -> Flag[T]:
        assert flag.name not in self._flags, flag.name
        self._flags[flag.name] = flag
        return flag


_NOTES = (
    "One dash or two, and `-flag value` or `-flag=value`, are the same; a switch is turned off with -flag=false.\n"
    "SIZE is bytes or has a unit: 512M, 10G.  TIME is seconds or has units: 90, 1m30s, 500ms."
)


def parse_bool(text: str) -> bool:
    match text.lower():
        case "true" | "t" | "1" | "yes" | "on":
            return True
        case "false" | "f" | "0" | "no" | "off":
            return False
    raise ValueError("give true or false")


def parse_int(text: str, low: int, high: int) -> int:
    if not _WHOLE_NUMBER.fullmatch(text) or not low <= int(text) <= high:
        raise ValueError(f"give a whole number from {low} to {high}")
    return int(text)


def parse_size(text: str, low: int = 0) -> int:
    """Bytes: 1000, 512M, 1.5G, 10GiB; units are powers of 1024."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or len(text) > 30:
        raise ValueError("give a number of bytes, or one with a unit: 512M, 10G")
    size = (
        int(float(found[1]) * _SIZE_UNITS[found[2].upper()])
        if "." in found[1]
        else (int(found[1]) * _SIZE_UNITS[found[2].upper()])
    )
    if not low <= size < 1 << 62:
        raise ValueError(f"give at least {format_size(low)}" if size < low else "that is more than any disk holds")
    return size


def format_size(size: int) -> str:
    """As `parse_size` reads it, exactly."""
    for unit in ("T", "G", "M", "K"):
        if size and size % _SIZE_UNITS[unit] == 0:
            return f"{size // _SIZE_UNITS[unit]}{unit}"
    return str(size)


def parse_duration(text: str, low_s: float = 0.0, high_s: float = 1e9) -> float:
    """Seconds: 90, 0.5, 60s, 1m30s, 500ms, 2h."""
    text = text.strip()
    parts = list(_TIME_PART.finditer(text))
    if _PLAIN_NUMBER.fullmatch(text) and len(text) <= 30:
        seconds = float(text)
    elif parts and len(text) <= 30 and "".join(part[0] for part in parts) == text:
        seconds = sum(float(part[1]) * _TIME_UNITS[part[2]] for part in parts)
    else:
        raise ValueError("give seconds, or a time with units: 90, 1m30s, 500ms")
    if not low_s <= seconds <= high_s:
        raise ValueError(f"give a time from {low_s:g}s to {high_s:g}s")
    return seconds


def _comma_separated(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError("there is an empty one in it")
    return parts


def _explained(flag: Flag[Any]) -> str:
    head = f"  -{flag.name} {flag.unit}".rstrip()
    default = f" (default {flag.shown})" if flag.shown else ""
    body = textwrap.fill(flag.help + default, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return f"{head}\n{body}"


def _either(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def _shown(text: str) -> str:
    """What a user typed, as part of one line."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:80])
    return shown if shown and " " not in shown else f"'{shown}'"
