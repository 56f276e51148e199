"""A port and the thread that accepts on it: what the management port and the intake share."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Generic, TypeVar

from oodmon.errors import ConfigError

__all__ = ["Listener", "Server"]

_log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.2
_PATIENCE_SECONDS: Final = 2.0


class Server(ThreadingHTTPServer):
    """Listens from construction until `server_close`, with a thread per request.

    Args:
        address: host and port; port 0 takes any free one.
        handler: answers one request.
        max_requests: at a time; whoever comes when all are busy is turned away.
    """

    daemon_threads = True
    # A request that hangs must not hold up the end of the daemon.
    block_on_close = False

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], max_requests: int
    ) -> None:
        self._free = threading.BoundedSemaphore(max_requests)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without looking the host name up, which may take seconds without DNS."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        host, port = self.socket.getsockname()[:2]
        self.server_name, self.server_port = str(host), int(port)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for it, or none where all are busy."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.turn_away(request)

    def turn_away(self, request: Any) -> None:
        """All are busy."""
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In a thread of its own."""
        try:
            self.serve(request, client_address)
        finally:
            self._free.release()

    def serve(self, request: Any, client_address: Any) -> None:
        """Answer, and close the connection."""
        super().process_request_thread(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""
        del request
        _log.debug("request from %s failed", client_address, exc_info=True)


S = TypeVar("S", bound=Server)


class Listener(Generic[S]):
    """A server at work, from `start` to `stop`.

    Args:
        name: of the thread.
        section: of the configuration, for the message where the address cannot be had.
    """

    def __init__(self, name: str, section: str) -> None:
        self._name = name
        self._section = section
        self._thread: threading.Thread | None = None
        self.server: S | None = None

    @property
    def port(self) -> int:
        """The port that it listens on; 0 where it does not."""
        return 0 if self.server is None else int(self.server.server_address[1])

    def start(self, make: Callable[[], S], host: str, port: int) -> None:
        """Listen; `ConfigError` where the address cannot be had."""
        try:
            self.server = make()
        except OSError as error:
            raise ConfigError(
                [f"{self._section}: cannot listen on {host}:{port}: {error.strerror or error}"]
            ) from None
        self._thread = threading.Thread(
            target=self.server.serve_forever,
            kwargs={"poll_interval": _POLL_SECONDS},
            name=self._name,
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        """Listen no more. Safe twice, safe without `start`."""
        server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)

    @property
    def ended(self) -> bool:
        """Its thread is gone, or never was."""
        return self._thread is None or not self._thread.is_alive()
