"""kill -9 at twenty random moments changes no row and loses no alert."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.flows.daemons import Site

KILLS = 20
BATCHES = 10_000


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What an undisturbed run concludes."""
    calm = Site(tmp_path_factory.mktemp("kills") / "calm")
    calm.fill(BATCHES)
    calm.finish(calm.start())
    facts = calm.facts()
    assert len(facts["alerts"]) >= 2
    assert len(facts["windows"]) > 450
    return facts


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
    tmp_path: Path,
    kafka: Any,
    database: str,
    expected: dict[str, list[str]],
    request: pytest.FixtureRequest,
) -> None:
    topic = kafka.topic()
    sink = f"{{kafka: {{type: kafka, bootstrap_servers: [{kafka.address}], topic: {topic}}}}}"
    store = request.getfixturevalue("postgres_url") if database == "postgresql" else ""

    wild = Site(tmp_path / "wild", store=store, sinks=sink)
    wild.fill(BATCHES)
    rng = np.random.default_rng(11)
    at_work = 0
    for _ in range(KILLS):
        ready = wild.times_ready()
        process = wild.start()
        # Some die while they import or migrate, some soon after they begin, and some when they
        # have committed something, however slow the machine is.
        kind = rng.choice(["early", "begun", "committed"], p=[0.2, 0.4, 0.4])
        if kind == "early":
            time.sleep(float(rng.uniform(0.1, 0.5)))
        else:
            wild.wait_ready(ready)
            if kind == "committed":
                wild.wait_committed(wild.committed())
            time.sleep(float(rng.uniform(0.02, 0.2)))
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
