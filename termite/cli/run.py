"""What every program does around its own work: logs, signals, limits, the event loop, the exit status.

    def main(argv: Sequence[str] | None = None) -> int:
        return run_program("termite-worker", prepare, argv)

`prepare(argv)` reads the command line and gives a `Job`; nothing has been started before it returns.
A `TermiteError` from anywhere ends the program with one line on stderr and the status of its class.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from termite.cli.flags import Flag, Flags, HelpWanted
from termite.errors import TermiteError, UsageError
from termite.logs import one_line, send_stderr_to, start_logging
from termite.loop import be_woken_soon, favour_the_loop, loop_factory, settle_memory
from termite.web.pages import WebOptions
from termite.wire.address import format_address
from termite.wire.secret import find_secret, load_secret

log = logging.getLogger(__name__)

INTERNAL_ERROR = 70  # EX_SOFTWARE
INTERRUPTED = 130

Main = Callable[[asyncio.Event], Awaitable[int | None]]
"""The program's work.  Gets an event that is set when it is to stop, and returns the exit status."""


@dataclass(frozen=True)
class Job:
    """What to run, and how to report on it."""

    main: Main
    logfile: str = ""  # empty: stderr
    debug: bool = False
    stderr: str = ""  # a file in place of the stderr we were started with; empty: leave it


@dataclass(frozen=True)
class CommonFlags:
    """Flags that every daemon has."""

    secret: Flag[str]
    logfile: Flag[str]
    debug: Flag[bool]

    def key(self, environ: Mapping[str, str] = os.environ) -> bytes:
        """The contents of the secret file."""
        return load_secret(find_secret(self.secret.value or None, environ, Path.home()))

    def job(self, main: Main) -> Job:
        return Job(main, self.logfile.value, self.debug.value)


def web_options(flag: Flag[int | None], host: str, retries: int = 0) -> WebOptions | None:
    """A port that was asked for, or one of the `retries` after it, is had or is an error; the default is a wish."""
    if flag.value is None:
        return None
    if flag.is_given:
        return WebOptions(host, flag.value, retries, flag=f"-{flag.name}")
    return WebOptions(host, flag.value, or_any=True, flag=f"-{flag.name}")


def common_flags(flags: Flags) -> CommonFlags:
    """Adds them."""
    return CommonFlags(
        flags.text(
            "secret",
            "",
            "file with the secret that all programs share, readable by its owner only",
            "FILE",
            "$TERMITE_SECRET, ~/.config/termite/secret or /etc/termite/secret",
        ),
        flags.text("logfile", "", "append the log to this file; SIGHUP opens it anew", "FILE", "stderr"),
        flags.switch("debug", False, "log more: every command and every message of interest"),
    )


def run_program(program: str, prepare: Callable[[Sequence[str]], Job], argv: Sequence[str] | None = None) -> int:
    """Runs a program from its command line (default: the process's own) to its exit status."""
    try:
        job = prepare(sys.argv[1:] if argv is None else argv)
        if job.stderr:
            send_stderr_to(job.stderr)
        start_logging(job.logfile, job.debug)
        raise_descriptor_limit()
        be_woken_soon()
        settle_memory()
        favour_the_loop()
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_supervise(program, job))
    except HelpWanted as wanted:
        _print(sys.stdout, str(wanted))
        return 0
    except TermiteError as error:
        text = one_line(str(error))
        if logging.getLogger().handlers and not _logs_to_stderr():
            log.critical("%s", text)
        _print(sys.stderr, f"{program}: {text}")
        return error.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        log.critical("internal error", exc_info=error)
        _print(sys.stderr, f"{program}: internal error ({type(error).__name__}); the log says more")
        return INTERNAL_ERROR


async def _supervise(program: str, job: Job) -> int:
    """The program's work with its signals: the first one asks it to stop, the second one insists."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    work: asyncio.Future[int | None] = asyncio.ensure_future(job.main(stop))

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("%s again: ending at once", number.name)
            work.cancel()
        else:
            log.info("%s: stopping", number.name)
            stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        has_files = bool(job.logfile or job.stderr)
        loop.add_signal_handler(signal.SIGHUP, *((_reopen, job) if has_files else (on_signal, signal.SIGHUP)))
    try:
        return await work or 0
    except asyncio.CancelledError:
        if stop.is_set():
            return INTERRUPTED
        raise


def _reopen(job: Job) -> None:
    """SIGHUP: files may have been moved away.  For the log file that is looked at before every line anyway."""
    try:
        if job.stderr:
            send_stderr_to(job.stderr)
    except UsageError as error:
        log.error("%s", error)
    log.info("SIGHUP: files opened anew")


ENOUGH_FILES = 4096
"""Open files that a large build may need: a few for every command that runs, one for every large file on its way."""


def raise_descriptor_limit() -> None:
    """As many open files as the system lets us have without asking anybody; says what to do if that is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.warning("at most %d open files: %s", soft, error)
    if hard != resource.RLIM_INFINITY and hard < ENOUGH_FILES:
        log.warning("at most %d open files; large builds need %d: ulimit -Hn %d", hard, ENOUGH_FILES, ENOUGH_FILES)


def _logs_to_stderr() -> bool:
    return any(type(handler) is logging.StreamHandler for handler in logging.getLogger().handlers)


def _print(stream: Any, text: str) -> None:
    """To someone who may have gone away."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        pass


def write_port_file(path: Path, host: str, port: int) -> None:
    """Whoever sees the file sees all of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        part.write_text(f"{format_address(host, port)}\n")
        part.rename(path)
    except OSError as error:
        raise UsageError(f"-port-file {path}: {error.strerror}; name a file that can be written") from None
