"""The daemon's end of the scoring process: started when needed, bounded, replaced when it fails."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from oodmon.errors import RetryLater, StateError, WireError
from oodmon.wire import pack, unpack

__all__ = ["Annex"]

_log = logging.getLogger(__name__)

_MAX_FRAME_BYTES: Final = 1 << 28
_START_SECONDS: Final = 120.0  # importing torch and loading states, on a busy machine
_PAUSE_SECONDS: Final = 5.0  # between two starts of a process that fails


class Annex:
    """Scores logits, one request at a time; others wait in line, up to a limit.

    Args:
        states: folder of what was learnt.
        detectors: ids; none takes all that read logits only.
        queue: requests that may wait.
        timeout_seconds: for one request; a process that takes longer is replaced.
    """

    def __init__(
        self,
        states: str,
        detectors: Sequence[str] = (),
        *,
        queue: int = 64,
        timeout_seconds: float = 10.0,
    ) -> None:
        self._command = [sys.executable, "-m", "oodmon.scoring", states, *detectors]
        self._places = threading.BoundedSemaphore(queue)
        self._turn = threading.Lock()
        self._timeout = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._failed_at = float("-inf")
        self._stopped = False
        self.digests: Mapping[str, str] = {}

    def start(self) -> None:
        """Start the process and hear what it has; `StateError` says why it cannot."""
        with self._turn:
            self._start()
        if not self.digests:
            self.stop()
            raise StateError("daemon.intake.states: no detector there reads logits only")

    def score(
        self, logits: npt.NDArray[np.float32]
    ) -> tuple[Mapping[str, npt.NDArray[np.float32]], Mapping[str, str]]:
        """Detector → scores, float32 (B,), and detector → digest.

        Raises:
            RetryLater: the line is full, or the process failed and is being replaced.
        """
        if not self._places.acquire(blocking=False):
            raise RetryLater("the scoring queue is full", 1.0)
        try:
            with self._turn:
                return self._score(logits)
        finally:
            self._places.release()

    def stop(self) -> None:
        """End the process. Safe twice."""
        self._stopped = True
        self._end()

    def _score(
        self, logits: npt.NDArray[np.float32]
    ) -> tuple[Mapping[str, npt.NDArray[np.float32]], Mapping[str, str]]:
        if self._process is None:
            if self._stopped or time.monotonic() - self._failed_at < _PAUSE_SECONDS:
                raise RetryLater("the scoring process is not there", _PAUSE_SECONDS)
            try:
                self._start()
            except StateError as error:
                raise RetryLater(str(error), _PAUSE_SECONDS) from error
        try:
            arrays, _ = self._ask(pack({"logits": logits}, {}), self._timeout)
        except (OSError, WireError, ValueError) as error:
            self._end()
            self._failed_at = time.monotonic()
            _log.error("the scoring process failed and is replaced: %s", error)
            raise RetryLater("the scoring process failed", _PAUSE_SECONDS) from error
        for name, column in arrays.items():
            if column.dtype != np.float32 or column.shape != (len(logits),):
                raise RetryLater(f"{name}: no scores came back", _PAUSE_SECONDS)
        return arrays, self.digests

    def _start(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603  our own module, no shell
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=True
        )
        try:
            _, meta = self._ask(b"", _START_SECONDS)
        except (OSError, WireError, ValueError) as error:
            self._end()
            self._failed_at = time.monotonic()
            raise StateError(f"the scoring process does not start: {error}") from error
        if "error" in meta:
            self._end()
            self._failed_at = time.monotonic()
            raise StateError(meta["error"])
        self.digests = {name.removeprefix("digest."): digest for name, digest in meta.items()}

    def _ask(
        self, data: bytes, seconds: float
    ) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
        """One frame there (or none), one back. A process that is too slow is killed."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise OSError("it is gone")
        watchdog = threading.Timer(seconds, process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            if data:
                process.stdin.write(len(data).to_bytes(4, "little") + data)
                process.stdin.flush()
            length = int.from_bytes(_exactly(process.stdout, 4), "little")
            if length > _MAX_FRAME_BYTES:
                raise WireError(f"a frame of {length} bytes")
            return unpack(_exactly(process.stdout, length))
        finally:
            watchdog.cancel()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError as error:
                    _log.debug("a pipe to the scoring process did not close: %s", error)


def _exactly(source: IO[bytes], count: int) -> bytes:
    data = source.read(count)
    if len(data) < count:
        raise OSError("it ended")
    return data
