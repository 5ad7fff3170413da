"""Trees and commands for what the master does itself, and what the real commands do with them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from termite.master.shortcuts import ShortcutResult, find_shortcut


def sh(script: str | bytes, shell: str = "/bin/sh") -> tuple[bytes, list[bytes]]:
    text = script.encode() if isinstance(script, str) else script
    return shell.encode(), [shell.encode(), b"-c", text]


def snapshot(root: Path) -> dict[str, tuple[int, str]]:
    """Every name below root with its mode and contents."""
    found = {}
    for path in sorted(root.rglob("*")):
        st = path.lstat()
        contents = os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else ""
        found[str(path.relative_to(root))] = (st.st_mode, contents)
    return found


def populate(root: Path) -> Path:
    """A tree with one of everything; returns its root."""
    (root / "d" / "e" / "f").mkdir(parents=True)
    (root / "d" / "file").write_text("1")
    (root / "d" / "link").symlink_to("../plain")
    (root / "d" / "e" / "outward").symlink_to("/etc")
    (root / "plain").write_text("2")
    (root / "empty").mkdir()
    (root / "dirlink").symlink_to("d")
    (root / "dangling").symlink_to("nowhere")
    (root / "s p").mkdir()
    (root / "here").mkdir()
    return root


def perform(
    program: bytes, argv: list[bytes], root: Path, cwd: Path | None = None, umask: int = 0o022, **env: str
) -> ShortcutResult | None:
    settings = [f"{name}={value}".encode() for name, value in env.items()]
    shortcut = find_shortcut(program, argv, os.fsencode(cwd or root / "here"), umask, settings)
    return shortcut.perform(os.fsencode(root)) if shortcut else None


def really(argv: list[bytes], cwd: Path, umask: int = 0o022) -> subprocess.CompletedProcess[bytes]:
    env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
    return subprocess.run(argv, cwd=cwd, umask=umask, capture_output=True, timeout=20, check=False, env=env)
