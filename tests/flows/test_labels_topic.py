"""kill -9, ranks within contexts, and labels from a topic: every label is judged once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from oodmon.calibration import Calibration
from oodmon.config import build
from oodmon.labelling import LABELS
from oodmon.store import tables
from oodmon.store.database import Database
from tests.flows.daemons import Site
from tests.servers.kafka import Broker
from tests.streams import EPOCH
from tests.waiting import PATIENCE_SECONDS, eventually

BATCHES = 900
ROWS = 16
KILLS = 4


def _site(folder: Path, broker: Broker, topic: str) -> Site:
    site = Site(folder, detectors=("msp",))
    rng = np.random.default_rng(1)
    made = Calibration.from_scores(
        "msp",
        "digest-msp",
        rng.normal(size=4_000),
        rng.integers(0, 4, 4_000),
        segments=rng.choice(["eu", "us"], 4_000),
        times=np.full(4_000, EPOCH),
    )
    made.save(build.calibration_path(str(folder / "states"), "msp"))
    text = site.config.read_text()
    labels = (
        f"  labels: {{least_accuracy: 0.9, topic: {{topic: {topic}, "
        f"bootstrap_servers: ['{broker.address}']}}}}\n"
    )
    text = text.replace("  flag_level", f"{labels}  flag_level")
    text = text.replace("path: states/}", "path: states/, context: [segment, predicted, hour]}")
    text = text.replace("  rules:\n", "  rules:\n    worse: {drift: labels}\n")
    site.config.write_text(text)
    site.fill(BATCHES, rows=ROWS)
    return site


def _rows(site: Site, table: Any) -> list[Any]:
    database = Database(site.url)
    database.open()
    with database.read() as connection:
        found = list(connection.execute(select(table)))
    database.close()
    return found


def _send(broker: Broker, topic: str, names: list[str]) -> None:
    from kafka import KafkaProducer  # type: ignore[import-untyped]

    producer = KafkaProducer(bootstrap_servers=broker.address)
    for first in range(0, len(names), 20):
        # Three of four answers are wrong: the answers are drawn, the labels are not.
        said = {name: len(name) % 4 for name in names[first : first + 20]}
        producer.send(topic, json.dumps({"labels": said}).encode())
    producer.flush()
    producer.close()


def _of_the_fold(site: Site) -> dict[str, list[str]]:
    """Without what labels show: that depends on when they came."""
    return {
        kind: [row for row in rows if f'"test": "{LABELS}"' not in row]
        for kind, rows in site.facts().items()
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_label_of_a_topic_is_judged_once_whatever_is_killed(
    tmp_path: Path, kafka: Broker
) -> None:
    topic = kafka.topic("labels")
    calm = _site(tmp_path / "calm", kafka, kafka.topic("nobody"))
    wild = _site(tmp_path / "wild", kafka, topic)
    calm.finish(calm.start())
    names = sorted(str(row.sample_id) for row in _rows(calm, tables.predictions))[::5]

    rng = np.random.default_rng(5)
    for kill in range(KILLS):
        ready = wild.times_ready()
        process = wild.start()
        wild.wait_ready(ready)
        _send(kafka, topic, names[kill::KILLS])
        time.sleep(float(rng.uniform(0.02, 0.4)))
        process.kill()
        process.wait()
    wild.finish(wild.start())
    messages = sum(-(-len(names[kill::KILLS]) // 20) for kill in range(KILLS))

    def read_to_the_end() -> bool:
        with wild.open() as store:
            return store.label_positions() == {f"{topic}/0": str(messages)}

    def judged() -> int:
        states = [json.loads(row.state) for row in _rows(wild, tables.label_evidence)]
        return sum(int(state["seen"]) for state in states)

    # Labels are joined when a daemon begins, and then once a minute.
    for done in (read_to_the_end, lambda: judged() == len(names)):
        ready = wild.times_ready()
        process = wild.start()
        wild.wait_ready(ready)
        eventually(done, wild.log)
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0, wild.log()

    assert _of_the_fold(wild) == _of_the_fold(calm)
    assert not _rows(wild, tables.labels)
    with wild.open() as store:
        (measured,) = store.measured(0, 2**62)
        alerts = [row for row in store.alerts() if row["rule"] == "worse"]
    assert measured.labelled == len(names)
    assert measured.accuracy < 0.4
    assert [row["status"] for row in alerts] == ["firing"]
    assert "as in the reference" in alerts[0]["evidence"]["summary"]
