"""The whole farm inside SSH, when the secret is an SSH private key of any kind; see also OVER_SSH in conftest.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.farm import Farm, write_ssh_key

PASSPHRASE = "open sesame"
MAKEFILE = "all: p\n\t./p > out\np: a.o b.o\n\tgcc -o $@ $^\n%.o: %.c\n\tgcc -c -o $@ $<\nbig:\n\thead -c 30000000 /dev/urandom > big\n"


@pytest.fixture(params=["ed25519", "ecdsa", "rsa", "passphrase"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def farm(kind: str) -> Iterator[Farm]:
    farm = Farm()
    locked = kind == "passphrase"
    write_ssh_key(farm.secret, "ed25519" if locked else kind, PASSPHRASE if locked else "")
    farm.env["TERMITE_SSH_PASSPHRASE"] = PASSPHRASE
    yield farm
    farm.close()


def test_a_build_runs_inside_ssh_and_neither_a_plain_peer_nor_another_key_is_let_in(farm: Farm, kind: str) -> None:
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
    stranger.wait_log("speaks SSH|SSH key")
    coordinator.wait_log("refused 127.0.0.1: it speaks without SSH: its secret is no SSH key")
    stranger.stop()

    farm.secret = farm.dir / "other"
    write_ssh_key(farm.secret, "ed25519" if kind == "passphrase" else kind)
    stranger = farm.worker(1, ready=False)
    farm.secret = right
    stranger.wait_log("SSH key than ours; give both sides the same secret file")
    coordinator.wait_log("refused 127.0.0.1: it .*holds another")
