from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from termite.errors import SecretError
from termite.wire.secret import MAX_SECRET_BYTES, find_secret, is_ssh_key, load_secret


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


# -- SSH keys -------------------------------------------------------------------------------------

PKCS8, SSH, PEM = PrivateFormat.PKCS8, PrivateFormat.OpenSSH, PrivateFormat.TraditionalOpenSSL
KEYS: dict[str, Callable[[], Any]] = {
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


def pem(key: Any, encoding: PrivateFormat, passphrase: bytes = b"") -> bytes:
    lock = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    contents: bytes = key.private_bytes(Encoding.PEM, encoding, lock)
    return contents


@pytest.mark.parametrize("kind", KEYS)
def test_an_ssh_key_is_one_secret_in_all_its_formats(tmp_path: Path, kind: str) -> None:
    key = KEYS[kind]()
    formats = [PKCS8, SSH] + ([] if kind == "ed25519" else [PEM])
    files = [pem(key, encoding, lock) for encoding in formats for lock in (b"", b"open sesame")]
    environ = {"TERMITE_SSH_PASSPHRASE": "open sesame"}
    loaded = {load_secret(secret_file(tmp_path / "a", contents), environ) for contents in files}
    assert len(loaded) == 1
    (secret,) = loaded
    assert is_ssh_key(secret) and all(is_ssh_key(contents) for contents in files)
    assert load_secret(secret_file(tmp_path / "a", secret), {}) == secret


def test_what_is_no_key_is_any_secret() -> None:
    for secret in (b"x", b"PRIVATE KEY", b"a -----BEGIN PRIVATE KEY-----", b"-----BEGIN CERTIFICATE-----"):
        assert not is_ssh_key(secret)


def test_parameters_before_an_ec_key_do_not_count(tmp_path: Path) -> None:
    key = KEYS["p256"]()
    parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    with_them = load_secret(secret_file(tmp_path / "a", parameters + pem(key, PEM)), {})
    assert with_them == load_secret(secret_file(tmp_path / "b", pem(key, SSH)), {})


@pytest.mark.parametrize("encoding", [PKCS8, SSH])
def test_a_passphrase_that_is_missing_or_wrong_is_told_with_its_variable(
    tmp_path: Path, encoding: PrivateFormat
) -> None:
    path = secret_file(tmp_path / "a", pem(KEYS["ed25519"](), encoding, b"right"))
    for environ in ({}, {"TERMITE_SSH_PASSPHRASE": ""}):
        with pytest.raises(SecretError, match=r"/a is an SSH key with a passphrase; put it into \$TERMITE_SSH_PASSPHR"):
            load_secret(path, environ)
    with pytest.raises(SecretError, match=r"passphrase in \$TERMITE_SSH_PASSPHRASE is wrong") as caught:
        load_secret(path, {"TERMITE_SSH_PASSPHRASE": "wrong"})
    assert "\n" not in str(caught.value)


def test_a_passphrase_that_is_not_needed_does_no_harm(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "a", pem(KEYS["ed25519"](), SSH))
    assert load_secret(path, {"TERMITE_SSH_PASSPHRASE": "x"}) == load_secret(path, {})


def test_the_passphrase_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERMITE_SSH_PASSPHRASE", "right")
    assert is_ssh_key(load_secret(secret_file(tmp_path / "a", pem(KEYS["ed25519"](), SSH, b"right"))))


def public(key: Any, encoding: Encoding, how: PublicFormat) -> bytes:
    contents: bytes = key.public_key().public_bytes(encoding, how)
    return contents


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (lambda: pem(dsa.generate_private_key(1024), PEM), "not supported|cannot be used"),
        (lambda: pem(ed448.Ed448PrivateKey.generate(), PKCS8), r"not supported \(.*448"),
        (lambda: pem(rsa.generate_private_key(65537, 1024), PKCS8), "RSA key of 1024 bits, 2048 is the least"),
        (lambda: pem(ec.generate_private_key(ec.SECP256K1()), PKCS8), "secp256k1, which SSH does not know"),
        (lambda: pem(KEYS["ed25519"](), SSH)[:150], "damaged SSH key"),
        (lambda: b"-----BEGIN OPENSSH PRIVATE KEY-----\n-----END OPENSSH PRIVATE KEY-----\n", "damaged SSH key"),
        (lambda: public(KEYS["ed25519"](), Encoding.OpenSSH, PublicFormat.OpenSSH), "public key, which is no secret"),
        (lambda: public(KEYS["p256"](), Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "public key, which is no"),
        (lambda: b"PuTTY-User-Key-File-3: ssh-ed25519\n", "convert it to OpenSSH's"),
    ],
)
def test_a_key_that_cannot_be_used_is_refused_with_the_remedy(
    tmp_path: Path, contents: Callable[[], bytes], says: str
) -> None:
    with pytest.raises(SecretError, match=says) as caught:
        load_secret(secret_file(tmp_path / "a", contents()), {})
    assert str(tmp_path / "a") in str(caught.value) and "\n" not in str(caught.value)
    assert any(remedy in str(caught.value) for remedy in ("ssh-keygen", "without .pub"))
