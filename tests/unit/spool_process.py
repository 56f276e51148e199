"""An agent's end of a spool in a process of its own, to be killed, limited or forked by tests.

Prints the sequence of each batch that `put` accepted, one a line, after it was accepted.
"""

from __future__ import annotations

import json
import os
import resource
import sys

import numpy as np

from oodmon.feeds.spool import Spool
from oodmon.records import ScoreBatch


def batch(source: str, sequence: int, rows: int = 64) -> ScoreBatch:
    """Scores that tell source and sequence, so that a mixed-up frame would be seen."""
    return ScoreBatch(
        model="digits",
        version="1",
        source=source,
        sequence=sequence,
        observed_at=1_000_000 + sequence,
        scores={"msp": np.full(rows, sequence, np.float32)},
    )


def main() -> None:
    """Options as JSON: the spool's, and source, count, rows, file_limit_bytes."""
    options = json.loads(sys.argv[1])
    source, count, rows = options.pop("source"), options.pop("count"), options.pop("rows", 64)
    limit = options.pop("file_limit_bytes", 0)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if "torch" in sys.modules:
        raise SystemExit("the feed imported torch")
    writer = Spool(**options).writer(source)
    for sequence in range(count):
        accepted = writer.put(batch(source, sequence, rows))
        line = f"{sequence}\n" if accepted else f"shed {sequence} {writer.last_failure}\n"
        os.write(1, line.encode())
    writer.close()


if __name__ == "__main__":
    main()
