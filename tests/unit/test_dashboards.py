"""The shipped dashboards: whole, and every query speaks of metrics that the daemon exports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from oodmon.daemon.metrics import SERIES
from oodmon.sinks.grafana import dashboards
from tests.servers.prometheus import Prometheus

BOARDS = dashboards()
NAME = re.compile(r"\boodmon_[a-z0-9_]+\b")
# What the dashboards show of the process itself; prometheus-client exports it.
PROCESS = {"process_resident_memory_bytes"}


def queries(board: dict[str, Any]) -> Iterator[str]:
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def expanded(query: str) -> str:
    """The query as Grafana sends it."""
    for name, value in (
        ("$__rate_interval", "1m"),
        ("$__range", "6h"),
        ("$model", ".*"),
        ("$version", ".*"),
        ("$detector", ".*"),
    ):
        query = query.replace(name, value)
    return query


def test_the_boards_that_ship() -> None:
    assert [board["uid"] for board in BOARDS] == ["oodmon-operations", "oodmon-overview"]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board["uid"])
def test_a_board_fits_any_grafana(board: dict[str, Any]) -> None:
    assert "id" not in board
    assert "oodmon" in board["tags"]
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert {"model", "version"} <= set(variables)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["description"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24, panel["title"]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board["uid"])
def test_panels_do_not_overlap(board: dict[str, Any]) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board["uid"])
def test_every_query_names_what_is_exported(board: dict[str, Any]) -> None:
    found = {name for query in queries(board) for name in NAME.findall(query)}
    assert found
    assert found <= SERIES, f"not exported: {sorted(found - SERIES)}"
    for query in queries(board):
        assert NAME.search(query) or any(name in query for name in PROCESS), query


def test_prometheus_takes_every_query(prometheus: Prometheus) -> None:
    prometheus.start([])
    prometheus.wait_for("vector(1)")
    for board in BOARDS:
        for query in queries(board):
            if not query.startswith("label_values("):
                prometheus.query(expanded(query))  # raises where it does not parse
