"""The secret is a file: where to look for it, and when to refuse it.

Whoever holds these bytes may run commands on every worker, so a file that others may read is
refused, as ssh refuses such a key.  Any contents will do, an SSH private key too; what goes into
the handshake is derived from them (`wire/auth.py`), never the bytes themselves.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from termite.errors import SecretError

MAX_SECRET_BYTES = 64 * 1024
ENVIRONMENT_NAME = "TERMITE_SECRET"
SYSTEM_SECRET = Path("/etc/termite/secret")


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


def load_secret(path: Path) -> bytes:
    """The contents without trailing white space; SecretError, with the remedy, if it must not be used."""
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
    return secret


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
