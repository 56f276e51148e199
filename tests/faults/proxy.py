"""A TCP proxy before the broker: slow, refusing, silent, or swallowing acknowledgements, on demand.

It listens on another loopback address and the broker's port, and puts its own address in place of
the broker's in what the broker says of itself: clients then come back to the proxy.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Final

BROKER: Final = b"127.0.0.1"
DOORS: Final = ("127.0.0.2", "127.0.0.4")
"""As long as the broker's own address, which is replaced in its answers."""
_PRODUCE: Final = 0


class Proxy:
    """One proxy, its threads, and how it behaves at present.

    Args:
        port: of the broker, and of the proxy on its own address.
        door: that address, one of `DOORS`.

    Attributes:
        mode: ``pass``, ``slow``, ``refuse``, ``silent`` (nothing comes through) or ``unheard`` (the
            connection is cut after the next produce request, before its answer).
        address: for clients.
        cut: acknowledgements that were swallowed.
    """

    def __init__(self, port: int, door: str = DOORS[0]) -> None:
        self.mode = "pass"
        self.delay_seconds = 0.0
        self.cut = 0
        self._port = port
        self._ended = False
        self._pairs: set[socket.socket] = set()
        self._door = door.encode()
        self._listener = socket.create_server((door, port))
        self.address = f"{door}:{port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def set(self, mode: str, delay_seconds: float = 0.0) -> None:
        """Behave otherwise; whoever refuses also cuts the connections that there are."""
        self.delay_seconds = delay_seconds
        self.mode = mode
        if mode == "refuse":
            self._cut_all()

    def close(self) -> None:
        """End."""
        self._ended = True
        self._listener.close()
        self._cut_all()

    def _cut_all(self) -> None:
        for one in list(self._pairs):
            _cut(one)

    def _accept(self) -> None:
        while not self._ended:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "refuse":
                _cut(client)
                continue
            try:
                broker = socket.create_connection((BROKER.decode(), self._port), 1.0)
            except OSError:
                _cut(client)
                continue
            broker.settimeout(None)
            self._pairs |= {client, broker}
            doomed = threading.Event()
            for way in ((client, broker, True), (broker, client, False)):
                threading.Thread(target=self._pump, args=(*way, doomed), daemon=True).start()

    def _pump(
        self, source: socket.socket, target: socket.socket, up: bool, doomed: threading.Event
    ) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                while self.mode == "silent" and not self._ended:
                    time.sleep(0.01)
                if self.mode == "slow":
                    time.sleep(self.delay_seconds)
                if not up and doomed.is_set():
                    break  # the broker has answered: it took the records, and nobody hears of it
                if up and self.mode == "unheard" and _is_produce(data):
                    self.mode = "pass"
                    self.cut += 1
                    doomed.set()
                target.sendall(data if up else data.replace(BROKER, self._door))
        for one in (source, target):
            self._pairs.discard(one)
            _cut(one)


def _is_produce(data: bytes) -> bool:
    return len(data) > 8 and struct.unpack_from(">h", data, 4)[0] == _PRODUCE


def _cut(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
