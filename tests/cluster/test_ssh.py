"""The whole farm inside SSH, when the secret is an SSH private key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from tests.cluster.farm import Farm

PASSPHRASE = "open sesame"
MAKEFILE = "all: p\n\t./p > out\np: a.o b.o\n\tgcc -o $@ $^\n%.o: %.c\n\tgcc -c -o $@ $<\nbig:\n\thead -c 30000000 /dev/urandom > big\n"


def write_key(path: Path, kind: str) -> None:
    key = {
        "ed25519": lambda: ed25519.Ed25519PrivateKey.generate(),
        "ecdsa": lambda: ec.generate_private_key(ec.SECP256R1()),
        "rsa": lambda: rsa.generate_private_key(65537, 3072),
        "passphrase": lambda: ed25519.Ed25519PrivateKey.generate(),
    }[kind]()
    lock = BestAvailableEncryption(PASSPHRASE.encode()) if kind == "passphrase" else NoEncryption()
    path.unlink(missing_ok=True)
    path.touch(0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, lock))


@pytest.fixture(params=["ed25519", "ecdsa", "rsa", "passphrase"])
def farm(request: pytest.FixtureRequest) -> Iterator[Farm]:
    farm = Farm()
    write_key(farm.secret, request.param)
    farm.env["TERMITE_SSH_PASSPHRASE"] = PASSPHRASE
    yield farm
    farm.close()


def test_a_build_runs_inside_ssh_and_a_plain_peer_is_refused(farm: Farm) -> None:
    coordinator = farm.coordinator()
    for _ in range(2):
        farm.worker(1)
    root = farm.dir / "project"
    root.mkdir()
    (root / "Makefile").write_text(MAKEFILE)
    (root / "a.c").write_text("int f(void); int puts(const char *); int main(void) { return f(); }\n")
    (root / "b.c").write_text('int puts(const char *); int f(void) { return puts("hello") < 0; }\n')
    farm.master(root)
    result = farm.make(root, "-j4", "all", "big")
    assert result.returncode == 0, result.stderr
    assert (root / "out").read_text() == "hello\n"
    assert (root / "big").stat().st_size == 30_000_000

    right, farm.secret = farm.secret, farm.dir / "plain"
    farm.secret.touch(0o600)
    farm.secret.write_text("no SSH key at all\n")
    stranger = farm.worker(1, ready=False)
    farm.secret = right
    stranger.wait_log("SSH")
    coordinator.wait_log("SSH")
