"""``python -m oodmon``: the same as the `oodmon` command."""

from __future__ import annotations

from oodmon.cli import main

if __name__ == "__main__":
    main(prog_name="oodmon")
