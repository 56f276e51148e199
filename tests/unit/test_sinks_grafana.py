"""The Grafana sink against a server that checks requests as Grafana does; pushing dashboards."""

from __future__ import annotations

import time

import pytest

from oodmon.checks.sinks import event
from oodmon.errors import Rejected, RetryLater
from oodmon.records import Notice
from oodmon.secret import Secret
from oodmon.sinks.grafana import Grafana, dashboards, push
from oodmon.wire import event_of
from tests.servers.grafana import GrafanaServer
from tests.servers.http import Answer, HttpServer
from tests.waiting import PATIENCE_SECONDS


def sink(server: GrafanaServer, **options: object) -> Grafana:
    return Grafana(server.url, Secret(server.token), timeout_seconds=30.0, **options)  # type: ignore[arg-type]


def test_an_episode_is_a_region_that_its_end_closes(grafana: GrafanaServer) -> None:
    target = sink(grafana, tags=("team-a",))
    target.send([event(7)])
    (held,) = grafana.annotations.values()
    assert held["time"] == held["timeEnd"] == event(7).time // 1_000_000
    for tag in ("oodmon", "rule:novelty", "model:digits", "version:1", "team-a"):
        assert tag in held["tags"]
    assert f"fingerprint:{7:016x}" in held["tags"]
    assert f"event:{event(7).id}" in held["tags"]
    target.send([event(7, status="resolved")])
    (closed,) = grafana.annotations.values()
    assert closed["time"] == event(7).time // 1_000_000
    assert closed["timeEnd"] == event(7, status="resolved").time // 1_000_000
    assert f"event:{event(7, status='resolved').id}" in closed["tags"]
    assert f"event:{event(7).id}" in closed["tags"]


def test_whatever_is_repeated_changes_nothing(grafana: GrafanaServer) -> None:
    target = sink(grafana)
    for _ in range(2):
        target.send([event(7), event(7, status="resolved"), event(7)])
    writes = [r for r in grafana.requests if r.method != "GET"]
    assert [r.method for r in writes] == ["POST", "PATCH"]
    assert len(grafana.annotations) == 1


def test_an_end_without_a_beginning_makes_the_whole_region(grafana: GrafanaServer) -> None:
    resolved = event(7, status="resolved")
    sink(grafana).send([resolved, resolved, event(7)])
    (held,) = grafana.annotations.values()
    assert (held["time"], held["timeEnd"]) == (event(7).time // 10**6, resolved.time // 10**6)


def test_a_notice_is_a_point(grafana: GrafanaServer) -> None:
    notice = event_of(Notice("m", "1", "agent", 5_000_000, "k", "breaker of <gram> opened"))
    sink(grafana).send([notice])
    (held,) = grafana.annotations.values()
    assert held["time"] == held["timeEnd"] == 5
    assert held["text"] == "breaker of &lt;gram&gt; opened"
    assert "type:oodmon.notice.v1" in held["tags"]


def test_an_annotation_of_one_dashboard(grafana: GrafanaServer) -> None:
    push(grafana.url, Secret(grafana.token))
    sink(grafana, dashboard_uid="oodmon-overview").send([event()])
    assert [one["dashboardUID"] for one in grafana.annotations.values()] == ["oodmon-overview"]
    with pytest.raises(Rejected, match="404"):
        sink(grafana, dashboard_uid="gone").send([event()])


@pytest.mark.parametrize(
    ("token", "match"), [("wrong", "401.*token"), ("glsa_reader", "403.*service account")]
)
def test_a_wrong_token_is_rejected(token: str, match: str, grafana: GrafanaServer) -> None:
    target = Grafana(grafana.url, Secret(token))
    with pytest.raises(Rejected, match=match):
        target.send([event()])


def test_open_finds_a_wrong_token(grafana: GrafanaServer) -> None:
    with pytest.raises(Rejected, match="401"):
        Grafana(grafana.url, Secret("wrong")).open()
    sink(grafana).open()


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_passing_troubles_are_tried_again(status: int, grafana: GrafanaServer) -> None:
    for before in range(2):  # at the look-up, and at the write after it
        grafana.faults = [Answer(body=b"[]")] * before + [Answer(status)]
        with pytest.raises(RetryLater, match=str(status)):
            sink(grafana).send([event()])
    assert not grafana.annotations
    sink(grafana).send([event()])
    assert len(grafana.annotations) == 1


def test_a_write_that_was_taken_but_not_answered_is_not_repeated(grafana: GrafanaServer) -> None:
    target = sink(grafana)
    target.send([event()])  # as if the answer to this had been lost
    target.send([event()])
    assert len(grafana.annotations) == 1


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=b"<html>Log in", headers={"Content-Type": "text/html"}),
        Answer(body=b"{"),
        Answer(body=b'{"status": "fine"}'),
        Answer(body=b"[7]"),
    ],
    ids=["login page", "half", "another API", "another shape"],
)
def test_something_that_is_not_grafana(answer: Answer, http_server: HttpServer) -> None:
    http_server.default = answer
    answer.headers.setdefault("Content-Type", "application/json")
    with pytest.raises(RetryLater, match="grafana"):
        Grafana(http_server.url, Secret("t"), timeout_seconds=30.0).send([event(status="resolved")])


