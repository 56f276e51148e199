"""What signals and requests ask of the loop: flags only, heeded between two groups."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

__all__ = ["Asked"]


class Asked:
    """Thread-safe flags: end, end at once, reload."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._reloads: list[Future[str | None]] = []
        self._hung_up = False
        self._closed = "the daemon is starting"
        self.forced = False

    def stop(self, *, force: bool = False) -> None:
        """End; forced: without waiting for deliveries."""
        self.forced = self.forced or force
        self._end.set()

    def hang_up(self) -> None:
        """Reload, as SIGHUP does."""
        # No lock: a signal handler may interrupt whoever holds it.
        self._hung_up = True

    @property
    def stopping(self) -> bool:
        """Somebody asked for the end."""
        return self._end.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait, but not beyond a call of `stop`: True where there was one."""
        return self._end.wait(seconds)

    def open(self) -> None:
        """The loop runs: reloads are taken."""
        with self._lock:
            self._closed = ""

    def close(self) -> None:
        """The loop has ended: nobody waits for a reload any more."""
        with self._lock:
            self._closed = "the daemon is stopping"
            left, self._reloads = self._reloads, []
        for future in left:
            future.set_result(self._closed)

    def reload(self, timeout_seconds: float = 60.0) -> str | None:
        """Reload and wait for the outcome: none when it took effect, else why it did not."""
        outcome: Future[str | None] = Future()
        with self._lock:
            if self._closed:
                return self._closed
            self._reloads.append(outcome)
        try:
            return outcome.result(timeout_seconds)
        except FutureTimeout:
            return f"the reload did not end within {timeout_seconds:g} s"

    def reloads(self) -> tuple[bool, list[Future[str | None]]]:
        """Whether a reload was asked for, and who waits for the outcome; both are forgotten."""
        hung_up, self._hung_up = self._hung_up, False
        with self._lock:
            waiting, self._reloads = self._reloads, []
        return hung_up or bool(waiting), waiting
