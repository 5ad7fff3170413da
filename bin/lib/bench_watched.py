"""A termite-master that can tell for how long its event loop was held up; takes termite-master's command line.

SIGUSR1 begins to watch, SIGUSR2 ends it and writes the longest time in seconds to the file that $BENCH_BLOCK_FILE
names.  While nobody watches, it is the same as termite-master.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import termite.cli.master
from termite.master.daemon import Master

BEAT_S = 0.001
BLOCK_FILE = "BENCH_BLOCK_FILE"


class WatchedMaster(Master):
    """Its loop is to wake a task every millisecond; how late it does is how long it was blocked."""

    async def start(self) -> None:
        await super().start()
        self._watching: asyncio.Task[None] | None = None
        self._longest_s = 0.0
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self._watch)
        loop.add_signal_handler(signal.SIGUSR2, self._tell)

    def _watch(self) -> None:
        self._longest_s = 0.0
        self._watching = asyncio.get_running_loop().create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            due = time.monotonic() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self._longest_s = max(self._longest_s, time.monotonic() - due)

    def _tell(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        part = Path(f"{os.environ[BLOCK_FILE]}.part")
        part.write_text(f"{self._longest_s}\n")
        part.rename(os.environ[BLOCK_FILE])


if __name__ == "__main__":
    termite.cli.master.Master = WatchedMaster  # type: ignore[attr-defined]
    sys.exit(termite.cli.master.main())
