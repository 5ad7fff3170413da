"""A refresh as the daemon does it, without an event loop."""

from __future__ import annotations

from collections.abc import Iterator

from termite.master.export import Export
from termite.master.refresh import Refresh
from termite.wire.messages import Change


def refresh_steps(export: Export) -> Iterator[list[Change]]:
    refresh = Refresh(export)
    refresh.look()
    return refresh.steps()


def refreshed(export: Export) -> dict[bytes, Change]:
    """What mirrors are told, by path; the last of each."""
    return {change.path: change for step in refresh_steps(export) for change in step}
