"""The command line, one file per verb group."""

from __future__ import annotations

import sys

__all__ = ["main"]

try:
    from oodmon.cli.program import main
except KeyboardInterrupt:  # Ctrl-C before there is anything that could answer it
    sys.exit(130)
