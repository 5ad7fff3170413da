"""Hashes that outlive their master."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from termite.attr.fileattr import signature_of
from termite.master.hashes import KEPT_BYTES, PIECED_BYTES, Hashes
from termite.master.hashfile import HashFile


class Machine:
    """A project, a large file beside it, and masters that come and go."""

    def __init__(self, base: Path) -> None:
        self.cache = base / "cache"
        self.root = base / "project"
        self.root.mkdir()
        self.library = base / "library"
        self.write(self.library, b"l" * (PIECED_BYTES + 5))

    def write(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)

    def master(self) -> Hashes:
        root = os.fsencode(self.root)[1:]
        return Hashes((), (root,), HashFile(os.fsencode(self.cache)))

    def hash(self, master: Hashes, path: Path, *, long_ago: bool = True) -> tuple[bytes, bool]:
        """(what a mirror is told of the file's contents, did the master have to read it?)."""
        relative = os.fsencode(path)[1:]
        fd = os.open(path, os.O_RDONLY)
        try:
            st = os.fstat(fd)
            known = master.known(relative, st, recall=True)
            digest = known or master.hash_contents(relative, fd, st.st_size)
            master.remember(relative, st, digest)
            if long_ago:  # as if its last change were
                master._known[relative] = (signature_of(st), digest, st.st_ctime_ns + 10**12)
                master._keep(relative, st, digest)
            return digest, not known
        finally:
            os.close(fd)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def keep(machine: Machine, path: Path) -> bytes:
    """A master reads the file, remembers it, and ends."""
    master = machine.master()
    digest, _ = machine.hash(master, path)
    master.save_file()
    return digest


def test_the_next_master_need_not_read_a_library_again(machine: Machine) -> None:
    digest = keep(machine, machine.library)
    master = machine.master()
    assert machine.hash(master, machine.library) == (digest, False)
    assert master.manifests[digest].size == PIECED_BYTES + 5
    assert master.found == 1


def test_a_library_that_was_changed_is_read_again(machine: Machine) -> None:
    digest = keep(machine, machine.library)
    machine.write(machine.library, b"m" * (PIECED_BYTES + 5))
    other, was_read = machine.hash(machine.master(), machine.library)
    assert was_read and other != digest


def test_neither_small_files_nor_the_projects_own_are_kept(machine: Machine) -> None:
    small, own = machine.library.with_name("small"), machine.root / "own"
    machine.write(small, b"s" * KEPT_BYTES)
    machine.write(own, b"o" * (PIECED_BYTES + 5))
    first = machine.master()
    for path in (small, own):
        machine.hash(first, path)
    first.save_file()
    second = machine.master()
    assert [machine.hash(second, path)[1] for path in (small, own)] == [True, True]


def test_a_file_hashed_right_after_its_change_is_not_kept(machine: Machine) -> None:
    master = machine.master()
    machine.library.touch()
    digest, _ = machine.hash(master, machine.library, long_ago=False)
    relative, st = os.fsencode(machine.library)[1:], machine.library.stat()
    master._known[relative] = (signature_of(st), digest, st.st_ctime_ns)
    master._keep(relative, st, digest)
    master.save_file()
    assert machine.hash(machine.master(), machine.library)[1]


@pytest.mark.parametrize("damage", ["cut short", "changed", "empty", "others may write"])
def test_a_damaged_file_is_left_aside(machine: Machine, damage: str) -> None:
    keep(machine, machine.library)
    file = machine.cache / "hashes"
    data = bytearray(file.read_bytes())
    match damage:
        case "cut short":
            file.write_bytes(data[:-1])
        case "changed":
            data[-1] ^= 1
            file.write_bytes(data)
        case "empty":
            file.write_bytes(b"")
        case "others may write":
            file.chmod(0o666)
    assert machine.hash(machine.master(), machine.library)[1]


def test_two_masters_keep_what_both_have_read(machine: Machine) -> None:
    other = machine.library.with_name("other")
    machine.write(other, b"o" * (PIECED_BYTES + 5))
    late = HashFile(os.fsencode(machine.cache))
    digest = keep(machine, machine.library)
    late.keep(os.fsencode(other)[1:], signature_of(other.stat()), bytes(32), b"")
    late.save()
    found = HashFile(os.fsencode(machine.cache))
    kept = found.find(os.fsencode(machine.library)[1:], signature_of(machine.library.stat()))
    assert kept is not None and kept.hash == digest
    assert found.find(os.fsencode(other)[1:], signature_of(other.stat())) is not None


def test_the_file_is_for_its_user_alone_and_a_place_that_cannot_be_written_is_no_error(machine: Machine) -> None:
    keep(machine, machine.library)
    assert (machine.cache / "hashes").stat().st_mode & 0o777 == 0o600
    nowhere = HashFile(b"/proc/nowhere")
    nowhere.keep(b"x", signature_of(machine.library.stat()), bytes(32), b"")
    nowhere.save()
