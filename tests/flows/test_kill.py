"""kill -9 at twenty random moments changes no row and loses no alert."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.flows.daemons import Site
from tests.servers.http import wait_until

KILLS = 20
BATCHES = 15_000


def _alert_ids(site: Site) -> set[str]:
    with site.open() as store:
        rows = store.alerts()
    return {
        f"{row['fingerprint']}-{row['started_at_ns']}-{status}"
        for row in rows
        for status in ("firing", "resolved")
        if status == "firing" or row["ended_at_ns"]
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_twenty_kills_change_nothing(
    tmp_path: Path, kafka: Any, database: str, request: pytest.FixtureRequest
) -> None:
    topic = kafka.topic()
    sink = f"{{kafka: {{type: kafka, bootstrap_servers: [{kafka.address}], topic: {topic}}}}}"
    store = request.getfixturevalue("postgres_url") if database == "postgresql" else ""

    calm = Site(tmp_path / "calm")
    calm.fill(BATCHES)
    calm.finish(calm.start())
    expected = calm.facts()
    assert len(expected["alerts"]) >= 2
    assert len(expected["windows"]) > 500

    wild = Site(tmp_path / "wild", store=store, sinks=sink)
    wild.fill(BATCHES)
    rng = np.random.default_rng(11)
    at_work = 0
    for _ in range(KILLS):
        ready = wild.log().count(": ready")
        process = wild.start()
        # One in five dies while it imports or migrates, the others at work.
        if rng.random() < 0.2:
            time.sleep(float(rng.uniform(0.1, 0.5)))
        else:
            wait_until(lambda seen=ready: wild.log().count(": ready") > seen, seconds=60)
            time.sleep(float(rng.uniform(0.02, 0.4)))
        assert process.poll() is None, wild.log()
        process.kill()
        process.wait()
        at_work += 0 < wild.committed() < BATCHES // 2
    wild.finish(wild.start())

    assert at_work >= 3, "the kills have to meet the daemon at work"
    found = wild.facts()
    for table, rows in expected.items():
        assert found[table] == rows, f"{table} differ"

    ids = _alert_ids(wild)
    records = kafka.read_all(topic)
    seen = [json.loads(record.value)["id"] for record in records]
    assert set(seen) == ids, "every alert at least once; by id, each exactly once"
    assert {record.key for record in records} == {b"m/1"}
