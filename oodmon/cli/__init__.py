"""The command line, one file per verb group."""

from __future__ import annotations

from oodmon.cli.program import main

__all__ = ["main"]
