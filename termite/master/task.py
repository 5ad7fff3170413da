"""One command on its way to a worker and back.

Holds what the command is, where it was tried, and how much of its output the caller has seen.  Loop only.
"""

from __future__ import annotations

import logging

from termite import paths
from termite.command.direct import Direct, without_shell
from termite.command.shell import command_text
from termite.master.local import FLAG_DEBUG, FLAG_MERGED, FLAG_STDIN, Caller, LocalRequest

log = logging.getLogger(__name__)

_DROPPED = (b"LD_PRELOAD=", b"TERMITE_")
_KEPT = (b"TERMITE_DEBUG=",)


def remote_environment(env: list[bytes]) -> list[bytes]:
    """The environment without what has a meaning on this machine only.

    A wrapper that is started inside a box (a makefile may name it as SHELL) just runs its command.
    """
    kept = [e for e in env if not e.startswith(_DROPPED)]
    if len(kept) != len(env):
        kept += [e for e in env if e.startswith(_KEPT)]
    return [*kept, b"TERMITE_LOCAL=1"]


def _value(env: list[bytes], name: bytes) -> bytes:
    return next((e[len(name) + 1 :] for e in env if e.startswith(name + b"=")), b"")


def _short(text: bytes) -> str:
    shown = paths.for_people(text)
    return shown if len(shown) <= 300 else shown[:297] + "..."


class Task:
    """`id` is unique in this master and stands in every log line about the task."""

    def __init__(self, id: int, request: LocalRequest, caller: Caller) -> None:
        self.id = id
        self.request = request
        self.caller = caller
        self.env = remote_environment(request.env)
        self.cwd = paths.relative(request.cwd)
        self.text = command_text(request.program, request.argv)
        self.merged = bool(request.flags & FLAG_MERGED)
        self.has_stdin = bool(request.flags & FLAG_STDIN)
        self.debug = bool(request.flags & FLAG_DEBUG)
        self.tried: set[str] = set()  # workers that lost it
        self.failures = 0  # how often it was lost
        self.last_failure = ""
        self.worker = ""  # that ran it
        self.brought_bytes = 0  # contents that its results held
        self.conflicts = 0  # other commands that changed the same files meanwhile
        self.sent_ns = 0  # our clock, of the last try
        self.received_ns = 0
        self._shown = [0, 0, 0]  # bytes the caller has of each stream, over all tries
        self._seen = [0, 0, 0]  # bytes of each stream in the current try
        self.stdin_read = False

    def label(self) -> str:
        """The command as one short line for messages."""
        text = paths.for_people(self.text)
        return text if len(text) <= 120 else text[:117] + "..."

    def direct(self) -> Direct | None:
        """What a box can do instead of starting the command's shell."""
        request = self.request
        return without_shell(request.program, request.argv, request.cwd, request.env)

    def note(self, text: str) -> None:
        """A line in the log, if -debug asks for it for all commands, or TERMITE_DEBUG or a rule for this one."""
        log.log(logging.INFO if self.debug else logging.DEBUG, "task %d: %s", self.id, text)

    def origin(self) -> str:
        """Where the command comes from; what make said that it is for (`MAKE_TARGET`, `MAKE_DEPS`), if it did."""
        target, deps = (_value(self.request.env, name) for name in (b"MAKE_TARGET", b"MAKE_DEPS"))
        parts = [f"pid {self.caller.pid} in {_short(self.request.cwd)}"]
        parts += [f"target {_short(target)}"] if target else []
        parts += [f"from {_short(deps)}"] if deps else []
        return ", ".join(parts)

    def begin_try(self) -> None:
        """Another worker starts from the beginning: what was shown already will not be shown again."""
        self._seen = [0, 0, 0]

    def show(self, stream: int, data: bytes) -> None:
        """Passes output on to the caller, less what an earlier try has shown."""
        start = self._seen[stream]
        self._seen[stream] += len(data)
        fresh = data[max(0, self._shown[stream] - start) :]
        if fresh:
            self._shown[stream] += len(fresh)
            self.caller.output(stream, fresh)

    async def output(self, stream: int, data: bytes) -> None:
        """Output of a command that still runs; returns when the caller has room for more."""
        if stream in (1, 2):
            self.show(stream, data)
            await self.caller.drained()

    async def read_stdin(self) -> bytes:
        self.stdin_read = True
        return await self.caller.read_stdin()
