"""The one way in which tests wait: until a condition holds, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["PATIENCE_SECONDS", "eventually"]

PATIENCE_SECONDS = 120.0
"""After so long something hangs: no slowness of a machine that is only busy lasts it."""


def eventually(
    holds: Callable[[], object],
    what: str | Callable[[], str] = "it did not come about",
    seconds: float = PATIENCE_SECONDS,
) -> None:
    """Wait until `holds` returns something true.

    Args:
        holds: looked at again and again; what it raises goes through.
        what: told when it does not come about; called only then.
        seconds: the longest wait; only a hang should last it.

    Raises:
        AssertionError: it did not hold in time.
    """
    give_up = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > give_up:
            told = what if isinstance(what, str) else what()
            raise AssertionError(f"{told} (waited {seconds:g} s)")
        time.sleep(0.002)
