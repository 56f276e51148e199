"""A real service with a watched model: whose samples do the scores say they are?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import torch
from oodmon_starlette import OTHER, OodmonMiddleware
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message
from starlette.websockets import WebSocket

from oodmon.agent import Agent, Limits
from oodmon.contracts import Feed, Reader, Reads, Writer
from oodmon.records import Activations, ScoreBatch
from oodmon.taps.hooks import Hooks


@dataclass
class Kept(Feed, Writer):
    """A feed that keeps the batches."""

    batches: list[ScoreBatch] = field(default_factory=list)

    def writer(self, source: str) -> Writer:
        return self

    def reader(self) -> Reader:
        raise NotImplementedError

    def put(self, batch: ScoreBatch) -> bool:
        self.batches.append(batch)
        return True

    def close(self) -> None:
        return

    @property
    def named(self) -> dict[str, str]:
        """Sample id → segment."""
        found = {}
        for batch in self.batches:
            for row in range(batch.rows):
                segment = batch.segments[batch.segment[row]] if len(batch.segment) else ""
                found[batch.sample_id(row)] = segment
        return found


class Largest:
    digest = "0" * 16

    def reads(self) -> Reads:
        return Reads(logits=True)

    def score(self, acts: Activations) -> torch.Tensor:
        return -acts.require_logits().max(dim=1).values

    def to(self, device: Any) -> Largest:
        return self


model = torch.nn.Linear(4, 3).eval()


def predict(rows: int = 1) -> int:
    with torch.inference_mode():
        return int(model(torch.ones(rows, 4)).argmax(dim=1)[0])


async def in_the_loop(_request: Request) -> Response:
    return JSONResponse(predict())


def in_the_pool(_request: Request) -> Response:
    return JSONResponse(predict(rows=2))


async def over_a_socket(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_json(predict())
    await socket.close()


def service(**options: Any) -> Starlette:
    routes = [
        Route("/loop", in_the_loop),
        Route("/pool", in_the_pool),
        WebSocketRoute("/socket", over_a_socket),
    ]
    app = Starlette(routes=routes)
    app.add_middleware(OodmonMiddleware, **options)
    return app


def get(app: Starlette, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path, headers=headers or {})

    return asyncio.run(call())


def connect(app: Starlette, path: str, headers: dict[str, str]) -> list[Message]:
    """Open a socket, as a server would, and collect what the service sends."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "websocket", "path": path, "headers": raw, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    return sent


@pytest.fixture
def feed() -> Iterator[Kept]:
    kept = Kept()
    agent = Agent.attach(
        model,
        tap=Hooks(),
        scorers={"largest": Largest()},
        feed=kept,
        model_name="net",
        version="1",
        overhead_budget=1.0,
        limits=Limits(linger_seconds=0.0),
    )
    kept.agent = agent  # type: ignore[attr-defined]
    yield kept
    agent.detach()


def finish(feed: Kept) -> dict[str, str]:
    assert feed.agent.detach()  # type: ignore[attr-defined]
    return feed.named


def test_async_and_threaded_endpoints_and_sockets_are_named(feed: Kept) -> None:
    app = service()
    answer = get(app, "/loop", {"X-Request-Id": "call-1"})
    get(app, "/pool", {"X-Request-Id": "call-2"})
    sent = connect(app, "/socket", {"X-Request-Id": "call-3"})
    assert [m["type"] for m in sent] == ["websocket.accept", "websocket.send", "websocket.close"]
    assert answer.headers["x-request-id"] == "call-1"
    assert finish(feed) == {"call-1": "", "call-2/0": "", "call-2/1": "", "call-3": ""}


@pytest.mark.parametrize("bad", ["", "x" * 129, "two words", "a\tb", "<script>", 'a"b'])
def test_unsound_ids_are_replaced(feed: Kept, bad: str) -> None:
    answer = get(service(), "/loop", {"X-Request-Id": bad} if bad else {})
    name = answer.headers["x-request-id"]
    assert name != bad
    assert len(name) == 32
    assert set(finish(feed)) == {name}


def test_segments_come_from_a_list(feed: Kept) -> None:
    app = service(segment_header="x-tenant", segments=["de", "fr"])
    for name, tenant in (("a", "de"), ("b", "fr"), ("c", "made-up"), ("d", "")):
        get(app, "/loop", {"X-Request-Id": name} | ({"X-Tenant": tenant} if tenant else {}))
    assert finish(feed) == {"a": "de", "b": "fr", "c": OTHER, "d": ""}


def test_segments_may_be_computed(feed: Kept) -> None:
    get(service(segment=lambda scope: scope["path"]), "/loop", {"X-Request-Id": "a"})
    assert finish(feed) == {"a": "/loop"}


def test_the_id_need_not_be_sent_back(feed: Kept) -> None:
    assert "x-request-id" not in get(service(echo=False), "/loop").headers
    finish(feed)


def test_a_request_ends_with_its_name(feed: Kept) -> None:
    get(service(), "/loop", {"X-Request-Id": "inside"})
    predict()
    (inside, outside) = finish(feed)
    assert inside == "inside"
    assert outside.startswith(feed.batches[0].source)


@pytest.mark.parametrize(
    "options",
    [
        {"segment_header": "x-tenant"},
        {"segment_header": "x", "segments": ["a"], "segment": lambda _scope: "a"},
    ],
)
def test_segments_that_clients_could_make_up_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="segment"):
        OodmonMiddleware(service(), **options)
