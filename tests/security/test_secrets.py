"""Secrets appear nowhere, and ports are open to this machine only."""

from __future__ import annotations

import json
import logging
import time
import traceback
from pathlib import Path

import pytest

from oodmon.admission import Admission
from oodmon.config import build
from oodmon.config.parse import load, loads
from oodmon.config.schema import HttpSection
from oodmon.daemon.http import Management, Readiness
from oodmon.daemon.metrics import Metrics
from oodmon.errors import ConfigError, OodmonError
from oodmon.records import Event, Exceedance, Fact, Notice
from oodmon.secret import Secret
from oodmon.sinks import webhook
from oodmon.store.events import Store
from tests.servers.processes import free_port

MARK = "s3cr3t-m4rk"
CONFIG = """\
model: {{name: m, version: "1"}}
daemon:
  feed: {{type: spool, path: spool/}}
  calibration: {{path: states/}}
  store: {{url: "postgresql://user:${{MARK}}@127.0.0.1:{port}/db?connect_timeout=1"}}
  sinks:
    hook: {{type: webhook, url: "http://127.0.0.1:{port}/", secret: "${{MARK}}",
           token: "${{MARK}}"}}
    kafka: {{type: kafka, bootstrap_servers: ["127.0.0.1:{port}"],
            security_protocol: SASL_PLAINTEXT, username: me,
            password: "${{MARK}}", ssl_password: "${{MARK}}", timeout_seconds: 0.3}}
    grafana: {{type: grafana, url: "http://127.0.0.1:{port}", token: "${{MARK}}"}}
  triggers:
    again: {{type: webhook, url: "http://127.0.0.1:{port}/", secret: "${{MARK}}"}}
  intake: {{token: "${{MARK}}", port: 0}}
"""


def test_secrets_appear_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "oodmon.yaml"
    path.write_text(CONFIG.format(port=free_port()))
    config = load(path, "daemon", environment={"MARK": MARK})
    shown = [repr(config), str(config), f"{config!r:.100000}"]
    for name, built in build.sinks(config).items():
        shown.append(repr(built))
        try:
            built.component.open()
            built.component.send([_event(name)])
        except OodmonError as error:
            shown += traceback.format_exception(error)
        finally:
            built.component.close()
    for guard in build.triggers(config).values():
        shown.append(repr(guard))
    try:
        build.store(config).open()
    except OodmonError as error:
        shown += traceback.format_exception(error)
    shown.append(caplog.text)
    for text in shown:
        assert MARK not in text
    assert any("****" in text for text in shown)


def _event(name: str) -> Event:
    from oodmon.wire import event_of

    return event_of(Notice("m", "1", name, 1, "k", "text"))


@pytest.mark.parametrize(
    "line",
    [
        'sinks: {a: {type: webhook, url: "http://x", secret: MARK}}',
        'sinks: {a: {type: webhook, url: "http://x", token: MARK, timeout_seconds: x}}',
        "sinks: {a: {type: kafka, bootstrap_servers: [a], password: [MARK]}}",
        'store: {url: "nonsense://user:MARK@host/db"}',
        'store: {url: "postgresql://user:MARK@host/db", pipeline: ""}',
        "intake: {token: MARK}",
    ],
)
def test_a_secret_in_a_wrong_place_is_not_repeated(line: str) -> None:
    text = f"model: {{name: m}}\ndaemon:\n  feed: {{type: spool, path: s}}\n  {line}\n"
    text += "  calibration: {path: p}\n  odd: 1\n"
    with pytest.raises(ConfigError) as caught:
        loads(text.replace("MARK", MARK).encode(), "daemon", environment={})
    assert MARK not in str(caught.value)


