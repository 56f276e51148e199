"""The main job on real input: images → model → agent → spool → daemon → database, Kafka, Grafana.

A retraining trigger is called, and a foreign consumer reads the alert.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import oodmon
from oodmon.store.events import Store
from tests.waiting import PATIENCE_SECONDS, eventually

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("sklearn.datasets")

CONFIG = """
model: {{name: digits, version: "7"}}
agent:
  tap: {{type: hooks, layers: auto, overhead_budget: 1.0}}
  detectors:
    msp: {{type: msp}}
    gram: {{type: gram}}
    duq: {{type: duq, epochs: 5}}
    rnd: {{type: rnd, epochs: 5}}
  states: states/
  feed: {{type: spool, path: spool/}}
daemon:
  feed: {{type: spool, path: spool/}}
  calibration: {{path: states/}}
  flag_level: 0.01
  windows: {{length_seconds: 0.5, allowed_lateness_seconds: 3}}
  drift:
    budget: {{type: budget, false_alarms: 1 per 7 days, tolerated_fraction: 0.05}}
  rules:
    novelty: {{drift: budget, severity: critical, resolve_after_windows: 2, triggers: [retrain]}}
  store: {{url: "{store}"}}
  sinks:
    kafka: {{type: kafka, bootstrap_servers: [{kafka}], topic: {topic}}}
    grafana: {{type: grafana, url: "{grafana}", token: "${{OODMON_TEST_TOKEN}}"}}
  triggers:
    retrain:
      {{type: webhook, url: "{hook}/retrain", secret: "${{OODMON_TEST_SECRET}}", dry_run: false}}
  http: {{host: 127.0.0.1, port: 0}}
"""

MODEL = '''
"""A small classifier of eight digits, and what is normal for it."""
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

WEIGHTS = Path(__file__).with_suffix(".safetensors")


def images(novel):
    pixels, labels = load_digits(return_X_y=True)
    chosen = np.isin(labels, (4, 6)) == novel
    order = np.random.default_rng(0).permutation(np.flatnonzero(chosen))
    names = np.searchsorted([0, 1, 2, 3, 5, 7, 8, 9], labels[order])
    return (pixels[order] / 16).astype("float32").reshape(-1, 1, 8, 8), names.astype("int64")


def model():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2, padding=1), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(512, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8),
    )
    if not WEIGHTS.exists():
        save_file(trained(net).state_dict(), WEIGHTS)
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval()


def trained(net):
    x, y = (torch.from_numpy(part[:500]) for part in images(False))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net


def reference():
    x, y = images(False)
    return model(), (x[500:1000], y[500:1000])
'''


@pytest.fixture
def site(
    tmp_path: Path, kafka: Any, grafana: Any, http_server: Any, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """A folder with a config for real servers, fitted by the command line."""
    store = f"sqlite:///{tmp_path / 'oodmon.db'}"
    if getattr(request, "param", "sqlite") == "postgresql":
        store = request.getfixturevalue("postgres_url")
    topic = kafka.topic()
    config = tmp_path / "oodmon.yaml"
    config.write_text(
        CONFIG.format(
            store=store,
            kafka=kafka.address,
            topic=topic,
            grafana=grafana.url,
            hook=http_server.url,
        )
    )
    (tmp_path / "digits_model.py").write_text(MODEL)
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "OODMON_TEST_TOKEN": grafana.token,
        "OODMON_TEST_SECRET": "a-key-for-the-hook",
        "OMP_NUM_THREADS": "1",
    }
    fit = [sys.executable, "-m", "oodmon", "fit", str(config), "digits_model:reference"]
    done = subprocess.run(fit, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gram" in done.stdout
    return {"config": config, "environment": environment, "topic": topic, "store": store}


@pytest.mark.parametrize("site", ["sqlite", "postgresql"], indirect=True)
def test_from_images_to_an_alert_that_others_read(
    site: dict[str, Any],
    tmp_path: Path,
    kafka: Any,
    grafana: Any,
    http_server: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    import digits_model  # type: ignore[import-not-found]

    with (tmp_path / "daemon.log").open("wb") as output:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "oodmon", "run", str(site["config"])],
            env=site["environment"],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    store = Store(site["store"])
    try:
        model = digits_model.model()
        known = torch.from_numpy(digits_model.images(False)[0])
        novel = torch.from_numpy(digits_model.images(True)[0])
        agent = oodmon.attach(model, site["config"])
        try:
            _serve(agent, model, known[1000:1300], "clean")
            began = time.time_ns()
            _serve(agent, model, novel[:240], "novel")
            _serve(agent, model, known[1000:1300], "again")
        finally:
            assert agent.detach(PATIENCE_SECONDS)
        store.open()
        eventually(lambda: _resolved(store))
        eventually(lambda: not store.depths())
    finally:
        daemon.send_signal(signal.SIGTERM)
        status = daemon.wait(PATIENCE_SECONDS)
    log = (tmp_path / "daemon.log").read_text()
    assert status == 0, log
    assert "a-key-for-the-hook" not in log

    (alert,) = store.alerts()
    assert alert["started_at_ns"] >= began - 1_000_000_000, "no alarm while traffic was clean"
    assert {row["sample_id"].split("-")[0] for row in _most_novel(store)} == {"novel"}
    assert sum(agent["samples"] for agent in store.agents()) == 840
    firings = store.firings()
    store.close()

    messages = [json.loads(record.value) for record in kafka.read_all(site["topic"])]
    assert [message["type"] for message in messages] == [
        "oodmon.alert.firing.v1",
        "oodmon.alert.resolved.v1",
    ]
    firing = messages[0]
    assert (firing["specversion"], firing["source"]) == ("1.0", "/oodmon/digits/7")
    assert firing["data"]["severity"] == "critical"
    assert firing["data"]["evidence"]["statistic"] >= firing["data"]["evidence"]["threshold"]

    (region,) = grafana.annotations.values()
    assert region["timeEnd"] > region["time"], "the episode's annotation was closed"

    (call,) = [request for request in http_server.requests if request.path == "/retrain"]
    assert [row["outcome"] for row in firings] == ["fired"]
    from oodmon.sinks.webhook import verify

    assert verify("a-key-for-the-hook", call.headers, call.body)
    assert json.loads(call.body)["type"] == "oodmon.retraining.requested.v1"


def _serve(agent: Any, model: Any, images: Any, phase: str) -> None:
    for first in range(0, len(images), 10):
        ids = tuple(f"{phase}-{first + row}" for row in range(10))
        with agent.request(ids=ids), torch.inference_mode():
            model(images[first : first + 10])
        time.sleep(0.06)
        # However slow the machine is: nothing is shed, and little is late for its window.
        eventually(lambda: agent.stats().seen - agent.stats().scored <= 100)


def _resolved(store: Store) -> bool:
    alerts = store.alerts()
    return bool(alerts) and all(alert["ended_at_ns"] for alert in alerts)


def _most_novel(store: Store) -> list[dict[str, Any]]:
    return store.exceedances(most_novel_first=True, limit=10)
