"""Rule files: what decides, what is remembered, and what a broken one says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from termite.command import localrc
from termite.command.localrc import REMOTE, Decision, RulesFile, load_rules, parse_rules
from termite.errors import RuleError


def decide(text: str, command: bytes) -> Decision:
    return parse_rules(text.encode(), "rc").decide(command)


EXAMPLE = r"""// -*-js-*-
# rules of a large project
[{
    "Regexp": ".*termite-make",
    "Local": true,
    "Recurse": true,
    "SkipRefresh": true
}, {
//  "Regexp": ".*cmake -E cmake_link_script",
//  "Local": false,
// }, {
    "Regexp": "^cd [^&; ]* [&;]* find[^;&|]*",
    "Local": true,
    "Debug": true
}, {
    "Regexp": "^if \\[ -d [^ ]* \\] ; then cd",
    "Local": true
}, {
    "Regexp": ".*",
    "Local": false
}]
"""


def test_the_first_matching_rule_decides() -> None:
    make = Decision(local=True, recurse=True, skip_refresh=True, rule=".*termite-make")
    assert decide(EXAMPLE, b"cd sub && termite-make all") == make
    found = decide(EXAMPLE, b"cd x && find . | xargs termite")
    assert (found.local, found.debug, found.recurse) == (True, True, False)
    assert decide(EXAMPLE, b"if [ -d x ] ; then cd x; fi").local
    assert decide(EXAMPLE, b"gcc -c x.c") == Decision(local=False, rule=".*")


def test_an_expression_is_found_anywhere_in_the_command() -> None:
    assert decide('[{"Regexp": "cmake", "Local": true}]', b"/usr/bin/cmake -E touch x").local
    assert not decide('[{"Regexp": "^cmake$", "Local": true}]', b"cmake x").local


def test_a_command_that_no_rule_matches_runs_on_a_worker() -> None:
    assert decide('[{"Regexp": "cmake", "Local": true}]', b"gcc") is REMOTE
    assert decide("[]", b"gcc") is REMOTE


def test_field_names_may_be_in_any_case() -> None:
    found = decide('[{"regexp": "a", "LOCAL": true, "skiprefresh": true, "reCurse": true, "debug": true}]', b"a")
    assert found == Decision(True, True, True, True, "a")


def test_go_and_re2_syntax_work() -> None:
    for expression, command in [
        (r"(?i)MAKE", b"make"),
        (r"(?P<n>a)b", b"ab"),
        (r"\\Qa.b\\E\\z", b"a.b"),
        (r"[[:digit:]]{3}", b"123"),
        (r"^\\S+\\s\\S+$", b"a b"),
        ("(?s)a.b", b"a\nb"),
    ]:
        assert decide(f'[{{"Regexp": "{expression}", "Local": true}}]', command).local, expression


def test_letters_beyond_ascii_and_bytes_that_are_no_letters_match_a_dot() -> None:
    text = '[{"Regexp": "^é.[üx]$", "Local": true}]'
    assert decide(text, "éßü".encode()).local
    assert decide(text, "é".encode() + b"\xff" + b"x").local
    assert decide('[{"Regexp": "^a.*b$", "Local": true}]', b"a\xff\x80\xc3(b").local


def test_comment_lines_may_be_indented_and_lines_may_end_as_on_windows() -> None:
    assert decide('[\r\n  // note\r\n  # note\r\n{"Regexp": "a",\r\n"Local": true}]\r\n', b"a").local


def test_without_a_file_recursive_makes_are_local_and_all_else_is_not(tmp_path: Path) -> None:
    rules = load_rules(os.fsencode(tmp_path / ".termite-localrc"))
    assert rules.decide(b"/usr/bin/termite-make -C sub") == Decision(True, True, True, False, ".*termite-make")
    assert not rules.decide(b"gcc -c make.c").local


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("", 1, "no rules in it"),
        ("# only a remark\n\n", 1, "no rules in it"),
        ('[{"Regexp": "a"},\n{"Regexp": "b", "Local": true},\n]', 2, "comma before the closing ]"),
        ('[{"Regexp": "a",\n"Local": true,\n}]', 2, "comma before the closing }"),
        ('[{"Regexp": "a"', 1, "the file ends here"),
        ('[\n{"Regexp": ', 2, "the file ends where a string should be"),
        ('[\n{"Regexp": "a', 2, "unterminated string"),
        ('[{"Regexp": "a"}', 1, "expected , or ]"),
        ('// one\n[\n# three\n{"Regexp": "a"},\n{"Regexp": "b("}]', 5, "missing )"),
        ('[{"Regexp": "(?=a)"}]', 1, "RE2"),
        ('[{"Regexp": "a"},\n{"Local": true}]', 2, "without Regexp"),
        ('[{"Regexp": 3}]', 1, "Regexp must be a string, not 3"),
        ('[{"Regexp": null}]', 1, "Regexp must be a string, not null"),
        ('[{"Regexp": "a",\n"Local": "yes"}]', 2, 'Local must be true or false, not "yes"'),
        ('[{"Regexp": "a",\n"Lokal": true}]', 2, 'unknown field "Lokal"; the fields are Regexp, Local'),
        ('[{"Regexp": "a", "regexp": "b"}]', 1, "given twice"),
        ('{"Regexp": "a"}', 1, "expected [ (a JSON array of rules)"),
        ('[\n"a"]', 2, "expected {"),
        ("null", 1, "expected ["),
        ('[{"Regexp": "a"}]\n[]', 2, "something follows"),
        ('[{"Regexp": "a"}{"Regexp": "b"}]', 1, "expected , or ]"),
        ('[{"Regexp" "a"}]', 1, "a colon after Regexp"),
        ('[{regexp: "a"}]', 1, "field name in double quotes"),
        ('[{5: "a"}]', 1, "field name in double quotes"),
        (r'[{"Regexp": "\d"}]', 1, "backslashes doubled"),
        ('[{"Regexp": "\\ud800"}]', 1, "half a character"),
        ("[" * 100_000, 1, "expected {"),
        ('[{"Regexp":' + "[" * 100_000, 1, "expected a string"),
        ('[{"Regexp": "' + "a" * 100_000 + '("}]', 1, "missing )"),
        ('[{"Regexp": "' + "(a{30}){30}" * 1000 + '"}]', 1, "too large"),
    ],
)
def test_a_broken_file_is_one_line_with_file_line_and_reason(text: str, line: int, part: str) -> None:
    with pytest.raises(RuleError) as raised:
        parse_rules(text.encode(), "rc")
    message = str(raised.value)
    assert message.startswith(f"rc:{line}: ")
    assert part in message
    assert message.isprintable()
    assert len(message) < 300


def test_a_file_that_is_not_utf8_is_refused_with_its_line() -> None:
    with pytest.raises(RuleError, match=r"^rc:2: not UTF-8"):
        parse_rules(b'[\n{"Regexp": "\xff"}]', "rc")


def test_a_file_cut_off_anywhere_is_refused() -> None:
    for cut in range(len(EXAMPLE.rstrip())):
        with pytest.raises(RuleError):
            parse_rules(EXAMPLE.encode()[:cut], "rc")


def test_what_cannot_be_read_as_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="not a file"):
        load_rules(os.fsencode(tmp_path))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(RuleError, match="not a file"):
        load_rules(os.fsencode(fifo))
    large = tmp_path / "large"
    large.write_bytes(b" " * (localrc.MAX_BYTES + 1))
    with pytest.raises(RuleError, match="larger than"):
        load_rules(os.fsencode(large))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(RuleError, match="remove it"):
        load_rules(os.fsencode(loop))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / ".termite-localrc"
    file = RulesFile(os.fsencode(path))
    assert not file.current().decide(b"cc").local
    path.write_text('[{"Regexp": "cc", "Local": true}]')
    assert file.current().decide(b"cc").local
    path.write_text('[{"Regexp": "cx", "Local": true}]')  # same size, perhaps the same time stamp
    assert not file.current().decide(b"cc").local
    path.unlink()
    assert file.current().decide(b"termite-make").local


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".termite-localrc"
    path.write_text("[]")
    monkeypatch.setattr(localrc, "UNSETTLED_NS", 0)
    file = RulesFile(os.fsencode(path))
    first = file.current()
    assert file.current() is first
    missing = RulesFile(os.fsencode(tmp_path / "missing"))
    assert missing.current() is missing.current()


def test_a_file_broken_by_an_edit_is_an_error_until_it_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / ".termite-localrc"
    path.write_text("[]")
    file = RulesFile(os.fsencode(path))
    file.current()
    path.write_text("[{]")
    for _ in range(2):
        with pytest.raises(RuleError, match=r"\.termite-localrc:1: "):
            file.current()
    path.write_text("[ ]")
    assert file.current().decide(b"x") is REMOTE


def test_decisions_are_remembered_but_not_without_bound() -> None:
    rules = parse_rules(b'[{"Regexp": "x", "Local": true}]', "rc")
    for number in range(localrc.REMEMBERED_COMMANDS + 10):
        rules.decide(b"%d" % number)
    rules.decide(b"x" * (localrc.MAX_REMEMBERED_BYTES + 1))
    assert len(rules._known) == localrc.REMEMBERED_COMMANDS
    assert rules.decide(b"x").local and rules.decide(b"x").local