@pytest.mark.parametrize("value", [MARK, MARK * 20, "a'b\"c\\d-" + MARK, MARK + "\n\x07"])
@pytest.mark.parametrize(
    "line",
    [
        'sinks: {a: {type: "${MARK}"}}',
        'sinks: {a: {type: webhook, url: "${MARK}"}}',
        'sinks: {a: {type: webhook, url: "http://x", timeout_seconds: "${MARK}"}}',
        'sinks: {a: {type: kafka, bootstrap_servers: [a], topic: "${MARK}"}}',
        'sinks: {a: {type: kafka, bootstrap_servers: ["x${MARK}y"]}}',
        'rules: {r: {drift: "${MARK}"}}',
        'store: {url: "${MARK}"}',
        'windows: {length_seconds: "${MARK}"}',
        'feed: "${MARK}"',
        '"${MARK}": 1',
        "odd: ${MARK}",
    ],
)
def test_a_variable_in_a_wrong_place_is_told_by_its_name(line: str, value: str) -> None:
    feed = "" if line.startswith("feed") else "  feed: {type: spool, path: s}\n"
    text = f"model: {{name: m}}\ndaemon:\n{feed}  {line}\n  calibration: {{path: p}}\n  more: 1\n"
    with pytest.raises(ConfigError) as caught:
        loads(text.encode(), "daemon", environment={"MARK": value})
    assert value[:8] not in str(caught.value)
    assert MARK not in str(caught.value)


def test_a_message_stays_readable_where_a_variable_is_short() -> None:
    feed = 'feed: {type: kafka, bootstrap_servers: [a], topic: "${A}", group: "${B}"}'
    for topic, told in (("a/b", "'a/b'"), ("a/b-and-more", "'${A}'")):
        with pytest.raises(ConfigError) as caught:
            loads(
                f"model: {{name: m}}\ndaemon: {{{feed}, calibration: {{path: p}}}}\n".encode(),
                "daemon",
                environment={"A": topic, "B": "b"},
            )
        assert f"topic: {told} is no name of a topic" in str(caught.value)


def test_a_secret_is_shown_as_stars() -> None:
    held = Secret(MARK)
    for text in (repr(held), str(held), f"{held}", f"{held!r}", "%s" % held, repr([held])):  # noqa: UP031
        assert MARK not in text
        assert "****" in text
    with pytest.raises(TypeError):
        json.dumps(held)
    assert not hasattr(held, "__dict__")


def test_secrets_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watch(one: bytes, two: bytes) -> bool:
        seen.append((one, two))
        return one == two

    monkeypatch.setattr("oodmon.secret.hmac.compare_digest", watch)
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert len(seen) == 2
    body, now = b"{}", int(time.time())
    headers = webhook.sign(Secret("key"), "id", now, body)
    seen.clear()
    assert webhook.verify(Secret("key"), headers, body, now_seconds=now)
    assert not webhook.verify(Secret("other"), headers, body, now_seconds=now)
    assert not webhook.verify(Secret("key"), headers, body + b" ", now_seconds=now)
    assert seen, "the signature was compared in some other way"


def test_ports_are_open_to_this_machine_only_unless_told_otherwise() -> None:
    assert HttpSection().host == "127.0.0.1"
    assert Admission(token=Secret("t")).host == "127.0.0.1"
    server = Management(
        HttpSection().host,
        0,
        readiness=lambda: Readiness(True, {}),
        metrics=Metrics().render,
        reload=lambda: None,
    )
    server.start()
    try:
        assert server._listener.server is not None
        assert server._listener.server.server_address[0] == "127.0.0.1"
    finally:
        server.stop()


def test_the_intake_is_shut_unless_the_config_opens_it() -> None:
    text = "model: {name: m}\ndaemon:\n  feed: {type: spool, path: s}\n  calibration: {path: p}\n"
    config = loads(text.encode(), "daemon", environment={})
    assert config.daemon is not None
    assert config.daemon.intake is None
    kafka = text.replace("{type: spool, path: s}", "{type: kafka, bootstrap_servers: [a]}")
    kafka += '  intake: {token: "${T}"}\n'
    with pytest.raises(ConfigError, match="intake: needs a feed of type spool"):
        loads(kafka.encode(), "daemon", environment={"T": "t"})


def test_names_from_outside_are_only_text_to_the_database(tmp_path: Path) -> None:
    hostile = "x'); DROP TABLE alerts; --\"; \x00 %s :name {0}"
    store = Store(f"sqlite:///{tmp_path / 'facts.db'}", pipeline=hostile.replace("\x00", ""))
    store.open()
    try:
        facts: list[Fact] = [
            Notice("m", "1", hostile, 5, hostile, hostile),
            Exceedance("m", "1", hostile, hostile, hostile, 5, 1.0, 0.5),
        ]
        store.append(facts, state=b"s", positions={hostile: hostile}, outbox=[], agents=[])
        snapshot = store.load()
        assert snapshot is not None
        assert list(snapshot.positions.values())
        assert store.alerts() == []
    finally:
        store.close()
