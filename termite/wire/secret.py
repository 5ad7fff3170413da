"""The secret is a file: where to look for it, and when to refuse it.

Whoever holds these bytes may run commands on every worker, so a file that others may read is
refused, as ssh refuses such a key.  Any contents will do; what goes into the handshake is derived
from them (`wire/auth.py`), never the bytes themselves.  If they are an SSH private key, connections
run inside SSH (`wire/ssh.py`).  Such a key is loaded into one plain form, so that it stays the same
secret in whatever format it is stored, and its passphrase is needed here only.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from termite.errors import SecretError

MAX_SECRET_BYTES = 64 * 1024
ENVIRONMENT_NAME = "TERMITE_SECRET"
PASSPHRASE_NAME = "TERMITE_SSH_PASSPHRASE"
SYSTEM_SECRET = Path("/etc/termite/secret")
MIN_RSA_BITS = 2048

SshKey = RSAPrivateKey | ec.EllipticCurvePrivateKey | Ed25519PrivateKey

# An EC key may follow a block with its parameters.
_PRIVATE_KEY = re.compile(rb"^-----BEGIN (?:([A-Z0-9]+) )?(?:ENCRYPTED )?PRIVATE KEY-----", re.MULTILINE)
_PUBLIC_KEY = re.compile(rb"(ssh-|ecdsa-|sk-)[a-z0-9@.-]+ AAAA|-----BEGIN (RSA )?PUBLIC KEY|---- BEGIN SSH2 PUBLIC KEY")
_OTHER_FORMAT = re.compile(rb"PuTTY-User-Key-File|---- BEGIN SSH2 ENCRYPTED PRIVATE KEY")
_MAKE_KEY = "make one with ssh-keygen -t ed25519"


def find_secret(flag: str | None, environ: Mapping[str, str], home: Path, system: Path = SYSTEM_SECRET) -> Path:
    """The file to use: `-secret FILE`, $TERMITE_SECRET, ~/.config/termite/secret, /etc/termite/secret.

    A file that was named is taken as named: if it is missing, `load_secret` says so.
    """
    if flag:
        return Path(flag)
    named = environ.get(ENVIRONMENT_NAME)
    if named:
        return Path(named)
    own = home / ".config" / "termite" / "secret"
    for candidate in (own, system):
        if _is_there(candidate):
            return candidate
    raise SecretError(
        f"no secret: name one with -secret FILE or ${ENVIRONMENT_NAME}, or put one into {own} or {system}; "
        f"to make one: {_how_to_make(own)}"
    )


def load_secret(path: Path, environ: Mapping[str, str] = os.environ) -> bytes:
    """The contents without trailing white space; SecretError, with the remedy, if it must not be used.

    Of an SSH private key, the plain form; $TERMITE_SSH_PASSPHRASE opens it if it is locked.
    """
    try:
        # O_NONBLOCK: a FIFO must not hang us before fstat has told what it is.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SecretError(f"secret file {path} does not exist; to make one: {_how_to_make(path)}") from None
    except PermissionError:
        raise SecretError(f"secret file {path} is not readable by this user; run as its owner or copy it") from None
    except OSError as exc:
        raise SecretError(f"secret file {path} cannot be opened: {exc.strerror}; name another with -secret") from None
    try:
        _check_kind(path, os.fstat(fd))
        secret = _read(fd, MAX_SECRET_BYTES + 1)
    except OSError as exc:
        raise SecretError(f"secret file {path} cannot be read: {exc.strerror}; name another with -secret") from None
    finally:
        os.close(fd)
    if len(secret) > MAX_SECRET_BYTES:
        raise SecretError(f"secret file {path} is larger than 64 KiB, surely not a key; name another with -secret")
    secret = secret.rstrip()
    if not secret:
        raise SecretError(f"secret file {path} is empty; to make one: {_how_to_make(path)}")
    try:
        _check_is_private(secret)
        return plain_ssh_key(secret, environ.get(PASSPHRASE_NAME, "")) if is_ssh_key(secret) else secret
    except SecretError as exc:
        raise SecretError(f"secret file {path} {exc}") from None


def is_ssh_key(secret: bytes) -> bool:
    """Whether connections that use this secret run inside SSH."""
    return _PRIVATE_KEY.search(secret) is not None


def plain_ssh_key(secret: bytes, passphrase: str = "") -> bytes:
    """The same bytes for the same key, in whatever format and under whatever passphrase it came."""
    key = parse_ssh_key(secret, passphrase)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).rstrip()


def parse_ssh_key(secret: bytes, passphrase: str = "") -> SshKey:
    """SecretError, a sentence without its subject, if this is no key that we can use."""
    found = _PRIVATE_KEY.search(secret)
    if found is None:
        raise SecretError(f"is not an SSH private key; {_MAKE_KEY}")
    load = load_ssh_private_key if found[1] == b"OPENSSH" else load_pem_private_key
    pem = secret[found.start() :] + b"\n"
    try:
        try:
            key = load(pem, None)
        except TypeError:  # it is locked
            if not passphrase:
                raise SecretError(f"is an SSH key with a passphrase; put it into ${PASSPHRASE_NAME}") from None
            key = load(pem, passphrase.encode())
    except UnsupportedAlgorithm as exc:
        raise SecretError(f"is an SSH key of a kind that cannot be used here ({_line(exc)}); {_MAKE_KEY}") from None
    except (ValueError, TypeError) as exc:
        hint = f", or the passphrase in ${PASSPHRASE_NAME} is wrong" if passphrase else ""
        raise SecretError(f"is a damaged SSH key{hint} ({_line(exc)}); {_MAKE_KEY}") from None
    return _check_ssh_kind(key)


def _check_ssh_kind(key: object) -> SshKey:
    if isinstance(key, RSAPrivateKey):
        if key.key_size < MIN_RSA_BITS:
            raise SecretError(f"is an RSA key of {key.key_size} bits, {MIN_RSA_BITS} is the least; {_MAKE_KEY}")
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey):
        if not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1):
            raise SecretError(f"is an ECDSA key on {key.curve.name}, which SSH does not know; {_MAKE_KEY}")
        return key
    if isinstance(key, Ed25519PrivateKey):
        return key
    kind = type(key).__name__.lstrip("_").removesuffix("PrivateKey")
    raise SecretError(f"is an SSH key of a kind that is not supported ({kind}); {_MAKE_KEY}")


def _check_is_private(secret: bytes) -> None:
    """Neither a key that everybody may know nor one that looks like a key to its owner only."""
    if _PUBLIC_KEY.match(secret):
        raise SecretError("is a public key, which is no secret; name the private key (the file without .pub)")
    if _OTHER_FORMAT.match(secret):
        raise SecretError("is an SSH key in another program's format; convert it to OpenSSH's: ssh-keygen -i, puttygen")


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:200] or type(exc).__name__


def _check_kind(path: Path, st: os.stat_result) -> None:
    if not stat.S_ISREG(st.st_mode):
        raise SecretError(f"secret {path} is not a regular file; name a file with -secret")
    if st.st_mode & 0o077:
        raise SecretError(
            f"secret file {path} may be read by others (mode {stat.S_IMODE(st.st_mode):04o}); chmod 600 {path}"
        )


def _read(fd: int, limit: int) -> bytes:
    data = b""
    while len(data) < limit and (piece := os.read(fd, limit - len(data))):
        data += piece
    return data


def _is_there(path: Path) -> bool:
    """Unlike Path.exists, a file that we may not reach counts: the reader deserves that error."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _how_to_make(path: Path) -> str:
    return f"head -c 32 /dev/urandom | base64 > {path}; chmod 600 {path}"
