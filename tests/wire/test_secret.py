from __future__ import annotations

import os
from pathlib import Path

import pytest

from termite.errors import SecretError
from termite.wire.secret import MAX_SECRET_BYTES, find_secret, load_secret


def secret_file(path: Path, contents: bytes = b"open sesame\n", mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
    path.chmod(mode)
    return path


def test_the_flag_comes_before_everything(tmp_path: Path) -> None:
    secret_file(tmp_path / ".config/termite/secret")
    assert find_secret("key", {"TERMITE_SECRET": "other"}, tmp_path) == Path("key")


def test_the_environment_comes_before_the_home_directory(tmp_path: Path) -> None:
    secret_file(tmp_path / ".config/termite/secret")
    assert find_secret(None, {"TERMITE_SECRET": "other"}, tmp_path) == Path("other")


def test_the_home_directory_comes_before_the_system(tmp_path: Path) -> None:
    own = secret_file(tmp_path / ".config/termite/secret")
    system = secret_file(tmp_path / "etc/secret")
    assert find_secret(None, {"TERMITE_SECRET": ""}, tmp_path, system) == own
    own.unlink()
    assert find_secret(None, {}, tmp_path, system) == system


def test_no_secret_anywhere_says_where_to_put_one(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match=r"-secret FILE.*TERMITE_SECRET.*\.config/termite/secret.*chmod 600"):
        find_secret(None, {}, tmp_path, tmp_path / "none")


def test_white_space_at_the_end_does_not_count(tmp_path: Path) -> None:
    assert load_secret(secret_file(tmp_path / "a", b" x y \r\n")) == b" x y"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o601, 0o777])
def test_a_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SecretError, match="chmod 600"):
        load_secret(secret_file(tmp_path / "a", mode=mode))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_file_of_our_own_is_accepted(tmp_path: Path, mode: int) -> None:
    assert load_secret(secret_file(tmp_path / "a", mode=mode)) == b"open sesame"


@pytest.mark.parametrize("contents", [b"", b"\n", b" \n\t\n"])
def test_an_empty_file_is_refused_with_the_way_to_make_one(tmp_path: Path, contents: bytes) -> None:
    with pytest.raises(SecretError, match=r"empty.*head -c 32 /dev/urandom"):
        load_secret(secret_file(tmp_path / "a", contents))


def test_a_missing_file_is_refused_with_the_way_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match=r"does not exist.*head -c 32 /dev/urandom"):
        load_secret(tmp_path / "a")


def test_a_huge_file_is_refused_and_the_largest_is_not(tmp_path: Path) -> None:
    assert len(load_secret(secret_file(tmp_path / "a", b"x" * MAX_SECRET_BYTES))) == MAX_SECRET_BYTES
    with pytest.raises(SecretError, match="64 KiB"):
        load_secret(secret_file(tmp_path / "a", b"x" * (MAX_SECRET_BYTES + 1)))


def test_what_is_not_a_file_is_refused_and_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(SecretError, match="not a regular file"):
            load_secret(path)
    with pytest.raises(SecretError, match="cannot be opened"):
        load_secret(secret_file(tmp_path / "a") / "below")


def test_every_refusal_is_one_line(tmp_path: Path) -> None:
    empty, open_to_all = secret_file(tmp_path / "a", b""), secret_file(tmp_path / "b", mode=0o644)
    for path in (tmp_path, tmp_path / "none", empty, open_to_all):
        with pytest.raises(SecretError) as caught:
            load_secret(path)
        assert "\n" not in str(caught.value)
