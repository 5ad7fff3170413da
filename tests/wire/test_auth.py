from __future__ import annotations

import itertools

import pytest

from termite.errors import WireError
from termite.wire import auth
from termite.wire.auth import Purpose, Role, Status

KEY = auth.handshake_key(b"secret")
ONE, TWO = b"1" * 32, b"2" * 32


def test_a_proof_is_worth_nothing_with_any_part_changed() -> None:
    keys = (KEY, auth.handshake_key(b"other"))
    nonces = ((ONE, TWO), (TWO, ONE), (ONE, ONE))
    proofs = {
        auth.proof(key, *pair, role, purpose, status)
        for key, pair, role, purpose, status in itertools.product(keys, nonces, Role, Purpose, Status)
    }
    assert len(proofs) == len(keys) * len(nonces) * len(Role) * len(Purpose) * len(Status)


def test_session_keys_differ_by_direction_secret_nonces_and_purpose() -> None:
    keys = [
        *auth.session_keys(KEY, ONE, TWO, 1),
        *auth.session_keys(KEY, TWO, ONE, 1),
        *auth.session_keys(KEY, ONE, TWO, 2),
        *auth.session_keys(auth.handshake_key(b"other"), ONE, TWO, 1),
    ]
    assert len(set(keys)) == 8
    assert {len(key) for key in keys} == {32}


def test_both_sides_derive_the_same_from_the_same() -> None:
    assert auth.handshake_key(b"secret") == KEY
    assert auth.session_keys(KEY, ONE, TWO, 3) == auth.session_keys(KEY, ONE, TWO, 3)


def test_the_secret_itself_is_in_nothing_that_is_shown() -> None:
    assert b"secret" not in KEY
    assert repr(auth.session_keys(KEY, ONE, TWO, 1)) == "SessionKeys(...)"


def test_the_layouts_are_exactly_these() -> None:
    proven = b"p" * 32
    assert auth.pack_challenge(ONE) == auth.MAGIC + ONE
    assert auth.pack_answer(3, TWO, proven) == auth.MAGIC + b"\x03" + TWO + proven
    assert auth.pack_verdict(Status.WELCOME, proven) == b"\0" + proven
    assert auth.pack_verdict(Status.WRONG_SECRET) == b"\x01" + bytes(32)
    assert (auth.CHALLENGE_BYTES, auth.ANSWER_BYTES, auth.VERDICT_BYTES) == (40, 73, 33)


def test_the_layouts_read_back() -> None:
    proven = b"p" * 32
    assert auth.unpack_challenge(auth.pack_challenge(ONE)) == (auth.MAGIC, ONE)
    assert auth.unpack_answer(auth.pack_answer(3, TWO, proven)) == (auth.MAGIC, 3, TWO, proven)
    assert auth.unpack_verdict(auth.pack_verdict(Status.NOT_WELCOME, proven)) == (Status.NOT_WELCOME, proven)


def test_an_unknown_status_is_an_error() -> None:
    with pytest.raises(WireError, match="status 99"):
        auth.unpack_verdict(bytes((99,)) + bytes(32))


def test_another_version_is_told_from_another_program() -> None:
    assert auth.is_other_version(b"TERMITE\x01")
    assert not auth.is_other_version(auth.MAGIC)
    assert not auth.is_other_version(b"SSH-2.0-")


def test_nonces_do_not_repeat() -> None:
    assert len({auth.new_nonce() for _ in range(100)}) == 100
