"""Appends to a store until it is killed; run by the tests with ``python -m``.

Arguments: URL, rows per append, and the number of the statement of the third append before which
the process kills itself (0: never; the parent kills it).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from sqlalchemy import Engine, event

from oodmon.store.events import AgentSeen, Store
from tests.unit import store_facts as made

STATE_BYTES = 200_000


def state_of(index: int) -> bytes:
    """A state that says which append it belongs to, all through."""
    return index.to_bytes(4, "big") * (STATE_BYTES // 4)


def append(store: Store, index: int, rows: int) -> None:
    """The index-th append, with that many rows of windows and of events."""
    facts = [made.window(index, segment=f"s{row}", detectors=("msp",)) for row in range(rows)]
    store.append(
        [*facts, made.drift(index), made.alert(index)],
        state=state_of(index),
        positions={"p0": str(index), "p1": str(index)},
        outbox=[("sinks.log", made.event(f"e{index}-{row}")) for row in range(rows)],
        agents=[AgentSeen("agent", "digits", "1", index, made.START + index, index)],
    )


class Trap:
    """Kills the process before the statement of this number, once armed."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Append for ever, telling each commit."""
    url, rows, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    store = Store(url)
    store.open()
    snapshot = store.load()
    index = 0 if snapshot is None else int(snapshot.positions["p0"]) + 1
    begun = index
    while True:
        if number and index == begun + 2:
            trap = Trap(number)
            event.listen(Engine, "before_cursor_execute", trap)
            event.listen(Engine, "commit", trap)
        append(store, index, rows)
        sys.stdout.write(f"{index}\n")
        sys.stdout.flush()
        index += 1


if __name__ == "__main__":
    main()
