"""A daemon whose config is full of secrets works, fails and is asked: none is ever shown."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, urlsplit, urlunsplit

import pytest
from click.testing import CliRunner

from oodmon.cli.program import main
from oodmon.config.parse import load
from oodmon.feeds.spool import Spool
from tests.servers.http import Answer, HttpServer, Request
from tests.servers.processes import free_port
from tests.streams import batch, calibration
from tests.waiting import PATIENCE_SECONDS, eventually

ROOT = Path(__file__).parents[2]
SECRETS = {
    "DATABASE_PASSWORD": "mark/data+base%1",
    "BROKER_PASSWORD": "mark:broker&2",
    "BROKER_KEY_PASSWORD": "mark-broker-key-3",
    "WEBHOOK_SECRET": "mark webhook 4 secret",
    "WEBHOOK_TOKEN": "mark-webhook-token-5",
    "TRIGGER_SECRET": "mark~trigger~6",
    "GRAFANA_TOKEN": "glsa_mark_grafana_7",
    "INTAKE_TOKEN": "mark-intake-token-8",
}
CONFIG = """\
model: {{name: m, version: "1"}}
daemon:
  feed: {{type: spool, path: {folder}/spool}}
  calibration: {{path: {folder}/states}}
  windows: {{length_seconds: 2, allowed_lateness_seconds: 1}}
  drift: {{ks: {{type: ks}}}}
  rules: {{shape: {{drift: ks, triggers: [again]}}}}
  store: {{url: "{url}"}}
  sinks:
    log: {{type: log, events: [alert, window, drift, notice]}}
    hook: {{type: webhook, url: "{server}/hook", secret: "${{WEBHOOK_SECRET}}",
           token: "${{WEBHOOK_TOKEN}}", timeout_seconds: 2}}
    broken: {{type: webhook, url: "{server}/broken", token: "${{WEBHOOK_TOKEN}}",
             timeout_seconds: 2}}
    kafka: {{type: kafka, bootstrap_servers: ["127.0.0.1:{closed}"], timeout_seconds: 0.5,
            security_protocol: SASL_PLAINTEXT, sasl_mechanism: SCRAM-SHA-256, username: me,
            password: "${{BROKER_PASSWORD}}", ssl_password: "${{BROKER_KEY_PASSWORD}}"}}
    grafana: {{type: grafana, url: "{server}", token: "${{GRAFANA_TOKEN}}", timeout_seconds: 2}}
  triggers:
    again: {{type: webhook, url: "{server}/again", secret: "${{TRIGGER_SECRET}}", dry_run: false}}
  intake: {{token: "${{INTAKE_TOKEN}}", port: {intake}}}
