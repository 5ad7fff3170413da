"""Hashes of the system's compilers and libraries, in one file of the user's: the next master need not read them again.

A hash counts only for a file whose stat signature is what it was.  A file that is damaged, or that others may write
to, is left aside; nothing is lost by that but time.  Masters replace the file as a whole, each with what it has read
and what it has found there.

    32 bytes SHA-256 of the rest | msgpack map: path -> Kept
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import time

import msgspec

from termite import paths
from termite.attr.fileattr import Signature

log = logging.getLogger(__name__)

NAME = b"hashes"
MAX_FILES = 20_000
MAX_FILE_BYTES = 64 << 20
UNUSED_S = 90 * 86400
"""What nobody has asked for in this long is dropped."""

_MODE, _DIR_MODE = 0o600, 0o700
_HASH_BYTES = 32


class Kept(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One file's."""

    signature: Signature
    hash: bytes
    manifest: bytes  # encoded; b"": the hash is that of the contents
    used: int  # when it was last asked for, in seconds since 1970


_decoder = msgspec.msgpack.Decoder(dict[bytes, Kept])


class HashFile:
    """`find` what earlier masters knew, `keep` what this one knows, `save`.  Loop only."""

    def __init__(self, directory: bytes) -> None:
        self._directory = directory
        self._path = os.path.join(directory, NAME)
        self._kept = self._load()
        self._is_new = False  # is there anything to save?

    def find(self, path: bytes, signature: Signature) -> Kept | None:
        """What is known of the file if it still looks like that."""
        kept = self._kept.get(path)
        if kept is None or kept.signature != signature:
            return None
        if kept.manifest and hashlib.sha256(kept.manifest).digest() != kept.hash:
            return None
        return kept

    def keep(self, path: bytes, signature: Signature, hash: bytes, manifest: bytes) -> None:
        known = self._kept.get(path)
        now = int(time.time())
        if known is not None and (known.signature, known.hash) == (signature, hash) and now - known.used < 86400:
            return
        self._kept[path] = Kept(signature, hash, manifest, now)
        self._is_new = True

    def save(self) -> None:
        """If there is anything new.  A disk that does not take it costs a line in the log."""
        if not self._is_new:
            return
        self._is_new = False
        kept = {**self._load(), **self._kept}
        oldest = time.time() - UNUSED_S
        wanted = sorted((item for item in kept.items() if item[1].used > oldest), key=lambda item: -item[1].used)
        payload = msgspec.msgpack.encode(dict(wanted[:MAX_FILES]))
        temp = b"%s.%d" % (self._path, os.getpid())
        try:
            os.makedirs(self._directory, _DIR_MODE, exist_ok=True)
            with open(temp, "wb", opener=lambda name, flags: os.open(name, flags, _MODE)) as file:
                file.write(hashlib.sha256(payload).digest() + payload)
            os.rename(temp, self._path)
        except OSError as error:
            log.info("hashes are not kept in %s: %s", paths.for_people(self._path), error.strerror)
            with contextlib.suppress(OSError):
                os.unlink(temp)

    def _load(self) -> dict[bytes, Kept]:
        try:
            with open(self._path, "rb") as file:
                st = os.fstat(file.fileno())
                if st.st_uid != os.geteuid() or st.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    log.warning("%s is not used: others may write to it", paths.for_people(self._path))
                    return {}
                data = file.read(MAX_FILE_BYTES)
        except OSError:
            return {}
        if hashlib.sha256(data[_HASH_BYTES:]).digest() == data[:_HASH_BYTES]:
            with contextlib.suppress(msgspec.DecodeError):
                return _decoder.decode(memoryview(data)[_HASH_BYTES:])
        log.info("%s is damaged; starting afresh", paths.for_people(self._path))
        return {}
