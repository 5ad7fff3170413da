"""A file system's clock, which stands still for some milliseconds at a time."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def tick(directory: Path) -> None:
    """Returns when a change in this file system has another time than all that were made before."""
    with tempfile.NamedTemporaryFile(dir=directory.parent) as file:
        before = os.fstat(file.fileno()).st_ctime_ns
        while os.fstat(file.fileno()).st_ctime_ns == before:
            os.fchmod(file.fileno(), 0o600)
