"""A batch that was posted and accepted reaches the database, also when the daemon is killed."""

from __future__ import annotations

import http.client
from pathlib import Path

import pytest

from oodmon.wire import encode_batch
from tests.flows.daemons import DETECTORS, Site
from tests.servers.processes import free_port
from tests.streams import batch
from tests.waiting import PATIENCE_SECONDS, eventually


def post(port: int, body: bytes) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    headers = {
        "Authorization": "Bearer t0ken",
        "Content-Type": "application/vnd.oodmon.score-batch",
    }
    try:
        connection.request("POST", "/v1/batches", body, headers)
        return connection.getresponse().status
    except OSError:
        return 0  # not there yet
    finally:
        connection.close()


def test_what_was_accepted_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAKE", "t0ken")
    site, port = Site(tmp_path / "site"), free_port()
    with site.config.open("a") as config:
        config.write(f'  intake: {{token: "${{INTAKE}}", port: {port}}}\n')
    bodies = [
        encode_batch(batch([0.1, 0.2], seconds=n, sequence=n, source="edge", detectors=DETECTORS))
        for n in range(3)
    ]
    daemon = site.start()
    try:

        def runs() -> bool:
            assert daemon.poll() is None, site.log()
            return True

        eventually(lambda: runs() and post(port, bodies[0]) == 200, site.log)
        assert post(port, bodies[1]) == 200
        assert post(port, bodies[2]) == 200
        daemon.kill()
        daemon.wait()
        daemon = site.start()
        eventually(lambda: runs() and site.committed() >= 3, site.log)
        with site.open() as store:
            (agent,) = store.agents()
        assert (agent["source"], agent["samples"], agent["lost"]) == ("edge", 6, 0)
    finally:
        daemon.kill()
        daemon.wait()
    assert "t0ken" not in site.log()
