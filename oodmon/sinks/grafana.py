"""Episodes as annotations in Grafana, and dashboards pushed through its HTTP API."""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from importlib.resources import files
from typing import Any, Final, Literal
from urllib.parse import quote, urlsplit

from oodmon.contracts import Sink
from oodmon.errors import Rejected, RetryLater
from oodmon.records import Event
from oodmon.registry import sinks
from oodmon.secret import Secret

__all__ = ["Grafana", "Pushed", "dashboards", "push"]

_MILLISECOND_NS: Final = 1_000_000
_RETRIED: Final = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
)
_MISSING: Final = frozenset({HTTPStatus.NOT_FOUND})
_TAKEN: Final = frozenset({HTTPStatus.CONFLICT, HTTPStatus.PRECONDITION_FAILED})
"""What Grafana's versions answer where a folder of that name or uid is there already."""
_LONGEST_TAG: Final = 100
"""Characters of a tag that Grafana's table holds."""


@sinks.register("grafana")
@dataclass(frozen=True)
class Grafana(Sink):
    """Annotate episodes: a firing alert opens a region, its resolution closes it.

    Annotations are tagged ``oodmon``, ``rule:…``, ``model:…``, ``version:…``, ``severity:…``,
    ``fingerprint:…`` and ``event:<event id>``, so that dashboards can select them and that the
    sink finds its own again: an event whose tag is there already changes nothing. Events other
    than alerts become points in time.

    401, 403 and other refusals are `Rejected`; timeouts, 408, 425, 429, 5xx and a Grafana that
    does not answer are `RetryLater`.

    Options:
        url: of Grafana, with its sub-path if it has one.
        token: of a service account that may write annotations.
        dashboard_uid: annotate one dashboard only; empty makes annotations of the organisation,
            which every dashboard can query by tag.
        tags: added to every annotation.
        timeout_seconds: for one request.
        ca_file: PEM file of certification authorities instead of the system's.
    """

    url: str
    token: Secret = field(default_factory=Secret)
    dashboard_uid: str = ""
    tags: tuple[str, ...] = ()
    timeout_seconds: float = 10.0
    ca_file: str = ""

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options for the conformity checks."""
        return [{"url": "http://{address}", "token": Secret("t"), "timeout_seconds": 0.5}]

    def open(self) -> None:
        """Ask Grafana for its annotations, which shows that it is there and knows the token."""

        async def look(server: _Server) -> None:
            await self._find(server, "oodmon")

        self._run(look)

    def send(self, events: Sequence[Event]) -> None:
        """Write the annotations in order; what is there already is left as it is."""

        async def write(server: _Server) -> None:
            for event in events:
                if event.type.startswith("oodmon.alert.resolved."):
                    await self._resolve(server, event)
                elif await self._find(server, _tag("event", event.id)) is None:
                    await self._add(server, event, _millis(event.time), None, self._tags(event))

        if events:
            self._run(write)

    def close(self) -> None:
        """Nothing: no connection outlives a call."""

    def _run(self, work: Callable[[_Server], Awaitable[None]]) -> None:
        asyncio.run(_with_server(self.url, self.token, self.timeout_seconds, self.ca_file, work))

    async def _resolve(self, server: _Server, event: Event) -> None:
        began = _tag("event", f"{event.id.removesuffix('-resolved')}-firing")
        end = _millis(event.time)
        found = await self._find(server, began)
        if found is None:  # never sent, or deleted by hand: the whole episode at once
            await self._add(server, event, _began(event), end, [*self._tags(event), began])
            return
        tags = [str(tag) for tag in found.get("tags") or ()]
        if _tag("event", event.id) in tags:
            return
        tags += [tag for tag in self._tags(event) if tag not in tags]
        await server.ask(
            server.api.annotations.partial_update_annotation(
                found.get("id"),
                time_from=found.get("time"),
                time_to=end,
                tags=tags,
                text=_text(event),
            )
        )

    async def _find(self, server: _Server, tag: str) -> Mapping[str, Any] | None:
        found = await server.ask(
            # The client puts these into the URL as they are.
            server.api.annotations.find_annotations(
                dashboard_uid=quote(self.dashboard_uid, safe="") or None,
                tags=["oodmon", quote(tag, safe="")],
                limit=1,
            )
        )
        if not isinstance(found, list):
            raise RetryLater(f"grafana: {self.url} answers, but not as Grafana does")
        return found[0] if found else None

    async def _add(
        self, server: _Server, event: Event, start: int, end: int | None, tags: Sequence[str]
    ) -> None:
        await server.ask(
            server.api.annotations.add_annotation(
                dashboard_uid=self.dashboard_uid or None,
                time_from=start,
                time_to=end,
                tags=list(tags),
                text=_text(event),
            )
        )

    def _tags(self, event: Event) -> list[str]:
        data = event.data
        named = {
            "rule": data.get("rule"),
            "model": data.get("model"),
            "version": data.get("version"),
            "severity": data.get("severity"),
            "fingerprint": data.get("fingerprint"),
            "type": event.type,
            "event": event.id,
        }
        own = [_tag(name, str(value)) for name, value in named.items() if value]
        return list(dict.fromkeys(["oodmon", *own, *self.tags]))


@dataclass(frozen=True, slots=True)
class Pushed:
    """One dashboard after `push`: its uid, its address and what was done."""

    uid: str
    url: str
    status: Literal["created", "updated", "unchanged"]


def dashboards() -> list[dict[str, Any]]:
    """The dashboards that oodmon ships, in order of their file names."""
    folder = files("oodmon") / "dashboards"
    found = sorted(path.name for path in folder.iterdir() if path.name.endswith(".json"))
    return [json.loads((folder / name).read_text("utf-8")) for name in found]


def push(
    url: str,
    token: Secret,
    folder: str = "oodmon",
    boards: Iterable[Mapping[str, Any]] | None = None,
    *,
    timeout_seconds: float = 10.0,
    ca_file: str = "",
) -> list[Pushed]:
    """Create or update the folder and the dashboards; pushing again changes nothing.

    Args:
        url: of Grafana, with its sub-path if it has one.
        token: of a service account that may write folders and dashboards.
        folder: title of the folder.
        boards: dashboards, each with a ``uid``; by default those that oodmon ships.
        timeout_seconds: for one request.
        ca_file: PEM file of certification authorities instead of the system's.

    Raises:
        RetryLater, Rejected: as the sink does.
    """
    pushed: list[Pushed] = []

    async def write(server: _Server) -> None:
        folder_uid = await _folder(server, folder)
        given = dashboards() if boards is None else boards
        pushed.extend([await _push_one(server, url, folder_uid, board) for board in given])

    asyncio.run(_with_server(url, token, timeout_seconds, ca_file, write))
    return pushed


async def _folder(server: _Server, title: str) -> str:
    """The uid of the folder, which is made if it is not there."""
    uid = re.sub(r"[^A-Za-z0-9_-]+", "-", title).strip("-")[:40] or "oodmon"
    for _ in range(2):  # somebody else may create it between our look and our request
        held = await server.ask(server.api.folder.get_folder(uid), but=_MISSING)
        if held is None:
            known = await server.ask(server.api.folder.get_all_folders())
            held = next((one for one in known if one.get("title") == title), None)
        if held is None:
            held = await server.ask(server.api.folder.create_folder(title, uid=uid), but=_TAKEN)
        if held is not None:
            return str(held["uid"])
    raise Rejected(f"grafana: the folder {title!r} can neither be read nor created")


async def _push_one(server: _Server, url: str, folder_uid: str, board: Mapping[str, Any]) -> Pushed:
    uid = str(board["uid"])
    there = await server.ask(server.api.dashboard.get_dashboard(uid), but=_MISSING)
    address = urlsplit(url)._replace(path=f"{urlsplit(url).path.rstrip('/')}/d/{uid}").geturl()
    ours = {key: value for key, value in board.items() if key not in ("id", "version")}
    if there is not None:
        theirs = {k: v for k, v in there["dashboard"].items() if k not in ("id", "version")}
        if theirs == ours and there.get("meta", {}).get("folderUid") == folder_uid:
            return Pushed(uid, address, "unchanged")
    await server.ask(
        server.api.dashboard.update_dashboard(
            {
                "dashboard": {**ours, "id": None},
                "folderUid": folder_uid,
                # Ours is the truth: an edit by hand belongs into a copy under another uid.
                "overwrite": True,
                "message": "oodmon grafana push",
            }
        )
    )
    return Pushed(uid, address, "created" if there is None else "updated")


@dataclass(frozen=True, slots=True)
class _Server:
    """Grafana's API, for the length of one call of ours.

    The client is asynchronous because a timeout must end a request as a whole: a socket's timeout
    is for one read, and a server that sends a byte now and then never meets it.
    """

    api: Any  # grafana_client.api.AsyncGrafanaApi, whose methods have no types
    timeout_seconds: float

    async def ask(self, request: Awaitable[Any], but: frozenset[int] = frozenset()) -> Any:
        """The answer; none for a status in `but`, which the caller deals with."""
        from grafana_client.client import GrafanaClientError, GrafanaException

        try:
            async with asyncio.timeout(self.timeout_seconds):
                return await request
        except TimeoutError as error:
            raise RetryLater(f"grafana: no answer within {self.timeout_seconds:g} s") from error
        except GrafanaClientError as error:
            status = int(error.status_code)
            if status in but:
                return None
            if status in _RETRIED:
                raise RetryLater(f"grafana: HTTP {status}") from error
            raise Rejected(f"grafana: HTTP {status}{_HINTS.get(status, '')}") from error
        except GrafanaException as error:
            raise RetryLater(f"grafana: {error.message or 'no answer'}") from error
        except OSError as error:
            raise RetryLater(f"grafana: {type(error).__name__}: {error}") from error
        except ValueError as error:  # a proxy's login page, for one
            raise RetryLater(f"grafana: an answer that is no JSON: {error}") from error


async def _with_server(
    url: str,
    token: Secret,
    timeout_seconds: float,
    ca_file: str,
    work: Callable[[_Server], Awaitable[None]],
) -> None:
    target = urlsplit(url)
    if target.scheme not in ("http", "https") or not target.hostname:
        raise Rejected("grafana: url must be http://host… or https://host…")
    try:
        from grafana_client.api import AsyncGrafanaApi
    except ImportError as error:
        raise Rejected("grafana: the client is missing; pip install 'oodmon[grafana]'") from error
    path = target.path.strip("/")
    api: Any = AsyncGrafanaApi(
        auth=token.reveal() or None,
        protocol=target.scheme,
        host=f"[{target.hostname}]" if ":" in target.hostname else target.hostname,
        port=target.port,
        url_path_prefix=f"{path}/" if path else "",
        verify=ca_file or True,
        timeout=timeout_seconds,
    )
    try:
        await work(_Server(api, timeout_seconds))
    except (KeyError, TypeError, AttributeError) as error:  # JSON, but of another shape
        raise RetryLater(f"grafana: an answer that is not Grafana's: {error!r}") from error
    finally:
        await api.client.s.close()


_HINTS: Final[Mapping[int, str]] = {
    HTTPStatus.UNAUTHORIZED: ": the token is missing or wrong",
    HTTPStatus.FORBIDDEN: ": the token's service account may not do this",
}


def _tag(name: str, value: str) -> str:
    return f"{name}:{value}"[:_LONGEST_TAG]


def _millis(ns: int) -> int:
    return ns // _MILLISECOND_NS


def _began(event: Event) -> int:
    try:
        began = datetime.fromisoformat(str(event.data["started_at"]))
    except (KeyError, ValueError):
        return _millis(event.time)
    return int(began.timestamp() * 1000)


def _text(event: Event) -> str:
    """What the annotation says; Grafana shows simple HTML, so values are escaped."""
    data = event.data
    if not event.type.startswith("oodmon.alert."):
        return html.escape(str(data.get("text") or event.type))
    lines = [f"<b>{html.escape(str(data.get('rule')))}</b> {html.escape(str(data.get('status')))}"]
    evidence = data.get("evidence")
    shown = evidence if isinstance(evidence, Mapping) else {}
    for name in ("summary", "statistic", "threshold", "effect", "samples", "promise"):
        value = shown.get(name)
        if value not in (None, ""):
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            lines.append(f"{name}: {html.escape(text)}")
    return "<br>".join(lines)
