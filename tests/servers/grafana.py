"""A contract server for Grafana's HTTP API: it checks every request as Grafana does.

Folders, dashboards, annotations and data sources live in memory. A request that Grafana would
refuse is refused with Grafana's status: 401 and 403 without a right token, 400 for a body that is
not of the documented shape, 404 for an unknown uid, 409 for a folder that exists, 412 for a
version conflict. `faults` answers with errors and delays on demand.
``OODMON_TEST_GRAFANA=url`` and ``OODMON_TEST_GRAFANA_TOKEN`` run tests that only use the public
API against a real server.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import jsonschema
import pytest

from tests.servers.http import Answer, HttpServer, Request

_TEXT: Final = {"type": "string"}
_TIME: Final = {"type": ["integer", "null"]}
_TAGS: Final = {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 100}}
_ANNOTATION: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "dashboardUID": _TEXT,
        "dashboardId": {"type": "integer"},
        "panelId": {"type": ["integer", "null"]},
        "time": _TIME,
        "timeEnd": _TIME,
        "tags": _TAGS,
        "text": _TEXT,
    },
    "required": ["text"],
    "additionalProperties": False,
}
_PATCH: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"time": _TIME, "timeEnd": _TIME, "tags": _TAGS, "text": _TEXT},
    "additionalProperties": False,
}
_FOLDER: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 1},
        "uid": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,40}$"},
        "parentUid": _TEXT,
    },
    "required": ["title"],
    "additionalProperties": False,
}
_DASHBOARD: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "dashboard": {
            "type": "object",
            "properties": {
                "id": {"type": ["integer", "null"]},
                "uid": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,40}$"},
                "title": {"type": "string", "minLength": 1},
                "version": {"type": "integer"},
                "panels": {"type": "array", "items": {"type": "object", "required": ["type"]}},
            },
            "required": ["title"],
        },
        "folderUid": _TEXT,
        "overwrite": {"type": "boolean"},
        "message": _TEXT,
    },
    "required": ["dashboard"],
    "additionalProperties": False,
}

_Reply = tuple[int, Any]


class GrafanaServer(HttpServer):
    """Grafana's API as far as oodmon uses it.

    Attributes:
        token: the right token; `reader_token` may only read.
        annotations: by id.
        folders, boards: by uid; a board is the stored ``{"dashboard", "meta"}``.
        faults: answers that are given, in order, instead of doing what is asked.
    """

    def __init__(self) -> None:
        self.token = "glsa_right"
        self.reader_token = "glsa_reader"
        self.annotations: dict[int, dict[str, Any]] = {}
        self.folders: dict[str, dict[str, Any]] = {}
        self.boards: dict[str, dict[str, Any]] = {}
        self.datasources: dict[str, dict[str, Any]] = {}
        self.faults: list[Answer] = []
        self._ids = itertools.count(1)
        super().__init__()

    def answer(self, request: Request) -> Answer:
        """Do what Grafana would do."""
        self.requests.append(request)
        if self.faults:
            return self.faults.pop(0)
        status, body = self._route(request)
        kind = {"Content-Type": "application/json; charset=UTF-8"}
        return Answer(status, kind, json.dumps(body).encode())

    def _route(self, request: Request) -> _Reply:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in (self.token, self.reader_token):
            return 401, {"message": "Invalid API key"}
        if token == self.reader_token and request.method != "GET":
            return 403, {"message": "You'll need additional permissions to perform this action"}
        url = urlsplit(request.path)
        query = parse_qs(url.query)
        for method, pattern, schema, handle in self._routes():
            match = re.fullmatch(pattern, url.path)
            if match is None or method != request.method:
                continue
            body: Any = {}
            if schema is not None:
                try:
                    body = json.loads(request.body)
                    jsonschema.validate(body, schema)
                except (ValueError, jsonschema.ValidationError) as error:
                    return 400, {"message": f"bad request data: {error}"}
            return handle(match.groups(), query, body)
        return 404, {"message": "Not found"}

    def _routes(
        self,
    ) -> tuple[tuple[str, str, Mapping[str, Any] | None, Callable[[Any, Any, Any], _Reply]], ...]:
        uid = "([A-Za-z0-9_-]+)"
        return (
            ("GET", "/api/health", None, lambda *_: (200, {"database": "ok"})),
            ("GET", "/api/annotations", None, self._find),
            ("POST", "/api/annotations", _ANNOTATION, self._annotate),
            ("PATCH", r"/api/annotations/(\d+)", _PATCH, self._patch),
            ("DELETE", r"/api/annotations/(\d+)", None, self._delete),
            ("GET", "/api/folders", None, lambda *_: (200, list(self.folders.values()))),
            ("GET", f"/api/folders/{uid}", None, self._folder),
            ("POST", "/api/folders", _FOLDER, self._create_folder),
            ("GET", f"/api/dashboards/uid/{uid}", None, self._board),
            ("POST", "/api/dashboards/db", _DASHBOARD, self._save_board),
            ("GET", "/api/datasources", None, lambda *_: (200, list(self.datasources.values()))),
            ("GET", f"/api/datasources/uid/{uid}", None, self._datasource),
        )

    def _find(self, _: Any, query: Mapping[str, list[str]], __: Any) -> _Reply:
        tags = set(query.get("tags", []))
        board = query.get("dashboardUID", [""])[0]
        found = [
            one
            for one in self.annotations.values()
            if tags <= set(one["tags"]) and board in ("", one["dashboardUID"])
        ]
        found.sort(key=lambda one: -one["timeEnd"])
        return 200, found[: int(query.get("limit", ["100"])[0])]

    def _annotate(self, _: Any, __: Any, body: dict[str, Any]) -> _Reply:
        if not body["text"]:
            return 400, {"message": "Failed to save annotation: text field should not be empty"}
        board = body.get("dashboardUID", "")
        if board and board not in self.boards:
            return 404, {"message": "Dashboard not found"}
        began = body.get("time") or int(time.time() * 1000)
        number = next(self._ids)
        self.annotations[number] = {
            "id": number,
            "dashboardUID": board,
            "time": began,
            "timeEnd": body.get("timeEnd") or began,
            "tags": body.get("tags") or [],
            "text": body["text"],
        }
        return 200, {"message": "Annotation added", "id": number}

    def _patch(self, match: tuple[str], _: Any, body: dict[str, Any]) -> _Reply:
        held = self.annotations.get(int(match[0]))
        if held is None:
            return 404, {"message": "Annotation not found"}
        held.update({name: value for name, value in body.items() if value})
        return 200, {"message": "Annotation patched"}

    def _delete(self, match: tuple[str], _: Any, __: Any) -> _Reply:
        if self.annotations.pop(int(match[0]), None) is None:
            return 404, {"message": "Annotation not found"}
        return 200, {"message": "Annotation deleted"}

    def _folder(self, match: tuple[str], _: Any, __: Any) -> _Reply:
        held = self.folders.get(match[0])
        return (404, {"message": "folder not found"}) if held is None else (200, held)

    def _create_folder(self, _: Any, __: Any, body: dict[str, Any]) -> _Reply:
        uid = body.get("uid") or f"folder{next(self._ids)}"
        if uid in self.folders:
            return 412, {"message": "the folder has been changed by someone else"}
        if any(one["title"] == body["title"] for one in self.folders.values()):
            return 409, {"message": "a folder with the same name already exists"}
        number = next(self._ids)
        self.folders[uid] = {"id": number, "uid": uid, "title": body["title"], "version": 1}
        return 200, self.folders[uid]

    def _board(self, match: tuple[str], _: Any, __: Any) -> _Reply:
        held = self.boards.get(match[0])
        return (404, {"message": "Dashboard not found"}) if held is None else (200, held)

    def _save_board(self, _: Any, __: Any, body: dict[str, Any]) -> _Reply:
        board = dict(body["dashboard"])
        folder = body.get("folderUid", "")
        if folder and folder not in self.folders:
            return 404, {"message": "folder not found"}
        uid = board.get("uid") or f"board{next(self._ids)}"
        held = self.boards.get(uid)
        version = 1
        if held is not None:
            current = held["dashboard"]["version"]
            if not body.get("overwrite") and board.get("version") != current:
                return 412, {"status": "version-mismatch", "message": "changed by someone else"}
            version = current + 1
        number = held["dashboard"]["id"] if held else next(self._ids)
        board |= {"id": number, "uid": uid, "version": version}
        self.boards[uid] = {"dashboard": board, "meta": {"folderUid": folder, "version": version}}
        return 200, {"id": number, "uid": uid, "status": "success", "version": version}

    def _datasource(self, match: tuple[str], _: Any, __: Any) -> _Reply:
        held = self.datasources.get(match[0])
        return (404, {"message": "Data source not found"}) if held is None else (200, held)


@pytest.fixture
def grafana() -> Iterator[GrafanaServer]:
    """A contract server without folders, dashboards or annotations."""
    server = GrafanaServer()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def grafana_address(request: pytest.FixtureRequest) -> tuple[str, str]:
    """URL and token of a real Grafana where one is given, else of the contract server."""
    given = os.environ.get("OODMON_TEST_GRAFANA")
    if given:
        return given, os.environ.get("OODMON_TEST_GRAFANA_TOKEN", "")
    server: GrafanaServer = request.getfixturevalue("grafana")
    return server.url, server.token
