"""The bounded, leak-checking `run` of the wire tests serves here too."""

from tests.wire.conftest import run

__all__ = ["run"]
