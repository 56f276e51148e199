"""Episodes as annotations in Grafana, and dashboards pushed through its HTTP API."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

_Api = Any  # grafana_client.GrafanaApi, whose methods have no types
_MILLISECOND_NS: Final = 1_000_000
_RETRIED: Final = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
)
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
    # Empty or one client: what is open lives outside the options.
    _clients: list[_Api] = field(default_factory=list, init=False, repr=False, compare=False)

    def open(self) -> None:
        """Ask Grafana for its annotations, which shows that it is there and knows the token."""
        if self._clients:
            return
        api = _client(self.url, self.token, self.timeout_seconds, self.ca_file)
        self._clients.append(api)
        try:
            self._find(api, "oodmon")
        except BaseException:
            self.close()
            raise

    def send(self, events: Sequence[Event]) -> None:
        """Write the annotations in order; what is there already is left as it is."""
        if not events:
            return
        self.open()
        api = self._clients[0]
        for event in events:
            if event.type.startswith("oodmon.alert.resolved."):
                self._resolve(api, event)
            elif self._find(api, _tag("event", event.id)) is None:
                self._add(api, event, _millis(event.time), None, self._tags(event))

    def close(self) -> None:
        """Close the client's connections."""
        while self._clients:
            self._clients.pop().client.s.close()

    def _resolve(self, api: _Api, event: Event) -> None:
        began = _tag("event", f"{event.id.removesuffix('-resolved')}-firing")
        end = _millis(event.time)
        found = self._find(api, began)
        if found is None:  # never sent, or deleted by hand: the whole episode at once
            start = _began(event)
            self._add(api, event, start, end, [*self._tags(event), began])
            return
        tags = [str(tag) for tag in found.get("tags") or ()]
        if _tag("event", event.id) in tags:
            return
        tags += [tag for tag in self._tags(event) if tag not in tags]
        with _guarded():
            api.annotations.partial_update_annotation(
                found["id"],
                time_from=found["time"],
                time_to=end,
                tags=tags,
                text=_text(event),
            )

    def _find(self, api: _Api, tag: str) -> Mapping[str, Any] | None:
        with _guarded():
            found = api.annotations.find_annotations(
                dashboard_uid=quote(self.dashboard_uid, safe="") or None,
                tags=[quote("oodmon"), quote(tag, safe="")],
                limit=1,
            )
        if not isinstance(found, list):
            raise RetryLater(f"grafana: {self.url} answers, but not as Grafana does")
        return found[0] if found else None

    def _add(
        self, api: _Api, event: Event, start: int, end: int | None, tags: Sequence[str]
    ) -> None:
        with _guarded():
            api.annotations.add_annotation(
                dashboard_uid=self.dashboard_uid or None,
                time_from=start,
                time_to=end,
                tags=list(tags),
                text=_text(event),
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
    api = _client(url, token, timeout_seconds, ca_file)
    try:
        folder_uid = _folder(api, folder)
        return [
            _push_one(api, url, folder_uid, board)
            for board in (dashboards() if boards is None else boards)
        ]
    finally:
        api.client.s.close()


def _folder(api: _Api, title: str) -> str:
    """The uid of the folder, which is made if it is not there."""
    uid = re.sub(r"[^A-Za-z0-9_-]+", "-", title).strip("-")[:40] or "oodmon"
    for _ in range(2):  # somebody else may create it between our look and our request
        with _guarded(but=frozenset({HTTPStatus.NOT_FOUND})) as missing:
            return str(api.folder.get_folder(uid)["uid"])
        for known in _listed(api):
            if known.get("title") == title:
                return str(known["uid"])
        if missing:
            with _guarded(but=_TAKEN):
                return str(api.folder.create_folder(title, uid=uid)["uid"])
    raise Rejected(f"grafana: the folder {title!r} can neither be read nor created")


def _listed(api: _Api) -> Sequence[Mapping[str, Any]]:
    with _guarded():
        return list(api.folder.get_all_folders())


def _push_one(api: _Api, url: str, folder_uid: str, board: Mapping[str, Any]) -> Pushed:
    uid = str(board["uid"])
    there: Mapping[str, Any] = {}
    with _guarded(but=frozenset({HTTPStatus.NOT_FOUND})):
        there = api.dashboard.get_dashboard(uid)
    address = urlsplit(url)._replace(path=f"{urlsplit(url).path.rstrip('/')}/d/{uid}").geturl()
    ours = {key: value for key, value in board.items() if key not in ("id", "version")}
    if there:
        theirs = {k: v for k, v in there["dashboard"].items() if k not in ("id", "version")}
        if theirs == ours and there.get("meta", {}).get("folderUid") == folder_uid:
            return Pushed(uid, address, "unchanged")
    with _guarded():
        api.dashboard.update_dashboard(
            {
                "dashboard": {**ours, "id": None},
                "folderUid": folder_uid,
                # Ours is the truth: an edit by hand belongs into a copy under another uid.
                "overwrite": True,
                "message": "oodmon grafana push",
            }
        )
    return Pushed(uid, address, "updated" if there else "created")


def _client(url: str, token: Secret, timeout_seconds: float, ca_file: str) -> _Api:
    target = urlsplit(url)
    if target.scheme not in ("http", "https") or not target.hostname:
        raise Rejected("grafana: url must be http://host… or https://host…")
    try:
        from grafana_client.api import GrafanaApi
    except ImportError as error:
        raise Rejected("grafana: the client is missing; pip install 'oodmon[grafana]'") from error
    path = target.path.strip("/")
    return GrafanaApi(
        auth=token.reveal() or None,
        protocol=target.scheme,
        host=f"[{target.hostname}]" if ":" in target.hostname else target.hostname,
        port=target.port,
        url_path_prefix=f"{path}/" if path else "",
        verify=ca_file or True,
        timeout=timeout_seconds,
    )


@contextmanager
def _guarded(but: frozenset[int] = frozenset()) -> Iterator[list[int]]:
    """Turn what the client raises into a sink's two failures.

    Args:
        but: client errors that the caller deals with: they end the block without a raise, and
            the list that the block is given then holds the status.
    """
    from grafana_client.client import (
        GrafanaClientError,
        GrafanaException,
        GrafanaTimeoutError,
    )

    swallowed: list[int] = []
    try:
        yield swallowed
    except GrafanaTimeoutError as error:
        raise RetryLater("grafana: no answer in time") from error
    except GrafanaClientError as error:
        status = int(error.status_code)
        if status in but:
            swallowed.append(status)
        elif status in _RETRIED:
            raise RetryLater(f"grafana: HTTP {status}") from error
        else:
            hint = _HINTS.get(status, "")
            raise Rejected(f"grafana: HTTP {status}{hint}") from error
    except GrafanaException as error:
        raise RetryLater(f"grafana: HTTP {error.status_code}") from error
    except OSError as error:
        raise RetryLater(f"grafana: {type(error).__name__}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        # A proxy's login page, or JSON of another shape: something else answers at this address.
        raise RetryLater(f"grafana: an answer that is not Grafana's: {error!r}") from error


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
    for name in ("statistic", "threshold", "effect", "samples", "promise"):
        value = shown.get(name)
        if value not in (None, ""):
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            lines.append(f"{name}: {html.escape(text)}")
    return "<br>".join(lines)