def test_a_slow_grafana_is_left_in_time(grafana: GrafanaServer) -> None:
    grafana.faults = [Answer(delay_seconds=PATIENCE_SECONDS)]
    began = time.monotonic()
    with pytest.raises(RetryLater, match="no answer"):
        Grafana(grafana.url, Secret(grafana.token), timeout_seconds=0.3).send([event()])
    assert time.monotonic() - began < PATIENCE_SECONDS / 2


def test_an_impossible_url_is_rejected() -> None:
    with pytest.raises(Rejected, match="url"):
        Grafana("grafana:3000", Secret("t")).open()


def test_a_sub_path_is_kept(http_server: HttpServer) -> None:
    http_server.default = Answer(body=b"[]", headers={"Content-Type": "application/json"})
    Grafana(f"{http_server.url}/tools/grafana/", Secret("t")).open()
    assert http_server.requests[0].path.startswith("/tools/grafana/api/annotations?")


def test_push_twice_changes_nothing_the_second_time(grafana_address: tuple[str, str]) -> None:
    url, token = grafana_address
    push(url, Secret(token), "oodmon tests")
    again = push(url, Secret(token), "oodmon tests")
    assert {one.status for one in again} <= {"unchanged", "updated"}
    assert [one.uid for one in again] == [board["uid"] for board in dashboards()]


def test_push_creates_then_updates_then_leaves_alone(grafana: GrafanaServer) -> None:
    token = Secret(grafana.token)
    assert [one.status for one in push(grafana.url, token)] == ["created", "created"]
    assert [one.status for one in push(grafana.url, token)] == ["unchanged", "unchanged"]
    grafana.boards["oodmon-overview"]["dashboard"]["title"] = "mine"
    statuses = {one.uid: one.status for one in push(grafana.url, token)}
    assert statuses == {"oodmon-operations": "unchanged", "oodmon-overview": "updated"}
    assert grafana.boards["oodmon-overview"]["dashboard"]["title"] == "oodmon: overview"
    assert list(grafana.folders) == ["oodmon"]
    assert grafana.boards["oodmon-overview"]["meta"]["folderUid"] == "oodmon"


def test_push_uses_a_folder_that_has_the_title(grafana: GrafanaServer) -> None:
    grafana.folders["abc"] = {"uid": "abc", "title": "ML / drift", "id": 1}
    pushed = push(grafana.url, Secret(grafana.token), "ML / drift")
    assert list(grafana.folders) == ["abc"]
    assert pushed[0].url == f"{grafana.url}/d/{pushed[0].uid}"


def test_push_survives_somebody_else_creating_the_folder(grafana: GrafanaServer) -> None:
    grafana.faults = [
        Answer(404),
        Answer(body=b"[]", headers={"Content-Type": "application/json"}),
        Answer(412),
    ]
    grafana.folders["oodmon"] = {"uid": "oodmon", "title": "oodmon", "id": 1}
    assert push(grafana.url, Secret(grafana.token))
    assert list(grafana.folders) == ["oodmon"]


def test_push_says_why_it_cannot(grafana: GrafanaServer) -> None:
    with pytest.raises(Rejected, match="403"):
        push(grafana.url, Secret(grafana.reader_token))


def test_tls_is_verified(https_server: tuple[HttpServer, str]) -> None:
    server, certificate = https_server
    server.default = Answer(body=b"[]", headers={"Content-Type": "application/json"})
    with pytest.raises(RetryLater, match="grafana"):
        Grafana(server.url, Secret("t"), timeout_seconds=30.0).open()
    assert not server.requests
    Grafana(server.url, Secret("t"), timeout_seconds=30.0, ca_file=certificate).open()
    assert server.requests
