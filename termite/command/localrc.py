"""Which commands run on this machine instead of on a worker: the rules of `.termite-localrc`.

The file is a JSON array of objects with the fields Regexp, Local, Recurse, SkipRefresh and Debug
(names in any case, as Go's JSON reads them); lines that begin with `#` or `//` are skipped.  The
first rule whose expression is found anywhere in the command decides; a command that none matches
runs on a worker.  Expressions are RE2, the syntax of Go.  A file that does not parse is a
`RuleError` with file, line and reason, never a guess.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import re2

from termite import paths
from termite.errors import RuleError

NAME = b".termite-localrc"
MAX_BYTES = 1 << 20
"""A larger file is not a list of rules."""
REMEMBERED_COMMANDS = 4096
"""Decisions that are kept; a build repeats its commands, and an expression may be slow on a long one."""
MAX_REMEMBERED_BYTES = 16384
"""Longer commands (a link line with thousands of objects) are decided anew each time."""
UNSETTLED_NS = 100_000_000
"""A file changed this recently may change again within the same time stamp: it is read again."""

_WORKING_SET_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Decision:
    """How one command is to be run."""

    local: bool  # on this machine
    recurse: bool = False  # local, and what it starts comes back to the master (a recursive make)
    skip_refresh: bool = False  # local, and known to change no file
    debug: bool = False  # log what happens to this command
    rule: str = ""  # the expression that decided; empty: none matched


@dataclass(frozen=True, slots=True)
class Rule:
    """One object of the file, its expression compiled."""

    pattern: Any  # a compiled re2 expression
    decision: Decision
    line: int  # where it begins in the file; 0: built in


REMOTE = Decision(local=False)
"""The decision when no rule matches."""


class Rules:
    """A list of rules, asked about one command after the other.  Loop only."""

    def __init__(self, rules: list[Rule]) -> None:
        self.rules = tuple(rules)
        self._known: dict[bytes, Decision] = {}

    def decide(self, command: bytes) -> Decision:
        known = self._known.get(command)
        if known is not None:
            return known
        decision = self._first_match(_as_utf8(command))
        if len(command) <= MAX_REMEMBERED_BYTES:
            if len(self._known) >= REMEMBERED_COMMANDS:
                del self._known[next(iter(self._known))]
            self._known[command] = decision
        return decision

    def _first_match(self, text: bytes) -> Decision:
        for rule in self.rules:
            if rule.pattern.search(text) is not None:
                return rule.decision
        return REMOTE


class RulesFile:
    """The rules of one file, read again whenever it changes: one `stat` per question."""

    def __init__(self, path: bytes) -> None:
        self.path = path
        self._signature: object = None  # of the file as last read; None: look again
        self._loaded: Rules | RuleError | None = None

    def current(self) -> Rules:
        """The rules as the file stands now, the default ones while there is none.

        A file that was broken by an edit is a `RuleError` at every question until it is repaired:
        running commands by rules that the user has just replaced would be worse.
        """
        signature = self._look()
        if self._loaded is None or signature is None or signature != self._signature:
            try:
                self._loaded = load_rules(self.path)
            except RuleError as error:
                self._loaded = error
            self._signature = signature
        if isinstance(self._loaded, RuleError):
            raise RuleError(str(self._loaded))
        return self._loaded

    def _look(self) -> object:
        try:
            st = os.stat(self.path)
        except OSError as error:
            return error.errno
        if time.time_ns() - st.st_ctime_ns < UNSETTLED_NS:
            return None
        return st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns


def load_rules(path: bytes) -> Rules:
    """The rules of the file at `path`; the default ones if there is no such file."""
    shown = paths.for_people(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise RuleError(f"{shown}: not a file; remove it or put a JSON array of rules there")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return default_rules()
    except OSError as error:
        raise RuleError(f"{shown}: {error.strerror}; make it readable or remove it") from None
    if len(data) > MAX_BYTES:
        raise RuleError(f"{shown}: larger than {MAX_BYTES} bytes, so not a list of rules; remove it or shorten it")
    return parse_rules(data, shown)


def default_rules() -> Rules:
    """Recursive makes run here, everything else on workers."""
    return Rules(
        [
            _rule(".*termite-make", Decision(local=True, recurse=True, skip_refresh=True), 0),
            _rule(".*", Decision(local=False), 0),
        ]
    )


def parse_rules(data: bytes, shown: str) -> Rules:
    """The rules in `data`; `shown` names the file in errors."""
    return _Reader(data, shown).rules()


class _Reader:
    """Reads the array and its objects by hand, so that every complaint has its line; values are left to `json`."""

    _SPACE = re.compile(r"[ \t\r\n]*")

    def __init__(self, data: bytes, shown: str) -> None:
        self._shown = shown
        self._at = 0
        self._text = ""
        self._json = json.JSONDecoder()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise RuleError(f"{shown}:{line}: not UTF-8 text; save the file as UTF-8") from None
        # Skipped lines stay as empty ones, so that line numbers are those of the file.
        self._text = "\n".join("" if line.lstrip().startswith(("#", "//")) else line for line in text.split("\n"))

    def rules(self) -> Rules:
        if self._peek() == "":
            raise self._error("no rules in it; write a JSON array such as [], or remove the file for the default rules")
        self._expect("[", "a JSON array of rules")
        found = [self._one_rule() for _ in self._items("]")]
        if self._peek():
            raise self._error("something follows the closing ]; remove it", self._at)
        return Rules(found)

    def _items(self, end: str) -> Iterator[None]:
        """Steps through the commas of an array or object up to `end`."""
        if self._peek() == end:
            self._at += 1
            return
        while True:
            yield
            after = self._peek()
            if after not in (",", end):
                raise self._error(f"expected , or {end} here; {self._what_is_here()}", self._at)
            comma = self._at
            self._at += 1
            if after == end:
                return
            if self._peek() == end:
                raise self._error(f"a comma before the closing {end}; remove the comma", comma)

    def _one_rule(self) -> Rule:
        self._peek()
        start = self._at
        self._expect("{", 'a rule, such as {"Regexp": "^cmake ", "Local": true}')
        values: dict[str, str | bool] = {}
        pattern_at = start
        for _ in self._items("}"):
            self._peek()
            name_at = self._at
            name = self._field_name()
            if name in values:
                raise self._error(f"{name} is given twice in one rule; remove one of them", name_at)
            self._expect(":", f"a colon after {name}")
            self._peek()
            pattern_at = self._at if name == "Regexp" else pattern_at
            values[name] = self._value(name)
        expression = values.pop("Regexp", None)
        if not isinstance(expression, str):
            raise self._error('a rule without Regexp; add "Regexp": ".*" if it is meant for every command', start)
        local, recurse, skip_refresh, debug = (values.get(name) is True for name in _FIELDS[1:])
        try:
            return _rule(expression, Decision(local, recurse, skip_refresh, debug), self._line(start))
        except ValueError as error:
            reason = f"{error}; expressions are RE2 (no look-around, no back-references)"
            raise self._error(reason, pattern_at) from None

    def _field_name(self) -> str:
        at = self._at
        given = self._raw("a field name in double quotes")
        if not isinstance(given, str):
            raise self._error(f"expected a field name in double quotes; {self._what_is_here()}", at)
        for name in _FIELDS:
            if name.casefold() == given.casefold():
                return name
        raise self._error(f"unknown field {_short(given)}; the fields are {', '.join(_FIELDS)}", at)

    def _value(self, name: str) -> str | bool:
        at = self._at
        wanted, example = (str, "a string") if name == "Regexp" else (bool, "true or false")
        value = self._raw(example)
        if not isinstance(value, wanted):
            raise self._error(f"{name} must be {example}, not {_short(value)}", at)
        return value

    def _raw(self, wanted: str) -> Any:
        """The JSON value that stands here."""
        try:
            value, self._at = self._json.raw_decode(self._text, self._at)
        except json.JSONDecodeError as error:
            if self._at >= len(self._text):
                raise self._error(f"the file ends where {wanted} should be; complete it") from None
            if error.pos > self._at or self._text[self._at] == '"':
                what = error.msg[:1].lower() + error.msg[1:].removesuffix(" starting at")
                reason = f"{what}; a string is one line in double quotes, backslashes doubled"
                raise self._error(reason, error.pos) from None
            raise self._error(f"expected {wanted}; {self._what_is_here()}", self._at) from None
        except (ValueError, RecursionError):
            raise self._error(f"expected {wanted}; {self._what_is_here()}", self._at) from None
        return value

    def _expect(self, char: str, meaning: str) -> None:
        if self._peek() != char:
            raise self._error(f"expected {char} ({meaning}); {self._what_is_here()}", self._at)
        self._at += 1

    def _peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        found = self._SPACE.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return self._text[self._at : self._at + 1]

    def _what_is_here(self) -> str:
        rest = self._text[self._at :].split("\n", 1)[0]
        return f"found {_clipped(rest.rstrip())}" if rest else "the file ends here"

    def _line(self, at: int) -> int:
        return self._text.count("\n", 0, at) + 1

    def _error(self, reason: str, at: int | None = None) -> RuleError:
        line = self._line(len(self._text.rstrip()) if at is None or at >= len(self._text) else at)
        return RuleError(f"{self._shown}:{line}: {reason}")


_FIELDS = ("Regexp", "Local", "Recurse", "SkipRefresh", "Debug")


def _rule(expression: str, decision: Decision, line: int) -> Rule:
    """ValueError with the reason if the expression does not compile."""
    options = re2.Options()
    options.log_errors = False  # it would write to stderr by itself
    options.max_mem = _WORKING_SET_BYTES
    try:
        pattern = re2.compile(expression.encode("utf-8"), options)
    except UnicodeEncodeError:
        raise ValueError(f"Regexp {_short(expression)} holds half a character") from None
    except re2.error as error:
        reason = error.args[0] if error.args else b"does not compile"
        text = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(f"Regexp {_short(expression)}: {_clipped(text)}") from None
    decided = Decision(decision.local, decision.recurse, decision.skip_refresh, decision.debug, expression)
    return Rule(pattern, decided, line)


def _as_utf8(command: bytes) -> bytes:
    """The command with every byte that is not UTF-8 as U+FFFD, which is how Go's expressions see it.

    RE2 itself would let `.` match no such byte.
    """
    try:
        command.decode("utf-8")
    except UnicodeDecodeError:
        return command.decode("utf-8", "replace").encode("utf-8")
    return command


def _short(value: object) -> str:
    """A value as the file would hold it, one short line."""
    return _clipped(json.dumps(value))


def _clipped(text: str) -> str:
    text = text if len(text) <= 60 else text[:56] + " ..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
