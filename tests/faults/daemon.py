"""A daemon process for the fault runs: the product's parts, faster, on a clock that jumps.

Arguments: config, folder, port. The folder's file ``clock`` holds eight bytes: by how many
nanoseconds the wall clock is off at present.
"""

from __future__ import annotations

import logging
import mmap
import struct
import sys
import time
from pathlib import Path

from oodmon.cli.run import parts_of
from oodmon.config import build
from oodmon.config.parse import load
from oodmon.daemon.backoff import Backoff
from oodmon.daemon.parts import Pace
from oodmon.daemon.service import Service
from oodmon.daemon.upkeep import Retention
from tests.streams import EPOCH, SECOND

PACE = Pace(
    group_batches=32,
    group_seconds=0.05,
    poll_seconds=0.02,
    advance_seconds=0.05,
    sample_seconds=0.25,
    upkeep_seconds=0.25,
    retry_seconds=0.02,
    max_retry_seconds=0.2,
    grace_seconds=5.0,
)
BACKOFF = Backoff(initial_seconds=0.05, max_seconds=0.3, timeout_seconds=0.5)

# Event time runs faster than the wall clock here, so the wall clock must stay behind it: it is the
# batches that close windows, and a run does not depend on how busy the machine is.
_BEGIN = EPOCH - 3600 * SECOND


class WrongClock:
    """Wall time since `_BEGIN`, off by what the file says."""

    def __init__(self, path: Path) -> None:
        self._began = time.monotonic_ns()
        with path.open("r+b") as file:
            self._offset = mmap.mmap(file.fileno(), 8)

    def __call__(self) -> int:
        """ns UTC."""
        (offset,) = struct.unpack_from("<q", self._offset)
        return int(_BEGIN + time.monotonic_ns() - self._began + offset)


def main() -> int:
    """Run until told to stop."""
    config, folder, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    logging.basicConfig(level="INFO", format="%(relativeCreated)d %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    checked = load(config, "daemon")
    half = build.daemon_half(checked)
    return Service(
        parts=parts_of(checked),
        reader=half.feed.component.reader,
        store=build.store(checked),
        http=("127.0.0.1", port),
        clock=WrongClock(folder / "clock"),
        retention=Retention(half.store.retention_days, half.store.max_bytes),
        pace=PACE,
        backoff=BACKOFF,
    ).run()


if __name__ == "__main__":
    sys.exit(main())
