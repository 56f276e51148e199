"""Servers that misbehave whatever the protocol: refuse, fall silent, hang up, talk nonsense."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

__all__ = ["MANNERS", "THREAD_NAME", "hostile"]

THREAD_NAME: Final = "oodmon-hostile"

_NONSENSE: Final = b"\x00\x00\x00\x0cnonsense\r\n\r\n" * 16
_DRIP_SECONDS: Final = 0.05
_ACCEPT_SECONDS: Final = 0.05

_Manner = Callable[[socket.socket, threading.Event], None]


def _silent(client: socket.socket, closing: threading.Event) -> None:
    """Take everything and never answer."""
    client.settimeout(_ACCEPT_SECONDS)
    while not closing.is_set():
        try:
            if not client.recv(65_536):
                return
        except TimeoutError:
            continue


def _hangs_up(client: socket.socket, closing: threading.Event) -> None:
    """Read a little, then close."""
    del closing
    client.settimeout(_ACCEPT_SECONDS)
    client.recv(1024)


def _nonsense(client: socket.socket, closing: threading.Event) -> None:
    """Answer at once with what no protocol says."""
    client.sendall(_NONSENSE)
    _silent(client, closing)


def _drips(client: socket.socket, closing: threading.Event) -> None:
    """Answer byte by byte, so that no single read ever times out."""
    while not closing.wait(_DRIP_SECONDS):
        client.sendall(b"H")


_ANSWERING: Final[Mapping[str, _Manner]] = {
    "is silent": _silent,
    "hangs up": _hangs_up,
    "talks nonsense": _nonsense,
    "drips": _drips,
}

MANNERS: Final = ("refuses", *_ANSWERING)
"""In words that fit after "a server that"."""


@contextmanager
def hostile(manner: str) -> Iterator[str]:
    """A server of these manners on loopback; gives its ``host:port``."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    if manner == "refuses":
        listener.close()
        yield address
        return
    closing = threading.Event()
    threads: list[threading.Thread] = []
    behave = _ANSWERING[manner]

    def serve(client: socket.socket) -> None:
        with client:
            try:
                behave(client, closing)
            except OSError:
                return  # the other side has gone, as it may

    def accept() -> None:
        listener.settimeout(_ACCEPT_SECONDS)
        while not closing.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            client.settimeout(_ACCEPT_SECONDS)
            threads.append(threading.Thread(target=serve, name=THREAD_NAME, args=(client,)))
            threads[-1].start()

    acceptor = threading.Thread(target=accept, name=THREAD_NAME)
    acceptor.start()
    try:
        yield address
    finally:
        closing.set()
        acceptor.join()
        listener.close()
        for thread in threads:
            thread.join()
