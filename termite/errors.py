"""Every failure that can happen to a user, one class each, with the exit status its program ends with.

A message says what failed, on what, and what to try.  Only `cli/` turns one into an exit; across the
wire it travels as the class name and the text (`Failure` in `wire/messages.py`).
"""

from __future__ import annotations


class TermiteError(Exception):
    """Base of all of them; the text is the whole message, one line."""

    exit_status = 1


class UsageError(TermiteError):
    """The command line or a configuration file is wrong; nothing was started."""

    exit_status = 2


class SecretError(UsageError):
    """The secret is missing, empty, or readable by others."""


class RuleError(UsageError):
    """`.termite-localrc` does not parse; names file, line and reason."""


class AuthError(TermiteError):
    """The peer does not hold our secret, or is not one of ours; the connection is closed."""

    exit_status = 3


class WireError(TermiteError):
    """The peer broke the protocol; the connection is closed."""

    exit_status = 4


class PeerLost(TermiteError):
    """The connection ended or the peer fell silent; what was asked may or may not have happened."""

    exit_status = 4


class Timeout(PeerLost):
    """An answer did not come in its time."""


class Refused(TermiteError):
    """The peer understood and will not do it; asking again elsewhere may help."""

    exit_status = 5


class Leaving(Refused):
    """The worker is about to end and has not begun this task; nothing is wrong with either."""


class MountError(TermiteError):
    """/dev/fuse, libfuse2, or the permission to mount is missing; says which and what to install."""

    exit_status = 6


class BoxError(TermiteError):
    """The box for a task could not be made; the task never started."""

    exit_status = 6


class StoreError(TermiteError):
    """The content store cannot be written (full, read-only) or holds what it should not."""

    exit_status = 7


class PathError(TermiteError):
    """A path leaves the root it must stay inside."""


class PrivateError(TermiteError):
    """The file may not be shown to workers (no group/other permission, or excluded)."""


class ReplayError(TermiteError):
    """A result could not be put into the project tree; the tree holds either all of a file or none of it."""


class NoWorker(TermiteError):
    """No worker can take the command now."""


class Canceled(TermiteError):
    """The one who asked is gone; the task was ended."""


def by_name(name: str) -> type[TermiteError]:
    """The class with this name, for a failure that crossed the wire; unknown names give the base."""
    found = globals().get(name)
    if isinstance(found, type) and issubclass(found, TermiteError):
        return found
    return TermiteError
