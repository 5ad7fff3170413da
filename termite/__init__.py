"""Termite: a generic distributed compilation system."""

__version__ = "0.1.0"
