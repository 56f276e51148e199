"""Signals → flags: SIGTERM and SIGINT end, a second SIGINT forces, SIGHUP reloads."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Protocol

__all__ = ["Signals", "Stoppable"]


class Stoppable(Protocol):
    """What the signals are for."""

    def stop(self, *, force: bool = False) -> None:
        """End; forced: at once."""

    def hang_up(self) -> None:
        """Reload."""


class Signals:
    """Handles signals within a ``with`` block; does nothing outside of the main thread."""

    def __init__(self, service: Stoppable) -> None:
        self._service = service
        self._interrupts = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                self._before[number] = signal.signal(number, self._handle)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGHUP:
            self._service.hang_up()
            return
        self._interrupts += number == signal.SIGINT
        self._service.stop(force=self._interrupts > 1)
