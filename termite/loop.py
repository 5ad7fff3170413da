"""How a daemon's event loop runs: uvloop's if it is installed, and seldom interrupted by the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import importlib
import sys
from collections.abc import Callable
from typing import Any


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """For asyncio.Runner; asyncio's own costs three times as much."""
    try:
        uvloop: Any = importlib.import_module("uvloop")
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def settle_memory() -> None:
    """To be called when all is imported: what there is now will stay, so it is not searched for garbage again.

    What comes later is mostly freed by its reference count; the rest can wait a while.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def favour_the_loop() -> None:
    """A thread that computes in Python gives way to the event loop after a millisecond, instead of five."""
    sys.setswitchinterval(0.001)
