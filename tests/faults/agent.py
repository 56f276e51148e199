"""An agent process for the fault runs: writes the batches that it is told to, and says how far.

Reads one JSON object per line: ``{"folder", "agent", "seed", "at"}`` opens a spool and ``{"topic",
"address", …}`` a topic, ``{"to"}`` writes up to that batch, ``{"to", "fault": "torn" | "flipped" |
"killed"}`` does harm on the way. A line answers each, over a topic once all is acknowledged.
A batch that the feed does not take is offered again: agents of the product shed it instead, and
the runs are about what was accepted.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from oodmon.contracts import Writer
from oodmon.feeds.kafka import Kafka, KafkaWriter
from oodmon.feeds.spool import Spool
from oodmon.feeds.spool.append import SpoolWriter
from oodmon.feeds.spool.segments import frame_of
from oodmon.records import ScoreBatch
from oodmon.wire import encode_batch
from tests.streams import EPOCH, SECOND, batch

AGENTS = 3
STEPS = 240
ROWS = 48
STEP_SECONDS = 0.1
_NOVEL = (range(70, 120), range(160, 190))
_LAST_SECONDS = STEPS * STEP_SECONDS + 60.0
_AGAIN_SECONDS = 0.005


def made(number: int, agent: int, seed: int) -> ScoreBatch:
    """Batch `number` of an agent, the same in every run of this seed; `STEPS` is the last."""
    rng = np.random.default_rng((seed, agent, number))
    seconds = number * STEP_SECONDS + agent * 0.03 if number < STEPS else _LAST_SECONDS
    shift = 2.5 if any(number in span for span in _NOVEL) else 0.0
    return batch(
        rng.normal(size=ROWS) + shift,
        seconds=seconds,
        sequence=number,
        source=f"agent-{agent}",
        predicted=rng.integers(0, 4, ROWS).astype(np.int32),
        segment=rng.integers(0, 2, ROWS).astype(np.int32),
        segments=("eu", "us"),
    )


def _append(writer: SpoolWriter, data: bytes) -> None:
    """Past the writer, at the end of the segment that it writes."""
    segment = max(writer.folder.glob("*.seg"))
    descriptor = os.open(segment, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _harm(writer: Writer, fault: str, one: ScoreBatch) -> None:
    if fault == "killed":  # what was accepted may be on its way, acknowledged or neither
        writer.put(one)
        os.kill(os.getpid(), signal.SIGKILL)
    assert isinstance(writer, SpoolWriter)
    frame = bytearray(frame_of(encode_batch(one)))
    if fault == "torn":
        _append(writer, bytes(frame[: len(frame) * 2 // 3]))
        os.kill(os.getpid(), signal.SIGKILL)
    bit = int(np.random.default_rng(one.sequence).integers(16 * 8, len(frame) * 8))
    frame[bit // 8] ^= 1 << bit % 8
    _append(writer, bytes(frame))


def _opened(asked: dict[str, Any]) -> Writer:
    source = f"agent-{asked['agent']}"
    if "topic" in asked:
        servers = (asked["address"],)
        return Kafka(servers, asked["topic"], timeout_seconds=2.0).writer(source)
    folder = str(Path(asked["folder"]))
    return Spool(folder, max_bytes=1 << 25, segment_bytes=1 << 16).writer(source)


def _acknowledged(writer: Writer) -> bool:
    return not (isinstance(writer, KafkaWriter) and writer._queue)


def main() -> None:
    """Serve the driver until its end of the pipe is closed."""
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    writer: Writer | None = None
    agent = seed = at = 0
    for line in sys.stdin:
        asked = json.loads(line)
        if "agent" in asked:
            if writer is not None:
                writer.close()
            agent, seed, at = asked["agent"], asked["seed"], asked["at"]
            writer = _opened(asked)
        assert writer is not None
        fault = asked.get("fault", "")
        while at < asked.get("to", at):
            one = made(at, agent, seed)
            while not writer.put(one):
                time.sleep(_AGAIN_SECONDS)
            at += 1
            if fault:
                _harm(writer, fault, made(at, agent, seed))
                fault = ""
        while not _acknowledged(writer):
            time.sleep(_AGAIN_SECONDS)
        sys.stdout.write(f"{at}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

__all__ = ["AGENTS", "EPOCH", "SECOND", "STEPS", "made"]
