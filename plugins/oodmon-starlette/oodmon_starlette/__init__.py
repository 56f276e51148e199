"""ASGI middleware that tells oodmon whose samples a Starlette or FastAPI service scores.

    app.add_middleware(OodmonMiddleware, segment_header="x-tenant", segments=["de", "fr"])

While a request is handled, every forward pass of a watched model is named after it. The name
travels in the context, so it reaches async endpoints and those that run in the thread pool alike.
"""

from __future__ import annotations

import string
import uuid
from collections.abc import Callable, Collection
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oodmon import request

__all__ = ["OTHER", "OodmonMiddleware"]

__version__ = "0.1.0"

OTHER: Final = "other"
"""Segment of requests whose own is not on the list."""

_LONGEST_ID: Final = 128
_ID_CHARACTERS: Final = frozenset(string.ascii_letters + string.digits + "-_.:/@+=")


class OodmonMiddleware:
    """Carries the request's id and segment to the agents of this process.

    Args:
        app: the application within.
        id_header: where a request's id is read from. One that is missing, longer than 128
            characters or not made of letters, digits and ``-_.:/@+=`` is replaced by a new one:
            ids end up in databases and messages.
        echo: send the id back in the same header.
        segment_header: where a request's segment is read from; "" for none.
        segments: the segments there may be; others become `OTHER`. Every segment is a stream of its
            own that drift tests share their budget with, so clients must not be able to make
            up new ones: without a list, a `segment_header` is refused.
        segment: computes the segment from the ASGI scope instead, for instance from the path. What
            it raises is not caught: it is the service's own code.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        id_header: str = "x-request-id",
        echo: bool = True,
        segment_header: str = "",
        segments: Collection[str] = (),
        segment: Callable[[Scope], str] | None = None,
    ) -> None:
        if segment_header and segment is not None:
            raise ValueError("give either `segment_header` or `segment`, not both")
        if segment_header and not segments:
            raise ValueError("`segment_header` needs `segments`: the list of what it may say")
        self.app = app
        self._id_header = id_header.lower()
        self._echo = echo
        self._segment_header = segment_header.lower()
        self._segments = frozenset(segments)
        self._segment = segment

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; anything but HTTP and WebSocket passes by."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        name = _sound(headers.get(self._id_header, ""))

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(self._id_header, name)
            await send(message)

        with request(ids=name, segment=self._segment_of(scope, headers)):
            await self.app(scope, receive, answer if self._echo else send)

    def _segment_of(self, scope: Scope, headers: Headers) -> str:
        if self._segment is not None:
            found = self._segment(scope)
        elif self._segment_header:
            found = headers.get(self._segment_header, "")
        else:
            return ""
        return found if not found or not self._segments or found in self._segments else OTHER


def _sound(name: str) -> str:
    if 0 < len(name) <= _LONGEST_ID and _ID_CHARACTERS.issuperset(name):
        return name
    return uuid.uuid4().hex