"""


class Echo(HttpServer):
    """A receiver that refuses everything and repeats what it was sent, headers too."""

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        if request.method == "GET":  # a look at what is there, which may succeed
            return Answer(body=b"[]")
        sent = " ".join(f"{name}={value}" for name, value in request.headers.items())
        body = json.dumps({"message": f"refused: {sent}", "error": sent}).encode()
        if request.path == "/broken":  # no answer that HTTP knows
            return Answer(drip_seconds=1e-4, reason=f"No\r\n{sent}\r\n\r\n")
        return Answer(status=400, body=body, headers={"X-Echo": sent[:500], "Location": sent[:99]})


@dataclass
class Watched:
    """The folder of a daemon and everything that was shown on the way.

    Attributes:
        shown: where → text.
    """

    folder: Path
    url: str
    server: str
    intake: int = field(default_factory=free_port)
    shown: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "states").mkdir()
        calibration(500).save(self.folder / "states" / "msp.calibration.safetensors")
        text = CONFIG.format(
            folder=self.folder,
            url=self.url,
            server=self.server,
            closed=free_port(),
            intake=self.intake,
        )
        self.config.write_text(text)
        writer = Spool(str(self.folder / "spool")).writer("a")
        for number in range(40):
            shift = 4.0 if number > 15 else 0.0
            scores = [shift + 0.1 * (row - 16) for row in range(32)]
            assert writer.put(batch(scores, seconds=number * 0.5, sequence=number))
        writer.close()

    @property
    def config(self) -> Path:
        return self.folder / "oodmon.yaml"

    def command(self, where: str, *arguments: str) -> str:
        """What a verb prints, and the traceback of what it raised."""
        done = CliRunner().invoke(main, ["--debug", *arguments])
        self.shown[where] = done.output + "".join(traceback.format_exception(done.exception))
        return self.shown[where]

    def start(self, *arguments: str) -> str:
        """What a daemon says that does not come up."""
        done = subprocess.run(
            [sys.executable, "-m", "oodmon", "--debug", "run", str(self.config), *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=PATIENCE_SECONDS,
        )
        assert done.returncode
        self.shown["run"] = done.stdout + done.stderr
        return self.shown["run"]

    def page(self, port: int, name: str, **options: Any) -> str:
        """Body and headers of an answer, whatever its status."""
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{name}", **options)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
                text = f"{answer.headers}{answer.read().decode()}"
        except urllib.error.HTTPError as error:
            text = f"{error.headers}{error.read().decode()}"
        self.shown[f"{name} {len(options)}"] = self.shown.get(f"{name} {len(options)}", "") + text
        return text


def forms(secret: str) -> set[str]:
    """A secret as it may be written: as it is, escaped for a URL, in JSON, in base64."""
    raw = secret.encode()
    # Whatever stands before it shifts base64 by 0, 1 or 2 bytes; the ends depend on neighbours.
    shifted = {base64.b64encode(b"x" * n + raw).decode().rstrip("=")[4:-2] for n in range(3)}
    return {secret, quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1], *shifted}


def leaks(text: str) -> list[str]:
    """Names of the secrets that a text shows."""
    return [name for name, secret in SECRETS.items() if any(one in text for one in forms(secret))]


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in SECRETS.items():
        # A URL wants its password escaped; both forms are looked for.
        monkeypatch.setenv(name, quote(secret, safe="") if name.startswith("DATA") else secret)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def watched(tmp_path: Path, postgres_url: str, echo: Echo, secrets: None) -> Watched:
    # The tests' server lets everybody in, whatever the password is.
    parts = urlsplit(postgres_url)
    address = f"{parts.username}:${{DATABASE_PASSWORD}}@{parts.hostname}:{parts.port}"
    url = urlunsplit(parts._replace(netloc=address))
    return Watched(tmp_path, url, echo.url)


def every_row(url: str) -> str:
    """The whole database as text."""
    import psycopg

    names = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    with psycopg.connect(url) as connection:
        found = [name for (name,) in connection.execute(names)]
        assert len(found) > 8
        return "".join(
            str(connection.execute(f'SELECT * FROM "{name}"').fetchall()) for name in found
        )


def every_file(folder: Path, besides: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != besides:
            yield str(path), path.read_bytes().decode(errors="replace")


def test_a_working_daemon_shows_no_secret_anywhere(
    watched: Watched, echo: Echo, postgres_url: str
) -> None:
    config, port, shown = str(watched.config), free_port(), watched.shown
    log = watched.folder / "daemon.log"
    command = [sys.executable, "-m", "oodmon", "run", config, "--log-level", "debug"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
        )

    def said() -> str:
        assert process.poll() is None, log.read_text()
        return log.read_text()

    def dead(name: str) -> Callable[[], bool]:
        told = re.compile(rf'^oodmon_dead_letters_total{{sink="{name}"}} [1-9]', re.MULTILINE)
        return lambda: bool(said() and told.search(watched.page(port, "metrics")))

    try:
        eventually(lambda: ": ready" in said(), said)
        for name in ("sinks.hook", "sinks.grafana", "triggers.again"):
            eventually(dead(name), f"{name}: no dead letter; {said()[-3000:]}")
        eventually(lambda: any(r.path == "/broken" for r in echo.requests), said)
        eventually(lambda: "kafka" in watched.page(port, "readyz"), said)
        for name in ("readyz", "healthz", "version", "nothing"):
            watched.page(port, name)
        right = {"Authorization": f"Bearer {SECRETS['INTAKE_TOKEN']}"}
        wrong = {"Authorization": f"Bearer {SECRETS['INTAKE_TOKEN']}x"}
        for headers in (right, wrong):
            for name in ("v1/batches", "v1/outputs", "v1/nothing"):
                watched.page(watched.intake, name, data=b"{}", headers=headers)
        # A reload of what is wrong, with a secret in the wrong place, and of what is right again.
        good = watched.config.read_text()
        watched.config.write_text(
            good.replace("log: {type: log,", 'log: {type: "${WEBHOOK_TOKEN}",')
        )
        assert "log" in watched.page(port, "-/reload", data=b"")
        watched.config.write_text(good)
        watched.page(port, "-/reload", data=b"")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()

    assert "PASSED" not in watched.command("check", "check", "--half", "daemon", config)
    assert "m" in watched.command("status", "status", config)
    watched.command("status json", "status", "--json", config)
    watched.command("tail", "tail", "--once", "--since", "9999d", config)
    assert "refused" in watched.command("dead", "events", "dead", config) or shown["dead"]
    assert "hook" in watched.command("dead json", "events", "dead", "--json", config)
    watched.command("replay", "replay", config)
    watched.command("push", "grafana", "push", "--config", config)
    page = watched.folder / "report.html"
    watched.command("report", "report", config, "--output", str(page))
    assert page.stat().st_size > 10_000
    shown["database"] = every_row(postgres_url)
    shown["repr"] = repr(load(config, "daemon", environment=dict(os.environ)))
    shown |= dict(every_file(watched.folder, watched.config))

    sent = " ".join(str(request.headers) for request in echo.requests)
    assert {"WEBHOOK_TOKEN", "GRAFANA_TOKEN"} <= set(leaks(sent)), "the receivers do get them"
    assert len(shown) > 20
    for where, text in shown.items():
        assert not leaks(text), f"{where}: {leaks(text)}"


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("type: spool, path: {folder}/spool", 'type: nonsense, path: "${BROKER_PASSWORD}"', "feed"),
        ("windows: {", 'windows: {more: "${INTAKE_TOKEN}", ', "more"),
        (
            "type: spool, path: {folder}/spool",
            """type: kafka, bootstrap_servers: ["127.0.0.1:1"], timeout_seconds: 0.5,
               security_protocol: SASL_PLAINTEXT, sasl_mechanism: PLAIN, username: me,
               password: "${BROKER_PASSWORD}\"""",
            "127.0.0.1",
        ),
        ("5432/oodmon", "1/oodmon?password=${DATABASE_PASSWORD}", "store"),
    ],
    ids=["a type that is none", "an option that is none", "a feed away", "a database away"],
)
def test_a_start_that_fails_shows_no_secret(
    tmp_path: Path, secrets: None, old: str, new: str, word: str
) -> None:
    closed = free_port()
    url = f"postgresql://me:${{DATABASE_PASSWORD}}@127.0.0.1:{closed}/oodmon"
    if word in ("feed", "more", "127.0.0.1"):
        url = f"sqlite:///{tmp_path}/oodmon.db"
    watched = Watched(tmp_path, url, "http://127.0.0.1:1")
    text = watched.config.read_text().replace(f"{closed}/oodmon", "5432/oodmon")
    old = old.replace("{folder}", str(tmp_path))
    assert old in text
    text = text.replace(old, new)
    if "kafka, boot" in new:  # the intake needs a spool
        text = re.sub(r"\n  intake: .*", "", text)
    watched.config.write_text(text)
    assert word in watched.start("--port", str(free_port()))
    for verb in ("check", "status", "report"):
        watched.command(verb, verb, str(watched.config))
    assert "Traceback" in "".join(watched.shown.values()), "with --debug it is shown how it came"
    for where, said in watched.shown.items():
        assert not leaks(said), f"{where}: {leaks(said)}"


def test_a_secret_is_seen_in_every_form() -> None:
    for name, secret in SECRETS.items():
        for text in (
            f"say {secret}!",
            f"postgresql://me:{quote(secret, safe='')}@host/db",
            json.dumps({"a": secret}),
            "Basic " + base64.b64encode(f"me:{secret}".encode()).decode(),
            "Basic " + base64.b64encode(f"you:{secret}:x".encode()).decode(),
        ):
            assert name in leaks(text)
    assert not leaks("nothing to see")
